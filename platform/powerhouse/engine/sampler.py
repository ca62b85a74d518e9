"""From logits to a token: biases, penalties, temperature, min-p (Nguyen et al. 2024), top-k, top-p (Holtzman et al. 2020).

Shapes: B rows, V vocabulary, F the rows that are filtered; of one row, S tokens that its text has, W that its answer has.

A token is a pure function of (its row of logits, parameters, seed, number of tokens before it). The random number is drawn
from seed and count by a hash, on the side that schedules, and travels with the row: so the choice knows nothing of the
rest of the batch, of pre-emptions or of devices, and no generator has a state to keep.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from powerhouse.device import upload

_RUN = 64


class Penalties(NamedTuple):
    """What a row's own text takes off its logits."""

    repetition: float
    """Divides positive logits of tokens of prompt and answer, multiplies negative ones (Keskar et al. 2019, section 4.1)."""
    presence: float
    frequency: float
    seen: tuple[int, ...]
    """Tokens of prompt and answer, each once."""
    written: tuple[tuple[int, int], ...]
    """Tokens of the answer, and how often each is there."""


class RowSampling(NamedTuple):
    """What the choice of one token needs besides its logits."""

    temperature: float
    top_k: int | None
    top_p: float
    uniform: float
    """In [0, 1): where in the cumulative distribution the token lies."""
    num_logprobs: int | None = None
    """Likeliest tokens that are told beside the chosen one; None is nothing at all."""
    min_p: float = 0.0
    bias: tuple[tuple[int, float], ...] = ()
    """Added to logits; -inf forbids."""
    penalties: Penalties | None = None
    mask: bytes | None = None
    """Bit i, lowest first: whether token i may be chosen."""

    @property
    def is_filtered(self) -> bool:
        return self.top_k is not None or self.top_p < 1 or self.min_p > 0

    @classmethod
    def from_wire(cls, value: Sequence[Any]) -> RowSampling:
        row = cls(*value)
        return row._replace(penalties=row.penalties and Penalties(*row.penalties))


def draw_uniform(seed: int, num_tokens: int) -> float:
    """A number in [0, 1) with 32 random bits, which float64 holds exactly."""
    digest = hashlib.blake2b(f"{seed}:{num_tokens}".encode(), digest_size=4).digest()
    return int.from_bytes(digest) / 2**32


def seed_of(seed: int, index: int) -> int:
    """The seed of one of several answers to a prompt; the first has the request's own."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest()) if index else seed


def sample(logits_BV: Tensor, rows: Sequence[RowSampling]) -> list[int]:
    """Choose a token for each row; the logits are left as they are."""
    logits_BV = _adjust(logits_BV, rows)
    if all(row.temperature == 0 for row in rows):
        greedy: list[int] = likeliest(logits_BV).tolist()
        return greedy
    probabilities_BV = _probabilities(logits_BV, rows)
    uniform_B = upload([row.uniform for row in rows], logits_BV.device, torch.float64)
    chosen = _invert(probabilities_BV, uniform_B)
    is_greedy_B = upload([row.temperature == 0 for row in rows], logits_BV.device)
    chosen_ids: list[int] = torch.where(is_greedy_B, likeliest(logits_BV), chosen).tolist()
    return chosen_ids


def distribution(logits_BV: Tensor, rows: Sequence[RowSampling]) -> Tensor:
    """What tokens are drawn from where the temperature is above 0: probabilities [B, V] in float64."""
    weights_BV = _probabilities(_adjust(logits_BV, rows), rows)
    return weights_BV / weights_BV.sum(-1, keepdim=True)


def _probabilities(logits_BV: Tensor, rows: Sequence[RowSampling]) -> Tensor:
    """Not normalised again after filtering."""
    temperature_B1 = upload([row.temperature or 1.0 for row in rows], logits_BV.device)[:, None]
    # The largest logit is taken off before the division, which can then not overflow however low the temperature.
    shifted_BV = logits_BV - logits_BV.amax(-1, keepdim=True)
    probabilities_BV = (shifted_BV / temperature_B1).softmax(-1).double()
    filtered = [i for i, row in enumerate(rows) if row.is_filtered]
    if filtered:
        filtered_F = upload(filtered, logits_BV.device)
        probabilities_BV[filtered_F] = _filter(probabilities_BV[filtered_F], [rows[i] for i in filtered])
    return probabilities_BV


def _adjust(logits_BV: Tensor, rows: Sequence[RowSampling]) -> Tensor:
    if adjusted := [i for i, row in enumerate(rows) if row.bias or row.penalties or row.mask]:
        logits_BV = logits_BV.clone()
        for i in adjusted:
            _adjust_row(logits_BV[i], rows[i])
    return logits_BV


def _adjust_row(logits_V: Tensor, row: RowSampling) -> None:
    """In place, in vLLM's order: what is forbidden, biases, penalties."""
    if row.mask is not None:
        allowed = np.unpackbits(np.frombuffer(row.mask, dtype=np.uint8), bitorder="little")[: len(logits_V)]
        logits_V.masked_fill_(upload(allowed == 0, logits_V.device), float("-inf"))
    if row.bias:
        token_ids, values = zip(*row.bias, strict=True)
        logits_V[upload(token_ids, logits_V.device)] += upload(values, logits_V.device)
    if row.penalties is None:
        return
    repetition, presence, frequency, seen, written = row.penalties
    if repetition != 1:
        seen_S = upload(seen, logits_V.device)
        logits_S = logits_V[seen_S]
        logits_V[seen_S] = torch.where(logits_S > 0, logits_S / repetition, logits_S * repetition)
    if written:
        ids_W, counts_W = upload(written, logits_V.device).T
        logits_V[ids_W] -= presence + frequency * counts_W


def likeliest(logits_BV: Tensor) -> Tensor:
    """argmax, the first of equals; in two steps on a CPU, where torch's own took 27 times as long as amax (32 x 49,152)."""
    num_rows, vocab_size = logits_BV.shape
    if logits_BV.device.type != "cpu" or vocab_size % _RUN:
        return logits_BV.argmax(-1)
    runs_BNR = logits_BV.view(num_rows, -1, _RUN)
    run_B = runs_BNR.amax(-1).argmax(-1)
    return run_B * _RUN + runs_BNR[torch.arange(num_rows), run_B].argmax(-1)


def _filter(probabilities_FV: Tensor, rows: Sequence[RowSampling]) -> Tensor:
    """Set the probability of what min-p, top-k and then top-p leave out to 0; the likeliest token always stays."""
    vocab_size, device = probabilities_FV.shape[-1], probabilities_FV.device
    top_k_F1 = upload([vocab_size if row.top_k is None else min(row.top_k, vocab_size) for row in rows], device)[:, None]
    top_p_F1 = upload([row.top_p for row in rows], device, torch.float64)[:, None]
    min_p_F1 = upload([row.min_p for row in rows], device, torch.float64)[:, None]
    sorted_FV, order_FV = probabilities_FV.sort(stable=True, dim=-1, descending=True)
    sorted_FV = sorted_FV.masked_fill(sorted_FV < min_p_F1 * sorted_FV[:, :1], 0.0)
    sorted_FV = sorted_FV.masked_fill(torch.arange(vocab_size, device=device) >= top_k_F1, 0.0)
    before_FV = sorted_FV.cumsum(-1) - sorted_FV
    is_out_FV = before_FV >= top_p_F1 * sorted_FV.sum(-1, keepdim=True)
    is_out_FV[:, 0] = False
    return torch.zeros_like(probabilities_FV).scatter(-1, order_FV, sorted_FV.masked_fill(is_out_FV, 0.0))


def _invert(probabilities_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The first token whose cumulative probability exceeds the uniform number: ids [B]."""
    cumulative_BV = probabilities_BV.cumsum(-1)
    target_B1 = (uniform_B * cumulative_BV[:, -1])[:, None]
    return torch.searchsorted(cumulative_BV, target_B1, right=True).squeeze(-1)

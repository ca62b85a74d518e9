"""From logits to a token: greedy, temperature, top-k, top-p (Holtzman et al. 2020).

Shapes: B rows, V vocabulary, F the rows that are filtered.

A token is a pure function of (its row of logits, parameters, seed, number of tokens before it). The random number is drawn
from seed and count by a hash, on the side that schedules, and travels with the row: so the choice knows nothing of the
rest of the batch, of pre-emptions or of devices, and no generator has a state to keep.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class RowSampling(NamedTuple):
    """What the choice of one token needs besides its logits."""

    temperature: float
    top_k: int | None
    top_p: float
    uniform: float
    """In [0, 1): where in the cumulative distribution the token lies."""
    num_logprobs: int | None = None
    """Likeliest tokens that are told beside the chosen one; None is nothing at all."""


def draw_uniform(seed: int, num_tokens: int) -> float:
    """A number in [0, 1) with 32 random bits, which float64 holds exactly."""
    digest = hashlib.blake2b(f"{seed}:{num_tokens}".encode(), digest_size=4).digest()
    return int.from_bytes(digest) / 2**32


def sample(logits_BV: Tensor, rows: Sequence[RowSampling]) -> list[int]:
    """Choose a token for each row."""
    if all(row.temperature == 0 for row in rows):
        greedy: list[int] = logits_BV.argmax(-1).tolist()
        return greedy
    temperature_B1 = torch.tensor([row.temperature or 1.0 for row in rows], device=logits_BV.device)[:, None]
    # The largest logit is taken off before the division, which can then not overflow however low the temperature.
    shifted_BV = logits_BV - logits_BV.amax(-1, keepdim=True)
    probabilities_BV = (shifted_BV / temperature_B1).softmax(-1).double()
    filtered = [i for i, row in enumerate(rows) if row.top_k is not None or row.top_p < 1]
    if filtered:
        probabilities_BV[filtered] = _filter(probabilities_BV[filtered], [rows[i] for i in filtered])
    uniform_B = torch.tensor([row.uniform for row in rows], dtype=torch.float64, device=logits_BV.device)
    chosen = _invert(probabilities_BV, uniform_B)
    is_greedy_B = torch.tensor([row.temperature == 0 for row in rows], device=logits_BV.device)
    chosen_ids: list[int] = torch.where(is_greedy_B, logits_BV.argmax(-1), chosen).tolist()
    return chosen_ids


def _filter(probabilities_FV: Tensor, rows: Sequence[RowSampling]) -> Tensor:
    """Set the probability of what top-k and then top-p leave out to 0; the likeliest token always stays."""
    vocab_size, device = probabilities_FV.shape[-1], probabilities_FV.device
    top_k_F1 = torch.tensor([vocab_size if row.top_k is None else min(row.top_k, vocab_size) for row in rows], device=device)[
        :, None
    ]
    top_p_F1 = torch.tensor([row.top_p for row in rows], dtype=torch.float64, device=device)[:, None]
    sorted_FV, order_FV = probabilities_FV.sort(stable=True, dim=-1, descending=True)
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

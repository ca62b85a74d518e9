"""How likely the model held a token and its rivals: log-softmax of its own logits in fp32, before any temperature, penalty or
filter, as in OpenAI's and vLLM's answers.

Shapes: S scored rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

MAX_NUM_TOP = 20


class TokenLogprobs(NamedTuple):
    """One token of a text."""

    token_id: int
    logprob: float
    """Natural logarithm of its probability."""
    top: tuple[tuple[int, float], ...]
    """The likeliest tokens and their logprobs, likeliest first, as many as were asked for; the token may be among them."""

    @classmethod
    def from_wire(cls, value: Any) -> TokenLogprobs:
        token_id, logprob, top = value
        return cls(token_id, logprob, tuple((rival, told) for rival, told in top))


class RowScoring(NamedTuple):
    """A row of a batch after which a known token comes: one of a prompt."""

    row: int
    token_id: int
    num_top: int


def score(logits_SV: Tensor, token_ids: Sequence[int], num_tops: Sequence[int]) -> list[TokenLogprobs]:
    """Score one token for each row, with as many rivals as asked for."""
    logprobs_SV = logits_SV.float().log_softmax(-1)
    ids_S1 = torch.tensor(token_ids, device=logits_SV.device)[:, None]
    own = logprobs_SV.gather(-1, ids_S1).squeeze(-1).tolist()
    top = logprobs_SV.topk(min(max(num_tops), logits_SV.shape[-1]), dim=-1)
    rivals = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return [
        TokenLogprobs(token_id, logprob, tuple(zip(ids[:num_top], values[:num_top], strict=True)))
        for token_id, logprob, (ids, values), num_top in zip(token_ids, own, rivals, num_tops, strict=True)
    ]

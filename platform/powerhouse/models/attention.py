"""Scaled dot-product attention (Vaswani et al. 2017, section 3.2.1), behind one seam.

Shapes: B batch, T query length, S key length, H query heads, K key/value heads (H is a multiple of K), D head width.

A model's forward pass takes an `Attend`: it hands over the new queries, keys and values of a layer and gets the outputs
back. What was before them - nothing, a dense cache, pages - is the callable's business, so training, the reference loop
and the engine run the same model code. The leading axes are the callable's too: [B, T] or the engine's flat [T].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q_*HD, k_*KD, v_*KD) -> o_*HD"""


def dense_attention(q_BTHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, mask_BTS: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(D)) V, line by line: the yardstick for every faster path. True in the mask means "may see"."""
    num_groups = q_BTHD.shape[2] // k_BSKD.shape[2]
    k_BSHD = k_BSKD.repeat_interleave(num_groups, dim=2)
    v_BSHD = v_BSKD.repeat_interleave(num_groups, dim=2)
    scores_BHTS = torch.einsum("bthd,bshd->bhts", q_BTHD, k_BSHD) / q_BTHD.shape[-1] ** 0.5
    scores_BHTS = scores_BHTS.masked_fill(~mask_BTS[:, None], float("-inf"))
    return torch.einsum("bhts,bshd->bthd", scores_BHTS.softmax(dim=-1), v_BSHD)


def causal_attention(layer: int, q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor) -> Tensor:
    """Attend over whole rows from their start with torch's fused kernels: the `Attend` of training.

    The key/value heads are repeated, because no fused kernel takes a group and a causal mask at once on every device.
    """
    num_groups = q_BTHD.shape[2] // k_BTKD.shape[2]
    q_BHTD, k_BHTD, v_BHTD = (
        x.transpose(1, 2) for x in (q_BTHD, *(x.repeat_interleave(num_groups, dim=2) for x in (k_BTKD, v_BTKD)))
    )
    return F.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, is_causal=True).transpose(1, 2)


class DenseCache:
    """Keys and values of all earlier positions of one batch, grown by concatenation: the `Attend` of plain decoding."""

    def __init__(self) -> None:
        self._past: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, layer: int, q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor) -> Tensor:
        if layer in self._past:
            past_k, past_v = self._past[layer]
            k_BTKD, v_BTKD = torch.cat([past_k, k_BTKD], dim=1), torch.cat([past_v, v_BTKD], dim=1)
        self._past[layer] = k_BTKD, v_BTKD
        num_new, num_all = q_BTHD.shape[1], k_BTKD.shape[1]
        mask_TS = torch.ones(num_new, num_all, dtype=torch.bool, device=q_BTHD.device).tril(num_all - num_new)
        return dense_attention(q_BTHD, k_BTKD, v_BTKD, mask_TS.expand(q_BTHD.shape[0], -1, -1))

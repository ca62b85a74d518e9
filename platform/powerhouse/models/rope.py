"""Rotary position embeddings (Su et al. 2021) and the ways to stretch them over longer contexts.

Shapes: * leading axes of the positions, D head width. Halves of a head are rotated, not pairs, as Hugging Face does.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from powerhouse.config import Config


class RopeScaling(Config):
    """How the angles of a model that was trained on a short context are made to serve a longer one."""

    kind: Literal["linear", "dynamic", "llama3"]
    """linear: positions divided by `factor` (Chen et al. 2023). dynamic: a larger base once a pass is longer than
    `original_context` (NTK-aware). llama3: only long wavelengths are stretched (Grattafiori et al. 2024)."""
    factor: float = Field(ge=1)
    """By how much."""
    original_context: int | None = Field(default=None, gt=0)
    """Context of the first training; dynamic and llama3 need it."""
    low_freq_factor: float = Field(default=1.0, gt=0)
    """llama3: wavelengths over original_context / low_freq_factor are stretched in full."""
    high_freq_factor: float = Field(default=4.0, gt=0)
    """llama3: wavelengths under original_context / high_freq_factor stay."""

    @model_validator(mode="after")
    def _complete(self) -> RopeScaling:
        if self.kind != "linear" and self.original_context is None:
            raise ValueError(f"original_context for the kind {self.kind}")
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(f"high_freq_factor over low_freq_factor, not {self.high_freq_factor}, {self.low_freq_factor}")
        return self


def rope_angles(positions: Tensor, head_dim: int, theta: float, scaling: RopeScaling | None = None) -> tuple[Tensor, Tensor]:
    """Cosines and sines [*, D], fp32; those of the first half are minus the sine, as a rotation has it.

    With dynamic scaling the base depends on the longest position of the call, as in transformers: beyond
    `original_context`, decoding in pieces is not the full pass.
    """
    angles = positions[..., None].float() * _frequencies(positions, head_dim, theta, scaling)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def _frequencies(positions: Tensor, head_dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    if scaling is None:
        return theta**-exponents
    if scaling.kind == "dynamic":
        assert scaling.original_context is not None, "validated"
        length = positions.max().clamp(min=scaling.original_context - 1) + 1
        growth = scaling.factor * length / scaling.original_context - (scaling.factor - 1)
        return (theta * growth ** (head_dim / (head_dim - 2))) ** -exponents
    if scaling.kind == "linear":
        return theta**-exponents / scaling.factor
    return _stretch_long_waves(theta**-exponents, scaling)


def _stretch_long_waves(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Divide low frequencies by the factor, keep high ones, and go over from one to the other in between."""
    assert scaling.original_context is not None, "validated"
    turns = scaling.original_context * frequencies / (2 * math.pi)  # full turns within the original context
    share = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    share = share.clamp(0.0, 1.0)
    return (1 - share) * frequencies / scaling.factor + share * frequencies

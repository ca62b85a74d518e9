"""What every family gives to training, to the hub and to the engine."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from powerhouse.config import Config

Finish = Callable[[Tensor], Tensor]
"""What `forward` makes of the last hidden states [*, C] in place of the logits that `project` gives: their loss, say."""


class ModelConfig(Config):
    """The shape of a model: a mapping of its settings, or the name of one of the family's sizes."""

    SIZES: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    vocab_size: int = Field(gt=0)
    """Number of token ids."""
    initializer_range: float = Field(default=0.02, gt=0)
    """Standard deviation of fresh weights."""

    @model_validator(mode="before")
    @classmethod
    def _look_up_size(cls, values: Any) -> Any:
        if not isinstance(values, str):
            return values
        if values not in cls.SIZES:
            raise ValueError(f"one of {', '.join(sorted(cls.SIZES))}, or a mapping")
        return dict(cls.SIZES[values])


class Model(nn.Module):
    """A transformer that knows no rank, no mesh and no file."""

    config: Any

    def blocks(self) -> dict[str, nn.Module]:
        """The blocks by their number: the units that sharding, checkpointing and compilation wrap."""
        raise NotImplementedError

    def project(self, x: Tensor) -> Tensor:
        """The model's head: the last hidden states [*, C] to fp32 logits [*, V], each on its own."""
        raise NotImplementedError

    def tie_weights(self) -> None:
        """Make tied matrices one parameter again; called after weights are assigned."""

    def tied_names(self) -> dict[str, str]:
        """Parameters that are another one: their name -> the name under which a checkpoint has them."""
        return {}

    def initial_std(self, name: str) -> float:
        """Standard deviation of a fresh matrix."""
        std: float = self.config.initializer_range
        return std

    def initialise(self, seed: int) -> None:
        """Fill every parameter from a generator seeded by (seed, its name): the same for any slicing or sharding."""
        for name, parameter in self.named_parameters():
            fill_parameter(parameter.data, name, seed, self.initial_std(name))

    def fresh_parameter(self, name: str, seed: int) -> Tensor:
        """What `initialise` gives the parameter, in float32 on the CPU; the model itself may be on the meta device."""
        data = torch.empty(self.get_parameter(name).shape, device="cpu")
        fill_parameter(data, name, seed, self.initial_std(name))
        return data


def fill_parameter(data: Tensor, name: str, seed: int, std: float) -> None:
    """Biases become zeros, norms ones, matrices normal(0, std)."""
    if data.dim() == 1:
        data.fill_(0.0 if name.endswith("bias") else 1.0)
        return
    data.copy_(torch.empty(data.shape).normal_(0.0, std, generator=make_generator(seed, name)))


def make_generator(seed: int, name: str) -> torch.Generator:
    return torch.Generator().manual_seed(seed << 32 | zlib.crc32(name.encode()))


def token_loss(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Sum of the cross-entropy in nats over the labels that are not -100."""
    return F.cross_entropy(logits_BTV.flatten(0, -2), labels_BT.flatten(), ignore_index=-100, reduction="sum")

"""What is trained beside a frozen model, put into it from outside: LoRA and prompt tuning.

Shapes: * leading axes, R rank, I and O a linear layer's width in and out, K tokens of a soft prompt, C model width, V
vocabulary.

A soft prompt is K more tokens of the vocabulary, V .. V + K - 1, that stand before a text and that the model cannot write. So
masks, positions, caches and packed rows know nothing of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from powerhouse.config import Config
from powerhouse.errors import ConfigError
from powerhouse.models.classic import Classic
from powerhouse.models.layers import Embedding, Linear
from powerhouse.models.model import Model, make_generator

LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The projections of a block, in every family: those of attention, and of the feed-forward (gate only where it has one)."""


class AdapterConfig(Config):
    """What is trained beside a frozen model: `kind` lora or prompt."""

    kind: str
    """lora: low-rank changes of linear layers. prompt: vectors before the text."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decay of what is trained, in place of `optim.weight_decay`: it would pull a soft prompt away from the vocabulary."""


class LoRAConfig(AdapterConfig):
    """W + (alpha / rank) B A in place of W (Hu et al. 2022, section 4.1)."""

    kind: Literal["lora"] = "lora"
    """Low-rank changes of linear layers."""
    rank: int = Field(default=16, gt=0)
    """Width R between A and B."""
    alpha: float = Field(default=32.0, gt=0)
    """Strength of the change: B A is times alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of A's inputs that are zero in training."""
    targets: tuple[str, ...] = Field(default=LINEAR_LAYERS, min_length=1)
    """Linear layers that are changed, by their name or its last parts: q_proj, layers.0.mlp.up_proj."""
    merges: bool = False
    """Also write the changed model itself, as the model directory `merged` in the output."""

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class PromptConfig(AdapterConfig):
    """Prompt tuning (Lester et al. 2021, section 2)."""

    kind: Literal["prompt"] = "prompt"
    """Vectors before the text."""
    num_tokens: int = Field(default=20, gt=0)
    """Vectors K."""
    text: str | None = Field(default=None, min_length=1)
    """They begin as the embeddings of this text, repeated or cut to their number; without one, as those of tokens drawn from
    the commonest (section 3.2)."""
    num_common: int = Field(default=5000, gt=0)
    """Commonest tokens of the training rows to draw from."""


def make_adapter_config(value: Any) -> Any:
    """The typed settings out of a config's `adapter`."""
    kinds: dict[str, type[AdapterConfig]] = {"lora": LoRAConfig, "prompt": PromptConfig}
    if not isinstance(value, Mapping):
        return value
    if value.get("kind") not in kinds:
        raise ValueError(f"a kind of {', '.join(kinds)}")
    return kinds[value["kind"]].model_validate(value)


@dataclass(frozen=True)
class Adapter:
    """Named tensors, and how a model uses them; the names are those of the model's parameters."""

    config: AdapterConfig
    tensors: Mapping[str, Tensor]

    def put_into(self, model: Model) -> None:
        """Add the adapter to a whole model that has none."""
        add_adapter(model, self.config)
        parameters = adapter_parameters(model)
        assert parameters.keys() == self.tensors.keys(), "an adapter's config names its tensors"
        for name, parameter in parameters.items():
            parameter.data.copy_(self.tensors[name])


class LoRALinear(Linear):
    """A linear layer x W^T + b with its change: + scale (x A^T) B^T. The layer's own parameters stay the same objects."""

    def __init__(self, base: nn.Linear, rank: int, scale: float, dropout: float) -> None:
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.lora_A = nn.Parameter(base.weight.new_empty(rank, base.in_features))
        self.lora_B = nn.Parameter(base.weight.new_empty(base.out_features, rank))
        self.scale, self.dropout = scale, dropout
        self._unmerged: tuple[Tensor, ...] = ()  # W, while `weight` is the merged one

    def forward(self, x: Tensor) -> Tensor:
        out = F.linear(x, self.weight, self.bias)
        if self._unmerged:
            return out
        hidden = F.linear(F.dropout(x, self.dropout, self.training), self.lora_A)
        return out + F.linear(hidden, self.lora_B) * self.scale

    def merge(self) -> None:
        """Put W + scale B A in W's place; W itself is kept."""
        assert not self._unmerged, "merged already"
        self._unmerged = (self.weight,)
        with torch.no_grad():
            change_OI = self.lora_B.float() @ self.lora_A.float() * self.scale
            self.weight = nn.Parameter((self.weight.float() + change_OI).to(self.weight.dtype), requires_grad=False)

    def unmerge(self) -> None:
        """Put W back, to the bit."""
        assert self._unmerged, "not merged"
        [self.weight], self._unmerged = self._unmerged, ()


class PromptedEmbedding(Embedding):
    """A table of V tokens, and of K more that are trained. The table stays the same object."""

    def __init__(self, base: nn.Embedding, num_tokens: int) -> None:
        super().__init__(base.num_embeddings, base.embedding_dim, device="meta")
        self.weight = base.weight
        self.prompt = nn.Parameter(base.weight.new_empty(num_tokens, base.embedding_dim))

    def forward(self, ids: Tensor) -> Tensor:
        is_prompt = ids >= self.num_embeddings
        prompt = F.embedding((ids - self.num_embeddings).clamp(min=0), self.prompt)
        return torch.where(is_prompt.unsqueeze(-1), prompt, F.embedding(ids.masked_fill(is_prompt, 0), self.weight))


def add_adapter(model: Model, config: AdapterConfig) -> None:
    """Freeze the model and give it the adapter's parameters, not filled yet; to be called before it is sharded.

    Raises:
        ConfigError: the model has none of the layers to change, or its family takes no soft prompt.
    """
    model.requires_grad_(False)
    if isinstance(config, LoRAConfig):
        for name, layer in _targets(model, config.targets).items():
            _replace(model, name, LoRALinear(layer, config.rank, config.scale, config.dropout))
        return
    assert isinstance(config, PromptConfig), "there are two kinds"
    if isinstance(model, Classic):
        raise ConfigError("adapter.kind: this family takes no soft prompt", got=type(model).__name__, allowed="lora")
    [(name, embedding)] = [item for item in model.named_modules() if _is_named(item[0], "embed_tokens")]
    assert isinstance(embedding, nn.Embedding), "every family's table of tokens has this name"
    _replace(model, name, PromptedEmbedding(embedding, config.num_tokens))


def _targets(model: Model, targets: Sequence[str]) -> dict[str, nn.Linear]:
    """The linear layers with these names; a target that is one of the families' but not this one's is left out."""
    tied = {name.removesuffix(".weight") for name in model.tied_names()}  # a change of these would also be one of their twin
    linear = {name: item for name, item in model.named_modules() if isinstance(item, nn.Linear) and name not in tied}
    found = {target: {name: item for name, item in linear.items() if _is_named(name, target)} for target in targets}
    missing = [target for target, layers in found.items() if not layers and target not in LINEAR_LAYERS]
    if missing or not any(found.values()):
        allowed = sorted({name.rpartition(".")[2] for name in linear})
        raise ConfigError(
            "adapter.targets: the model has no such linear layer of its own", got=list(missing or targets), allowed=allowed
        )
    return {name: layer for layers in found.values() for name, layer in layers.items()}


def _is_named(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module.train(model.training))


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What the adapter added, by name."""
    ends = (".lora_A", ".lora_B", "embed_tokens.prompt")
    return {name: parameter for name, parameter in model.named_parameters() if name.endswith(ends)}


def fresh_tensors(model: Model, seed: int, prompt_KC: Tensor | None = None) -> dict[str, Tensor]:
    """What the adapter's parameters begin with, in float32; the model itself may be on the meta device.

    LoRA's A is uniform within PyTorch's own bounds for a linear layer and B zero, so the model still computes what it did. As
    with fresh models, a draw depends on (seed, name) alone. A soft prompt begins as what is given.
    """
    tensors = {}
    for name, parameter in adapter_parameters(model).items():
        data = torch.zeros(parameter.shape)
        if name.endswith("lora_A"):
            bound = 1 / math.sqrt(parameter.shape[1])
            data.uniform_(-bound, bound, generator=make_generator(seed, name))
        elif name.endswith("prompt"):
            assert prompt_KC is not None, "a soft prompt begins as something"
            data.copy_(prompt_KC)
        tensors[name] = data
    return tensors


def soft_prompt_of(model: nn.Module) -> list[int]:
    """Ids that stand before every text that the model reads; none without a soft prompt."""
    for module in model.modules():
        if isinstance(module, PromptedEmbedding):
            return list(range(module.num_embeddings, module.num_embeddings + len(module.prompt)))
    return []


def merge(model: nn.Module) -> None:
    """Put every LoRA change into its layer's matrix: the same outputs, at the speed of the model alone."""
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.merge()


def unmerge(model: nn.Module) -> None:
    """Take every LoRA change out again, to the bit."""
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.unmerge()

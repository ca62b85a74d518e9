"""LoRA changes and soft prompts beside one base model, mixed in one batch.

A request's LoRA is added to the rows of its own tokens, as in S-LoRA (Sheng et al. 2024) without its kernels: one small product
for each LoRA in the batch. Soft prompts are more tokens of the vocabulary, V and up, one range for each.

Shapes: T tokens of a batch, M of them with one adapter, R ranks of an adapter's layers side by side, I and O a layer's width
in and out, K tokens of a soft prompt, C model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from powerhouse.engine.batch import ForwardBatch
from powerhouse.engine.fused import FusedDecoder
from powerhouse.errors import ConfigError, ModelFormatError, RequestError
from powerhouse.models.adapters import Adapter, LoRAConfig, PromptedEmbedding
from powerhouse.models.decoder import Decoder, DecoderConfig
from powerhouse.models.hub import open_checkpoint
from powerhouse.models.hugging_face.adapter import CONFIG, load_adapter
from powerhouse.models.weights import read_json

_FUSED = {
    "qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o_proj": ("self_attn.o_proj",),
    "gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "down_proj": ("mlp.down_proj",),
}
"""A stage's products, and the model's layers in each."""


@dataclass(frozen=True)
class Chosen:
    """What a request takes along of its adapter."""

    index: int = 0
    """Place among the engine's adapters, from 1; 0 is none."""
    soft_ids: tuple[int, ...] = ()
    """Tokens that stand before its prompt."""


class AdapterTable:
    """The names of an engine's adapters, and what a request must know of each.

    Raises:
        ModelFormatError: an adapter's directory is missing or damaged.
    """

    def __init__(self, paths: Mapping[str, Path], vocab_size: int) -> None:
        self._chosen: dict[str | None, Chosen] = {None: Chosen()}
        for index, (name, path) in enumerate(paths.items(), start=1):
            num_soft = _num_soft(path)
            self._chosen[name] = Chosen(index, tuple(range(vocab_size, vocab_size + num_soft)))
            vocab_size += num_soft

    def choose(self, name: str | None) -> Chosen:
        """Raises:
        RequestError: there is no such adapter.
        """
        if name not in self._chosen:
            allowed = ", ".join(known for known in self._chosen if known) or "none: the engine has no adapters"
            raise RequestError("no such adapter", got=name, allowed=allowed)
        return self._chosen[name]

    @property
    def num_soft_tokens(self) -> dict[str, int]:
        """Of each adapter by its name, how many tokens stand before a prompt; 0 for a LoRA."""
        return {name: len(chosen.soft_ids) for name, chosen in self._chosen.items() if name is not None}

    @property
    def has_soft_prompts(self) -> bool:
        return any(self.num_soft_tokens.values())


def _num_soft(path: Path) -> int:
    if not (path / CONFIG).is_file():
        raise ModelFormatError(f"{path / CONFIG}: missing", do="give a directory with an adapter in peft's format")
    values = read_json(path / CONFIG)
    return int(values.get("num_virtual_tokens", 0)) if values.get("peft_type") == "PROMPT_TUNING" else 0


def load_adapters(model: Path, paths: Sequence[Path]) -> list[Adapter]:
    """Read adapters for the model in a directory, of which only its config is looked at.

    Raises:
        ModelFormatError: a file is missing or damaged, or an adapter belongs to another model.
    """
    checkpoint = open_checkpoint(model)
    assert isinstance(checkpoint.config, DecoderConfig), "the engine's models are decoders"
    with torch.device("meta"):
        whole = Decoder(checkpoint.config)
    return [load_adapter(path, checkpoint.format, whole) for path in paths]


class AdaptedLinear(nn.Module):
    """A product with, for the rows of each LoRA in the batch, that LoRA's change."""

    def __init__(self, base: nn.Module, rows: Mapping[int, Tensor]) -> None:
        super().__init__()
        self.base = base
        self.changes: dict[int, tuple[Tensor, Tensor]] = {}
        """A [R, I] and B [O, R] of each adapter that has some here."""
        self._rows = rows

    def forward(self, x_TI: Tensor) -> Tensor:
        out_TO: Tensor = self.base(x_TI)
        for index, rows_M in self._rows.items():
            if index in self.changes:
                a_RI, b_OR = self.changes[index]
                out_TO.index_add_(0, rows_M, F.linear(F.linear(x_TI[rows_M], a_RI), b_OR).to(out_TO.dtype))
        return out_TO


class AdaptedStage:
    """Puts adapters into a stage's layers, and tells these before each batch whose tokens are whose."""

    def __init__(self, decoder: FusedDecoder, adapters: Sequence[Adapter]) -> None:
        self._rows: dict[int, Tensor] = {}
        self._decoder = decoder
        self._device = next(decoder.parameters()).device
        prompts: list[Tensor] = []
        for index, adapter in enumerate(adapters, start=1):
            if isinstance(adapter.config, LoRAConfig):
                self._change(index, adapter, adapter.config.scale)
            else:
                prompts += adapter.tensors.values()
        if prompts and decoder.is_first:
            table = decoder.embed_tokens
            decoder.embed_tokens = PromptedEmbedding(table, sum(len(prompt_KC) for prompt_KC in prompts))
            prompt_KC = torch.cat(prompts).to(table.weight.device, table.weight.dtype)
            decoder.embed_tokens.prompt = nn.Parameter(prompt_KC, requires_grad=False)

    def select(self, batch: ForwardBatch) -> None:
        starts = [0, *accumulate(batch.query_lengths)]
        rows: dict[int, list[int]] = {}
        for i, index in enumerate(batch.adapters):
            if index:
                rows.setdefault(index, []).extend(range(starts[i], starts[i + 1]))
        self._rows.clear()
        self._rows.update({index: torch.tensor(places, device=self._device) for index, places in rows.items()})

    def _change(self, index: int, adapter: Adapter, scale: float) -> None:
        widths = _widths(self._decoder.config)
        if foreign := [name for name in adapter.tensors if not name.rpartition(".lora_")[0].endswith(tuple(widths))]:
            raise ConfigError("adapters: only projections of blocks are changed here", got=foreign[0], allowed=list(widths))
        for number, block in self._decoder.blocks.items():
            for fused, layers in _FUSED.items():
                names = {layer: f"model.layers.{number}.{layer}" for layer in layers}
                if any(f"{name}.lora_A" in adapter.tensors for name in names.values()):
                    base = getattr(block, fused)
                    if not isinstance(base, AdaptedLinear):
                        base = AdaptedLinear(base, self._rows)
                        setattr(block, fused, base)
                    base.changes[index] = self._side_by_side(adapter, names, widths, scale)

    def _side_by_side(
        self, adapter: Adapter, names: Mapping[str, str], widths: Mapping[str, int], scale: float
    ) -> tuple[Tensor, Tensor]:
        """A of the layers one below the other, and B of each in its own rows and columns; zero for a layer without."""
        a_parts, b_parts = [], []
        for layer, name in names.items():
            a_RI, b_OR = (adapter.tensors.get(f"{name}.{part}") for part in ("lora_A", "lora_B"))
            if a_RI is not None and b_OR is not None:
                a_parts.append(a_RI)
                b_parts.append(b_OR * scale)
            else:
                b_parts.append(torch.zeros(widths[layer], 0))
        dtype = self._decoder.dtype
        return torch.cat(a_parts).to(self._device, dtype), _diagonal(b_parts).to(self._device, dtype)


def _diagonal(parts: Sequence[Tensor]) -> Tensor:
    joined: Tensor = torch.block_diag(*parts)  # type: ignore[no-untyped-call]
    return joined


def _widths(config: DecoderConfig) -> dict[str, int]:
    """How many outputs each layer of a block has."""
    queries, keys = (num * config.head_dim for num in (config.num_attention_heads, config.num_key_value_heads))
    attention = {"self_attn.q_proj": queries, "self_attn.k_proj": keys, "self_attn.v_proj": keys}
    hidden = dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), config.intermediate_size)
    return attention | hidden | dict.fromkeys(("self_attn.o_proj", "mlp.down_proj"), config.hidden_size)

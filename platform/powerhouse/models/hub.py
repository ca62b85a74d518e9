"""Models out of and into directories as Hugging Face lays them out, and out of GGUF files.

What is written here, `transformers.AutoModel...from_pretrained` loads, and the other way round. Never a pickle.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from powerhouse.config import validate
from powerhouse.errors import ConfigError, ModelFormatError
from powerhouse.models.decoder import Decoder, DecoderConfig
from powerhouse.models.gguf import GGUFWeights
from powerhouse.models.hugging_face import FORMATS
from powerhouse.models.hugging_face.adapter import load_adapter
from powerhouse.models.hugging_face.format import Format
from powerhouse.models.model import Model, ModelConfig
from powerhouse.models.weights import WEIGHTS, SafetensorsWeights, Weights, read_json, write_float32


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk: what it is, and where its tensors are."""

    format: Format
    config: ModelConfig
    weights: Weights
    path: Path

    def names(self) -> dict[str, str]:
        """Every parameter and buffer of the whole model -> its name in the checkpoint."""
        model = self.build()
        tied = model.tied_names()
        return {name: self.format.name(tied.get(name, name), self.config) for name in model.state_dict()}

    def build(self, layers: range | None = None) -> Model:
        """The model, or a slice of a decoder, on the meta device."""
        with torch.device("meta"):
            if layers is None:
                return self.format.model_class(self.config)
            assert isinstance(self.config, DecoderConfig), "only a decoder is cut into slices"
            return Decoder(self.config, layers)

    def load(self, device: torch.device | str, dtype: torch.dtype | None, layers: range | None = None) -> Model:
        """Build on the meta device and assign only the tensors that are held."""
        model, names = self.build(layers), self.names()
        wanted = {name: names[name] for name in model.state_dict()}
        read = {theirs: self.weights.read(theirs, dtype).to(device) for theirs in dict.fromkeys(wanted.values())}
        model.load_state_dict({name: read[theirs] for name, theirs in wanted.items()}, assign=True)
        model.tie_weights()
        return model.eval()


def open_checkpoint(path: Path) -> Checkpoint:
    """Read the settings and the headers of a Hugging Face directory or a GGUF file, and hold them against each other.

    Raises:
        ModelFormatError: a file is missing, damaged or truncated, the architecture or an option is not supported, or a
            tensor is missing, of another shape than the settings say, or has no place in the model.
    """
    if path.suffix == ".gguf":
        gguf = GGUFWeights(path)
        return _checkpoint(path, gguf.config(), gguf)
    if not path.is_dir():
        raise ModelFormatError(f"{path}: no such model directory", do="give a directory with config.json, or a .gguf file")
    values = read_json(path / "config.json")
    _format(path, values)  # an unknown architecture is told before its weights are looked for
    return _checkpoint(path, values, SafetensorsWeights(path))


def _format(path: Path, values: Mapping[str, Any]) -> Format:
    name = values.get("model_type")
    if name not in FORMATS:
        raise ModelFormatError(f"{path}: unknown architecture", got=name, allowed=", ".join(sorted(FORMATS)))
    return FORMATS[name]


def _checkpoint(path: Path, values: Mapping[str, Any], weights: Weights) -> Checkpoint:
    config = _read_config(path, values, weights.shapes())
    checkpoint = Checkpoint(_format(path, values), config, weights, path)
    _check_tensors(checkpoint)
    return checkpoint


def _read_config(path: Path, values: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> ModelConfig:
    form = _format(path, values)
    try:
        return validate(form.config_class, form.read(values, shapes), f"{path} (config.json)")
    except ModelFormatError as error:
        raise ModelFormatError(f"{path}: {error}") from None
    except ConfigError as error:
        raise ModelFormatError(str(error)) from None


def _check_tensors(checkpoint: Checkpoint) -> None:
    """Every tensor of the model is there in its shape, and none is left over that might have changed what it computes."""
    shapes, names = checkpoint.weights.shapes(), checkpoint.names()
    for name, tensor in checkpoint.build().state_dict().items():
        theirs = names[name]
        if theirs not in shapes:
            do = "fetch or export the model again"
            raise ModelFormatError(f"{checkpoint.path}: tensor {theirs} is missing", do=do)
        if shapes[theirs] != tuple(tensor.shape):
            what = f"{checkpoint.path}: {theirs} has the wrong shape"
            raise ModelFormatError(what, got=shapes[theirs], allowed=f"{tuple(tensor.shape)}, as config.json says")
    for theirs in sorted(set(shapes) - set(names.values())):
        if not checkpoint.format.is_ignored(theirs, checkpoint.config):
            what = f"{checkpoint.path}: tensor {theirs} has no place in a {type(checkpoint.config).__name__}"
            raise ModelFormatError(what, do="correct config.json, or use a model of a supported kind")


def load_model(
    path: Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.float32,
    layers: range | None = None,
    adapter: Path | None = None,
) -> Model:
    """Build the model, or a slice of a decoder's layers, on the meta device and assign only the tensors it holds.

    With a `dtype` of None, or the stored one, a safetensors tensor on the CPU is its memory-mapped file: no second copy. An
    `adapter` is a directory in peft's format, and is put into a whole model.

    Raises:
        ModelFormatError: as `open_checkpoint` does, or the adapter is damaged or belongs to another model.
    """
    assert adapter is None or layers is None, "an adapter goes into a whole model"
    checkpoint = open_checkpoint(path)
    model = checkpoint.load(device, dtype, layers)
    if adapter is not None:
        load_adapter(adapter, checkpoint.format, model).put_into(model)
    return model


def load_decoder(
    path: Path,
    *,
    layers: range | None = None,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
) -> Decoder:
    """Load a model that must be a decoder.

    Raises:
        ModelFormatError: it is another kind, or as `open_checkpoint` does.
    """
    checkpoint = open_checkpoint(path)
    _decoder_config(checkpoint)
    model = checkpoint.load(device, dtype, layers)
    assert isinstance(model, Decoder), "a decoder's config builds a decoder"
    return model


def read_config(path: Path) -> DecoderConfig:
    """Read the settings of a decoder.

    Raises:
        ModelFormatError: it is another kind of model, or as `open_checkpoint` does.
    """
    return _decoder_config(open_checkpoint(path))


def _decoder_config(checkpoint: Checkpoint) -> DecoderConfig:
    config = checkpoint.config
    if not isinstance(config, DecoderConfig):
        what = f"{checkpoint.path}: not a decoder"
        raise ModelFormatError(what, got=type(config).__name__, allowed="llama, mistral, qwen2, qwen3")
    return config


def save_model(directory: Path, config: ModelConfig, state: Mapping[str, Tensor], *, writes: bool = True) -> None:
    """Write the directory, weights in fp32 and tied copies left out; transformers loads it.

    Tensors are taken out of `state` one by one, in an order of their own. Without `writes` they are only taken: where that is a
    collective, every rank calls this and one writes.

    Raises:
        ModelFormatError: Hugging Face has no model of this shape.
    """
    form = format_of(config)
    values = form.write(config)
    with torch.device("meta"):
        model = form.model_class(config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items() if name not in model.tied_names()}
    names = {form.name(name, config): name for name in shapes}
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / WEIGHTS if writes else None
    write_float32(path, {theirs: shapes[name] for theirs, name in names.items()}, lambda theirs: state[names[theirs]])
    if not writes:
        return
    _write_json(directory / "config.json", values)
    answering: dict[str, Any] = {name: values[name] for name in ("decoder_start_token_id", "eos_token_id") if name in values}
    _write_json(directory / "generation_config.json", {"_from_model_config": True, **answering})


def format_of(config: ModelConfig) -> Format:
    """How Hugging Face writes a model of this shape down."""
    return next(item for item in FORMATS.values() if _writes(item, config))


def _writes(form: Format, config: ModelConfig) -> bool:
    return type(config) is form.config_class and getattr(form, "architecture", None) == getattr(config, "architecture", None)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

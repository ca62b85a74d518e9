"""Model directories as Hugging Face lays them out: config.json, model.safetensors (or shards with an index), tokenizer.json.

What is written here, `transformers.AutoModelForCausalLM.from_pretrained` loads, and the other way round. Never a pickle.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from powerhouse.config import validate
from powerhouse.errors import ConfigError, ModelFormatError
from powerhouse.models.decoder import Decoder, DecoderConfig, to_hugging_face

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

# Settings of a llama's config.json whose other values would need code that is not here: refused, never approximated.
_REQUIRED = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "pretraining_tp": 1}


def read_config(directory: Path) -> DecoderConfig:
    """Read `config.json`.

    Raises:
        ModelFormatError: the directory or the file is missing or damaged, or asks for what is not supported.
    """
    if not directory.is_dir():
        raise ModelFormatError(f"{directory}: no such model directory", do="give a directory with config.json")
    values = _read_json(directory / "config.json")
    if values.get("model_type") != "llama":
        raise ModelFormatError(
            f"{directory / 'config.json'}: unknown architecture", got=values.get("model_type"), allowed="llama"
        )
    rope = values.get("rope_parameters") or {}
    for group in (rope, values.get("rope_scaling") or {}):
        if (rope_type := group.get("rope_type", group.get("type", "default"))) != "default":
            raise ModelFormatError(f"{directory}: unsupported rope scaling", got=rope_type, allowed="default")
    for name, wanted in _REQUIRED.items():
        if values.get(name, wanted) != wanted:
            raise ModelFormatError(f"{directory / 'config.json'}: {name} is not supported", got=values[name], allowed=wanted)
    return _to_config(values, rope, directory / "config.json")


def _to_config(values: dict[str, Any], rope: dict[str, Any], source: Path) -> DecoderConfig:
    heads = values.get("num_attention_heads", 1)
    defaults = {
        "num_key_value_heads": heads,
        "head_dim": values.get("hidden_size", 0) // max(heads, 1),
        "rope_theta": rope.get("rope_theta", 10_000.0),
        "tie_word_embeddings": False,
    }
    known = {name: value for name, value in values.items() if name in DecoderConfig.model_fields and value is not None}
    try:
        return validate(DecoderConfig, {**defaults, **known}, str(source))
    except ConfigError as error:
        raise ModelFormatError(str(error)) from None


def load_decoder(
    directory: Path,
    *,
    layers: range | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Decoder:
    """Build the decoder, or a slice of its layers, on the meta device and assign only the tensors it holds.

    Raises:
        ModelFormatError: a file or a tensor is missing, truncated or of another shape than the config says.
    """
    config = read_config(directory)
    with torch.device("meta"):
        model = Decoder(config, layers)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    state = _read_tensors(directory, config, wanted, dtype, torch.device(device))
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    return model.eval()


def check_model(directory: Path) -> None:
    """Make sure, by reading no more than headers, that `load_decoder` will find all that it needs.

    Raises:
        ModelFormatError: as `load_decoder` does.
    """
    config = read_config(directory)
    with torch.device("meta"):
        model = Decoder(config)
    _locate(directory, config, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})


def _read_tensors(
    directory: Path,
    config: DecoderConfig,
    wanted: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Tensor]:
    places = _locate(directory, config, wanted)
    return {name: _read_tensor(path, source, device).to(dtype) for name, (path, source) in places.items()}


def _locate(directory: Path, config: DecoderConfig, wanted: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[Path, str]]:
    """Find each tensor's file and its name there; its shape stands in the file's header."""
    files = _weight_files(directory)
    places = {}
    for name, shape in wanted.items():
        source = name
        if name == "lm_head.weight" and config.tie_word_embeddings:
            source = "model.embed_tokens.weight"
        if source not in files:
            raise ModelFormatError(f"{directory}: tensor {source} is missing", do="fetch or export the model again")
        with _open(files[source]) as file:
            found = tuple(file.get_slice(source).get_shape())
        if found != shape:
            raise ModelFormatError(f"{directory}: {source} has the wrong shape", got=found, allowed=shape)
        places[name] = files[source], source
    return places


def _weight_files(directory: Path) -> dict[str, Path]:
    """Tensor name -> the safetensors file that holds it."""
    if (directory / INDEX).is_file():
        weight_map = _read_json(directory / INDEX).get("weight_map", {})
        return {name: directory / file for name, file in weight_map.items()}
    path = directory / WEIGHTS
    if not path.is_file():
        pickles = sorted(item.name for item in directory.glob("*.bin")) + sorted(item.name for item in directory.glob("*.pt"))
        got = f"{', '.join(pickles)} (a pickle can run code when it is opened)" if pickles else None
        raise ModelFormatError(f"{directory}: no {WEIGHTS}", got=got, allowed=f"{WEIGHTS} or {INDEX}")
    with _open(path) as file:
        return dict.fromkeys(file.keys(), path)


def _read_tensor(path: Path, name: str, device: torch.device) -> Tensor:
    with _open(path, device) as file:
        tensor: Tensor = file.get_tensor(name)
        return tensor


def _open(path: Path, device: torch.device | None = None) -> Any:
    try:
        return safe_open(path, framework="pt", device=str(device or "cpu"))
    except FileNotFoundError:
        raise ModelFormatError(f"{path}: missing, though the index names it", do="fetch the model again") from None
    except SafetensorError as error:
        raise ModelFormatError(f"{path}: damaged or truncated", got=error, do="fetch or export the model again") from None


def save_decoder(directory: Path, config: DecoderConfig, state: Mapping[str, Tensor]) -> None:
    """Write the directory, weights in fp32 and a tied head left out; transformers loads it."""
    directory.mkdir(parents=True, exist_ok=True)
    is_tied = config.tie_word_embeddings
    tensors = {
        name: tensor.detach().to("cpu", torch.float32).contiguous()
        for name, tensor in state.items()
        if not (is_tied and name == "lm_head.weight")
    }
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    _write_json(directory / "config.json", to_hugging_face(config))
    _write_json(directory / "generation_config.json", {"_from_model_config": True})


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelFormatError(f"{path}: missing", do="give a Hugging Face model directory") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelFormatError(f"{path}: damaged", got=error, do="fetch or export the model again") from None
    if not isinstance(values, dict):
        raise ModelFormatError(f"{path}: damaged", got=type(values).__name__, allowed="a JSON object")
    return values

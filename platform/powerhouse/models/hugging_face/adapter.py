"""Adapters on disk, as peft lays them out: adapter_config.json and adapter_model.safetensors.

What is written here, `peft.PeftModel.from_pretrained` loads on the model in transformers, and the other way round.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from powerhouse.config import validate
from powerhouse.errors import ConfigError, ModelFormatError
from powerhouse.models.adapters import Adapter, LoRAConfig, PromptConfig
from powerhouse.models.decoder import DecoderConfig
from powerhouse.models.encoder_decoder import T5Config
from powerhouse.models.hugging_face.format import Format, require
from powerhouse.models.model import Model, ModelConfig
from powerhouse.models.weights import open_safetensors, read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PROMPT = "prompt_embeddings"
_TASKS: dict[type[ModelConfig], str] = {DecoderConfig: "CAUSAL_LM", T5Config: "SEQ_2_SEQ_LM"}
_PLAIN_LORA = {
    "bias": "none",
    "fan_in_fan_out": False,
    "use_dora": False,
    "lora_bias": False,
    "modules_to_save": None,
    "trainable_token_indices": None,
    "rank_pattern": {},
    "alpha_pattern": {},
}


def save_adapter(directory: Path, adapter: Adapter, form: Format, shape: ModelConfig, base: Path) -> None:
    """Write the two files, in fp32; `base` is where the model lies that the adapter belongs to."""
    names = _names(adapter.tensors, form, shape)
    tensors = {names[name]: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in adapter.tensors.items()}
    write = _write_lora if isinstance(adapter.config, LoRAConfig) else _write_prompt
    values = {
        "base_model_name_or_path": str(base),
        "inference_mode": True,
        "task_type": _TASKS.get(type(shape), "FEATURE_EXTRACTION"),
        **write(adapter, names, shape),
    }
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    (directory / CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _write_lora(adapter: Adapter, names: Mapping[str, str], shape: ModelConfig) -> dict[str, Any]:
    config = adapter.config
    assert isinstance(config, LoRAConfig), "of this kind"
    layers = {ours.rpartition(".")[0]: theirs.removeprefix(_PREFIX).rpartition(".lora_")[0] for ours, theirs in names.items()}
    last = {theirs.rpartition(".")[2] for theirs in layers.values()}
    is_short = set(config.targets) >= last  # a name's last part means the same layers there
    return {
        "peft_type": "LORA",
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": sorted(last if is_short else layers.values()),
        **_PLAIN_LORA,
    }


def _write_prompt(adapter: Adapter, names: Mapping[str, str], shape: ModelConfig) -> dict[str, Any]:
    [prompt_KC] = adapter.tensors.values()
    values = shape.model_dump()
    return {
        "peft_type": "PROMPT_TUNING",
        "prompt_tuning_init": "RANDOM",  # of a prompt that would be trained anew
        "num_virtual_tokens": prompt_KC.shape[0],
        "token_dim": prompt_KC.shape[1],
        "num_transformer_submodules": 1,
        "num_attention_heads": values["num_attention_heads"],
        "num_layers": values.get("num_hidden_layers", values.get("num_encoder_layers")),
    }


def _names(tensors: Iterable[str], form: Format, shape: ModelConfig) -> dict[str, str]:
    """Each tensor's name -> the name that peft gives it."""
    names = {}
    for ours in tensors:
        layer, _, part = ours.rpartition(".")
        theirs = form.name(f"{layer}.weight", shape).removesuffix(".weight")
        names[ours] = _PROMPT if part == "prompt" else f"{_PREFIX}{theirs}.{part}.weight"
    return names


def load_adapter(directory: Path, form: Format, model: Model) -> Adapter:
    """Read an adapter for this model.

    Raises:
        ModelFormatError: a file is missing or damaged, the adapter is of another kind, or belongs to another model.
    """
    values = read_json(directory / CONFIG)
    kind = values.get("peft_type")
    if kind not in ("LORA", "PROMPT_TUNING"):
        raise ModelFormatError(f"{directory / CONFIG}: unknown kind of adapter", got=kind, allowed="LORA, PROMPT_TUNING")
    if not (directory / WEIGHTS).is_file():
        raise ModelFormatError(f"{directory / WEIGHTS}: missing", do="train or fetch the adapter again")
    with open_safetensors(directory / WEIGHTS) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no mapping)
    try:
        read = _read_lora if kind == "LORA" else _read_prompt
        return read(values, tensors, form, model)
    except (ModelFormatError, ConfigError) as error:
        raise ModelFormatError(f"{directory}: {error}") from None


def _read_lora(values: Mapping[str, Any], tensors: dict[str, Tensor], form: Format, model: Model) -> Adapter:
    require(values, _PLAIN_LORA)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    names = _names([f"{name}.{part}" for name in layers for part in ("lora_A", "lora_B")], form, model.config)
    found = {ours: theirs for ours, theirs in names.items() if theirs in tensors}
    if foreign := sorted(set(tensors) - set(found.values())):
        raise ModelFormatError("the adapter belongs to another model", got=foreign[0])
    settings = {"rank": values.get("r"), "alpha": values.get("lora_alpha"), "dropout": values.get("lora_dropout", 0.0)}
    config = validate(
        LoRAConfig, settings | {"targets": list(dict.fromkeys(name.rpartition(".")[0] for name in found))}, CONFIG
    )
    if values.get("use_rslora"):  # alpha / sqrt(rank) (Kalajdzievski 2023), which is some alpha / rank
        config = config.model_copy(update={"alpha": config.alpha * config.rank**0.5})
    for target in config.targets:
        for part, shape in (
            ("lora_A", (config.rank, layers[target].in_features)),
            ("lora_B", (layers[target].out_features, config.rank)),
        ):
            _check_shape(tensors, names[f"{target}.{part}"], shape)
    return Adapter(config, {ours: tensors[theirs] for ours, theirs in found.items()})


def _read_prompt(values: Mapping[str, Any], tensors: dict[str, Tensor], form: Format, model: Model) -> Adapter:
    require(values, {"num_transformer_submodules": 1})
    config = validate(PromptConfig, {"num_tokens": values.get("num_virtual_tokens")}, CONFIG)
    _check_shape(tensors, _PROMPT, (config.num_tokens, model.config.hidden_size))
    [name] = (name for name, _ in model.named_modules() if name.rpartition(".")[2] == "embed_tokens")
    return Adapter(config, {f"{name}.prompt": tensors[_PROMPT]})


def _check_shape(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> None:
    found = tuple(tensors[name].shape) if name in tensors else None
    if found != shape:
        raise ModelFormatError(f"{name} is missing or has the wrong shape", got=found, allowed=f"{shape}, as this model has")

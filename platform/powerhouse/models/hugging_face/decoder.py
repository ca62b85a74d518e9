"""Llama, Mistral, Qwen2 and Qwen3: one decoder, four ways to write its options down."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from powerhouse.errors import ModelFormatError
from powerhouse.models.decoder import Decoder, DecoderConfig
from powerhouse.models.hugging_face.format import Format, Shapes, pick, require
from powerhouse.models.rope import RopeScaling

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_SAME = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "initializer_range",
)  # fmt: skip
_REQUIRED = {"hidden_act": "silu", "pretraining_tp": 1, "partial_rotary_factor": 1.0}
_ROPE_SAME = ("factor", "low_freq_factor", "high_freq_factor")


class DecoderFormat(Format):
    config_class = DecoderConfig
    model_class = Decoder

    def __init__(self, architecture: str) -> None:
        self.architecture = architecture

    def read(self, values: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
        require(values, _REQUIRED)
        heads = max(int(values.get("num_attention_heads", 1)), 1)
        return {
            "architecture": self.architecture,
            # what transformers takes a missing setting for
            "num_key_value_heads": heads,
            "head_dim": int(values.get("hidden_size", 0)) // heads,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
            **pick(values, _SAME),
            **_read_rope(values),
            **self._read_biases(values),
            **self._read_window(values),
            "has_qk_norm": self.architecture == "qwen3",
        }

    def _read_biases(self, values: Mapping[str, Any]) -> dict[str, bool]:
        if self.architecture == "mistral":
            return {}
        if self.architecture == "qwen2":
            return {"has_qkv_bias": True}
        has_bias = bool(values.get("attention_bias", False))
        biases = {"has_qkv_bias": has_bias, "has_output_bias": has_bias}
        return biases | ({"has_mlp_bias": bool(values.get("mlp_bias", False))} if self.architecture == "llama" else {})

    def _read_window(self, values: Mapping[str, Any]) -> dict[str, Any]:
        if self.architecture == "llama":
            return {}
        window = values.get("sliding_window", 4096)
        if self.architecture == "mistral":
            return {"sliding_window": window}
        if not values.get("use_sliding_window", False) or window is None:
            return {}
        num_layers, num_full = int(values.get("num_hidden_layers", 0)), int(values.get("max_window_layers", 28))
        slides = ["full_attention" if i < num_full else "sliding_attention" for i in range(num_layers)]
        kinds = values.get("layer_types") or slides
        return {"sliding_window": window, "full_attention_layers": [i for i, k in enumerate(kinds) if k == "full_attention"]}

    def write(self, config: DecoderConfig) -> dict[str, Any]:
        if fault := _fault(config):
            raise ModelFormatError(f"no {config.architecture} of Hugging Face has this shape", got=fault)
        values = {
            "architectures": [_ARCHITECTURES[config.architecture]],
            "model_type": config.architecture,
            **{name: getattr(config, name) for name in _SAME},
            "hidden_act": "silu",
            "attention_bias": config.has_output_bias,
            "mlp_bias": config.has_mlp_bias,
            "dtype": "float32",
            **_write_rope(config),
        }
        if config.sliding_window is not None or config.architecture == "mistral":
            values |= {"sliding_window": config.sliding_window, "use_sliding_window": True, "max_window_layers": 0}
        if config.sliding_window is not None and config.architecture != "mistral":
            full = config.full_attention_layers
            layers = range(config.num_hidden_layers)
            values["layer_types"] = ["full_attention" if i in full else "sliding_attention" for i in layers]
        return values

    def is_ignored(self, theirs: str, config: DecoderConfig) -> bool:
        return theirs.endswith("rotary_emb.inv_freq") or (theirs == "lm_head.weight" and config.tie_word_embeddings)


def _fault(config: DecoderConfig) -> str | None:
    """The option that the architecture's code in transformers does not have, or always has."""
    qkv, output = config.has_qkv_bias, config.has_output_bias
    is_biased = {"llama": qkv == output, "qwen3": qkv == output, "qwen2": qkv and not output, "mistral": not (qkv or output)}
    checks = {
        "has_qkv_bias, has_output_bias": is_biased[config.architecture],
        "has_mlp_bias": config.architecture == "llama" or not config.has_mlp_bias,
        "has_qk_norm": config.has_qk_norm == (config.architecture == "qwen3"),
        "sliding_window": config.architecture != "llama" or config.sliding_window is None,
        "full_attention_layers": config.architecture != "mistral" or not config.full_attention_layers,
    }
    return next((f"{name} of {config}" for name, is_right in checks.items() if not is_right), None)


def _read_rope(values: Mapping[str, Any]) -> dict[str, Any]:
    """The base and scaling, from where transformers 5 or 4 writes them."""
    groups = [group for group in (values.get("rope_parameters"), values.get("rope_scaling")) if group]
    theta = next((group["rope_theta"] for group in groups if "rope_theta" in group), values.get("rope_theta", 10_000.0))
    rope: Mapping[str, Any] = next((group for group in groups if _rope_kind(group) != "default"), {})
    kind = _rope_kind(rope)
    require(rope, {"partial_rotary_factor": 1.0})
    if kind == "default":
        return {"rope_theta": theta}
    if kind not in ("linear", "dynamic", "llama3"):
        allowed = "default, linear, dynamic, llama3"
        raise ModelFormatError("config.json: unsupported rope scaling", got=kind, allowed=allowed)
    context = rope.get("original_max_position_embeddings", values.get("max_position_embeddings"))
    original = {} if kind == "linear" else {"original_context": context}
    return {"rope_theta": theta, "rope_scaling": {"kind": kind, **pick(rope, _ROPE_SAME), **original}}


def _rope_kind(rope: Mapping[str, Any]) -> str:
    return str(rope.get("rope_type", rope.get("type", "default")))


def _write_rope(config: DecoderConfig) -> dict[str, Any]:
    """The same settings where transformers 4 and 5 look for them."""
    scaling: RopeScaling | None = config.rope_scaling
    if scaling is None:
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
        return {"rope_theta": config.rope_theta, "rope_parameters": rope}
    rope = {"rope_type": scaling.kind, "rope_theta": config.rope_theta, "factor": scaling.factor}
    if scaling.kind == "llama3":
        rope |= {name: getattr(scaling, name) for name in _ROPE_SAME}
    if scaling.original_context is not None:
        rope["original_max_position_embeddings"] = scaling.original_context
    return {"rope_theta": config.rope_theta, "rope_parameters": rope, "rope_scaling": rope}


FORMATS = {name: DecoderFormat(name) for name in _ARCHITECTURES}

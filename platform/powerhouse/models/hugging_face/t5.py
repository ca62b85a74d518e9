"""T5 on disk."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from powerhouse.models.encoder_decoder import T5, T5Config
from powerhouse.models.hugging_face.format import Format, Shapes, choose, translate

_NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "intermediate_size": "d_ff",
    "num_encoder_layers": "num_layers",
    "num_decoder_layers": "num_decoder_layers",
    "num_attention_heads": "num_heads",
    "head_dim": "d_kv",
    "num_buckets": "relative_attention_num_buckets",
    "max_distance": "relative_attention_max_distance",
    "rms_norm_eps": "layer_norm_epsilon",
    "start_token_id": "decoder_start_token_id",
    "end_token_id": "eos_token_id",
}
_FEED_FORWARD = {
    "relu": ("relu", False),
    "gated-gelu": ("gelu_tanh", True),
    "gated-gelu_new": ("gelu_tanh", True),
    "gelu_new": ("gelu_tanh", False),
    "gelu": ("gelu", False),
    "gated-silu": ("silu", True),
    "gated-relu": ("relu", True),
}


def _attention_rules(half: str) -> list[tuple[str, str]]:
    kinds = [("self_attn", 0, "SelfAttention")] + ([("cross_attn", 1, "EncDecAttention")] if half == "decoder" else [])
    return [
        (f"{half}.layers.{{}}.{ours}.{part}_proj", f"{half}.block.{{}}.layer.{number}.{theirs}.{part}")
        for ours, number, theirs in kinds
        for part in "qkvo"
    ]


def _half_rules(half: str, mlp: int) -> list[tuple[str, str]]:
    block, theirs = f"{half}.layers.{{}}", f"{half}.block.{{}}.layer"
    return [
        *_attention_rules(half),
        (f"{block}.input_layernorm", f"{theirs}.0.layer_norm"),
        (f"{block}.cross_attn_layernorm", f"{theirs}.1.layer_norm"),
        (f"{block}.post_attention_layernorm", f"{theirs}.{mlp}.layer_norm"),
        (f"{block}.mlp.gate_proj", f"{theirs}.{mlp}.DenseReluDense.wi_0"),
        (f"{block}.mlp.up_proj", f"{theirs}.{mlp}.DenseReluDense.wi_1"),
        (f"{block}.mlp.down_proj", f"{theirs}.{mlp}.DenseReluDense.wo"),
        (f"{half}.relative_bias", f"{half}.block.0.layer.0.SelfAttention.relative_attention_bias"),
        (f"{half}.norm", f"{half}.final_layer_norm"),
    ]


_RULES = [("embed_tokens", "shared"), *_half_rules("encoder", 1), *_half_rules("decoder", 2)]


class T5Format(Format):
    config_class = T5Config
    model_class = T5

    def read(self, values: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
        kinds = {name: name for name in _FEED_FORWARD}
        activation, is_gated = _FEED_FORWARD[choose(values, "feed_forward_proj", "relu", kinds)]
        ours = {ours: values[theirs] for ours, theirs in _NAMES.items() if values.get(theirs) is not None}
        return {
            "num_decoder_layers": values.get("num_layers"),
            **ours,
            "is_gated": is_gated,
            "activation": activation,
            "tie_word_embeddings": "lm_head.weight" not in shapes,
            "scale_logits": values.get("scale_decoder_outputs", values.get("tie_word_embeddings", True)),
        }

    def write(self, config: T5Config) -> dict[str, Any]:
        kinds = {value: name for name, value in reversed(_FEED_FORWARD.items())}
        return {
            "architectures": ["T5ForConditionalGeneration"],
            "model_type": "t5",
            "is_encoder_decoder": True,
            **{theirs: getattr(config, ours) for ours, theirs in _NAMES.items()},
            "feed_forward_proj": kinds[config.activation, config.is_gated],
            "tie_word_embeddings": config.tie_word_embeddings,
            "scale_decoder_outputs": config.scale_logits,  # transformers 4 takes the line above for this
            "pad_token_id": 0,
            "dtype": "float32",
        }

    def name(self, ours: str, config: T5Config) -> str:
        theirs = translate(ours, _RULES)
        return theirs if config.is_gated else theirs.replace("DenseReluDense.wi_1", "DenseReluDense.wi")

    def is_ignored(self, theirs: str, config: T5Config) -> bool:
        """Copies of the shared embedding, and a bias of the cross-attention that old checkpoints carry unused."""
        unused = (
            r"(encoder|decoder)\.embed_tokens\.weight|decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias.*"
        )
        return bool(re.fullmatch(unused, theirs)) or (theirs == "lm_head.weight" and config.tie_word_embeddings)


FORMAT = T5Format()

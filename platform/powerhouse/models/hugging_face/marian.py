"""The classic Transformer on disk, as a Marian: both halves, its encoder alone, or a decoder as a causal language model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from powerhouse.models.classic import Classic, ClassicConfig
from powerhouse.models.hugging_face.format import Format, Shapes, choose, require, translate

_NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "max_position_embeddings": "max_position_embeddings",
    "scale_embedding": "scale_embedding",
    "initializer_range": "init_std",
    "start_token_id": "decoder_start_token_id",
    "end_token_id": "eos_token_id",
}
_ACTIVATIONS = {"relu": "relu", "swish": "silu", "silu": "silu", "gelu": "gelu"}
_PARTS = [
    ("self_attn.o_proj", "self_attn.out_proj"),
    ("self_attn", "self_attn"),
    ("input_layernorm", "self_attn_layer_norm"),
    ("cross_attn.o_proj", "encoder_attn.out_proj"),
    ("cross_attn_layernorm", "encoder_attn_layer_norm"),
    ("cross_attn", "encoder_attn"),
    ("mlp.up_proj", "fc1"),
    ("mlp.down_proj", "fc2"),
    ("post_attention_layernorm", "final_layer_norm"),
]
_RULES = [
    (f"{half}.layers.{{}}.{ours}", f"model.{half}.layers.{{}}.{theirs}")
    for half in ("encoder", "decoder")
    for ours, theirs in _PARTS
]


class MarianFormat(Format):
    config_class = ClassicConfig
    model_class = Classic

    def read(self, values: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
        require(values, {"share_encoder_decoder_embeddings": True, "tie_word_embeddings": True, "normalize_before": False})
        sides = {}
        for name in ("attention_heads", "ffn_dim"):  # the two halves may differ there, ours do not
            require(values, {f"encoder_{name}": values.get(f"decoder_{name}")})
            sides[name] = values.get(f"decoder_{name}")
        prefixes = {"encoder": ("model.encoder.layers.", "layers."), "decoder": ("model.decoder.layers.",)}
        halves = {half: any(name.startswith(prefix) for name in shapes) for half, prefix in prefixes.items()}
        return {
            **{ours: values[theirs] for ours, theirs in _NAMES.items() if values.get(theirs) is not None},
            **{f"num_{half}_layers": values.get(f"{half}_layers", 0) if is_there else 0 for half, is_there in halves.items()},
            "num_attention_heads": sides["attention_heads"],
            "intermediate_size": sides["ffn_dim"],
            "activation": choose(values, "activation_function", "gelu", _ACTIVATIONS),
        }

    def write(self, config: ClassicConfig) -> dict[str, Any]:
        is_causal_lm = config.num_encoder_layers == 0
        architectures = {True: "MarianForCausalLM", False: "MarianMTModel" if config.num_decoder_layers else "MarianEncoder"}
        return {
            "architectures": [architectures[is_causal_lm]],
            "model_type": "marian",
            "is_encoder_decoder": config.num_encoder_layers > 0 and config.num_decoder_layers > 0,
            "is_decoder": is_causal_lm,
            **{theirs: getattr(config, ours) for ours, theirs in _NAMES.items()},
            **{f"{half}_layers": getattr(config, f"num_{half}_layers") for half in ("encoder", "decoder")},
            **{f"{half}_attention_heads": config.num_attention_heads for half in ("encoder", "decoder")},
            **{f"{half}_ffn_dim": config.intermediate_size for half in ("encoder", "decoder")},
            "activation_function": {"silu": "swish"}.get(config.activation, config.activation),
            "pad_token_id": config.start_token_id,
            "forced_eos_token_id": None,
            "dtype": "float32",
        }

    def name(self, ours: str, config: ClassicConfig) -> str:
        if ours == "embed_tokens.weight":
            is_whole = config.num_encoder_layers and config.num_decoder_layers
            alone = "model.decoder.embed_tokens.weight" if config.num_decoder_layers else ours
            return "model.shared.weight" if is_whole else alone
        theirs = translate(ours, _RULES)
        return theirs if config.num_decoder_layers else theirs.removeprefix("model.encoder.")

    def is_ignored(self, theirs: str, config: ClassicConfig) -> bool:
        """The sinusoids, copies of the shared embedding, and the cross-attention of a decoder that has no encoder."""
        unused = r"(model\.(encoder|decoder)\.)?embed_(positions|tokens)\.weight|lm_head\.weight"
        no_memory = r"|model\.decoder\.layers\.\d+\.encoder_attn.*" if config.num_encoder_layers == 0 else ""
        return bool(re.fullmatch(unused + no_memory, theirs))


FORMAT = MarianFormat()

"""BERT on disk: a bare encoder, one with its pooler, or one with the masked-LM head under the prefix `bert.`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from powerhouse.models.encoder import Encoder, EncoderConfig
from powerhouse.models.hugging_face.format import Format, Shapes, choose, pick, require, translate

_SAME = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings", "type_vocab_size", "layer_norm_eps", "initializer_range",
)  # fmt: skip
_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
_REQUIRED = {"position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False}
_RULES = [
    ("embed_tokens", "embeddings.word_embeddings"),
    ("embed_positions", "embeddings.position_embeddings"),
    ("embed_segments", "embeddings.token_type_embeddings"),
    ("embed_norm", "embeddings.LayerNorm"),
    ("layers.{}.self_attn.q_proj", "encoder.layer.{}.attention.self.query"),
    ("layers.{}.self_attn.k_proj", "encoder.layer.{}.attention.self.key"),
    ("layers.{}.self_attn.v_proj", "encoder.layer.{}.attention.self.value"),
    ("layers.{}.self_attn.o_proj", "encoder.layer.{}.attention.output.dense"),
    ("layers.{}.input_layernorm", "encoder.layer.{}.attention.output.LayerNorm"),
    ("layers.{}.mlp.up_proj", "encoder.layer.{}.intermediate.dense"),
    ("layers.{}.mlp.down_proj", "encoder.layer.{}.output.dense"),
    ("layers.{}.post_attention_layernorm", "encoder.layer.{}.output.LayerNorm"),
    ("pooler", "pooler.dense"),
]
_HEAD_RULES = [
    ("head_transform", "cls.predictions.transform.dense"),
    ("head_norm", "cls.predictions.transform.LayerNorm"),
    ("lm_head.bias", "cls.predictions.bias"),
]
_ARCHITECTURES = {"none": "BertModel", "pooler": "BertModel", "masked_lm": "BertForMaskedLM"}


class BertFormat(Format):
    config_class = EncoderConfig
    model_class = Encoder

    def read(self, values: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
        require(values, _REQUIRED)
        activation = choose(values, "hidden_act", "gelu", _ACTIVATIONS)
        if "cls.predictions.bias" in shapes:
            require(values, {"tie_word_embeddings": True})
            return {**pick(values, _SAME), "activation": activation, "head": "masked_lm"}
        return {
            **pick(values, _SAME),
            "activation": activation,
            "head": "pooler" if "pooler.dense.weight" in shapes else "none",
        }

    def write(self, config: EncoderConfig) -> dict[str, Any]:
        activations = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
        return {
            "architectures": [_ARCHITECTURES[config.head]],
            "model_type": "bert",
            **{name: getattr(config, name) for name in _SAME},
            "hidden_act": activations[config.activation],
            "dtype": "float32",
        }

    def name(self, ours: str, config: EncoderConfig) -> str:
        head = translate(ours, _HEAD_RULES)
        if head != ours:
            return head
        return ("bert." if config.head == "masked_lm" else "") + translate(ours, _RULES)

    def is_ignored(self, theirs: str, config: EncoderConfig) -> bool:
        """The decoder's tied copies, the table of positions, and heads that a masked-LM or bare model does not use."""
        unused = r"cls\.predictions\.decoder\.(weight|bias)|(bert\.)?embeddings\.position_ids|cls\.seq_relationship\..*"
        return bool(re.fullmatch(unused + r"|bert\.pooler\..*", theirs))


FORMAT = BertFormat()

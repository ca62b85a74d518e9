"""A GGUF file, llama.cpp's one-file format, seen as the Hugging Face directory that it was made from.

Names and shapes are Hugging Face's (torch order, the reverse of GGUF's). The file is memory-mapped: F32, F16 and BF16
tensors are views of it, block-quantised ones become fp32 as they are read.
"""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from powerhouse.errors import ModelFormatError
from powerhouse.models.gguf_file import GGUFFile

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}

_FLOATS = {Type.F32: torch.float32, Type.F16: torch.float16, Type.BF16: torch.bfloat16}
_QUANTISED = {
    Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K
}  # fmt: skip

_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_INPUT_PROJECTIONS = ("attn_q", "attn_k", "attn_v")
_FEED_FORWARD = ("ffn_gate", "ffn_up", "ffn_down")

# Every setting of an architecture that is read here, or says nothing that the others do not. Any other one may change
# what the model computes, and is refused.
_KNOWN_SETTINGS = {
    "context_length", "embedding_length", "block_count", "feed_forward_length", "vocab_size",
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "attention.layer_norm_rms_epsilon", "rope.dimension_count", "rope.freq_base",
    "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.finetuned",
}  # fmt: skip


class GGUFWeights:
    """The tensors and settings of one file.

    Raises:
        ModelFormatError: here and in every method: the file is missing, damaged, or holds what is not supported.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        file = GGUFFile(path)
        self._values = file.values
        self.architecture = str(self.require("general.architecture"))
        if self.architecture not in ARCHITECTURES:
            raise ModelFormatError(
                f"{path}: unknown architecture", got=self.architecture, allowed=", ".join(sorted(ARCHITECTURES))
            )
        self._tensors = {_hugging_face_name(tensor.name, path): tensor for tensor in file.tensors}
        self._check_complete()

    def get(self, key: str, default: Any = None) -> Any:
        """Give one value of the metadata; arrays as lists."""
        return self._values.get(key, default)

    def require(self, key: str) -> Any:
        """Give one value of the metadata that must be there."""
        value = self.get(key)
        if value is None:
            raise ModelFormatError(f"{self.path}: metadata {key} is missing", do="convert the model to GGUF again")
        return value

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Give every tensor's Hugging Face name and its shape."""
        return {name: item.shape for name, item in self._tensors.items()}

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Give one tensor; with no `dtype` as a view of the file where it can be, else dequantised to fp32."""
        item = self._tensors.get(name)
        if item is None:
            raise ModelFormatError(f"{self.path}: tensor {name} is missing", do="convert the model to GGUF again")
        if item.tensor_type in _FLOATS:
            tensor = torch.from_numpy(item.data).view(_FLOATS[item.tensor_type])
        elif item.tensor_type in _QUANTISED:
            tensor = torch.from_numpy(gguf.dequantize(item.data, item.tensor_type))
        else:
            known = ", ".join(sorted(kind.name for kind in (*_FLOATS, *_QUANTISED)))
            raise ModelFormatError(f"{self.path}: {item.name}: unsupported type", got=item.tensor_type.name, allowed=known)
        return self._unpermute(tensor, item.name).to(dtype)

    @cached_property
    def _config(self) -> dict[str, Any]:
        """The settings under Hugging Face's names."""
        prefix = f"{self.architecture}."
        keys = (key for key in self._values if key.startswith(prefix))
        for key in keys:
            if key.removeprefix(prefix) not in _KNOWN_SETTINGS and (value := self.get(key)):
                raise ModelFormatError(f"{self.path}: metadata {key} is not supported", got=value, allowed="a file without it")
        heads = self._count("attention.head_count")
        width = self._count("embedding_length")
        head_dim = self._count("attention.key_length", width // heads)
        for key in ("attention.value_length", "rope.dimension_count"):
            if (found := self._count(key, head_dim)) != head_dim:
                raise ModelFormatError(f"{self.path}: {key} is not supported", got=found, allowed=f"the head width, {head_dim}")
        return {
            "architectures": [ARCHITECTURES[self.architecture]],
            "model_type": self.architecture,
            "hidden_act": "silu",
            "hidden_size": width,
            "intermediate_size": self._count("feed_forward_length"),
            "num_hidden_layers": self._count("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._count("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "max_position_embeddings": self._count("context_length"),
            "rms_norm_eps": _short(self.require(f"{prefix}attention.layer_norm_rms_epsilon")),
            **self._rope(),
            **self._biases(),
            "tie_word_embeddings": "lm_head.weight" not in self._tensors,
            "vocab_size": self.shapes().get("model.embed_tokens.weight", (0,))[0],
            **{name: self.get(f"tokenizer.ggml.{key}") for name, key in TOKEN_IDS.items()},
            "dtype": "float32",
        }

    def config(self) -> dict[str, Any]:
        """Give the values of the `config.json` that transformers reads."""
        return dict(self._config)

    def _count(self, key: str, default: int | None = None) -> int:
        full = f"{self.architecture}.{key}"
        value = self.require(full) if default is None else self.get(full, default)
        if not isinstance(value, int) or value <= 0:
            raise ModelFormatError(f"{self.path}: {full} is not supported", got=value, allowed="one positive number")
        return value

    def _rope(self) -> dict[str, Any]:
        theta = _short(self.get(f"{self.architecture}.rope.freq_base", 10_000.0))
        kind = self.get(f"{self.architecture}.rope.scaling.type", "none")
        if kind == "none":
            return {"rope_theta": theta, "rope_parameters": {"rope_type": "default", "rope_theta": theta}}
        if kind != "linear":
            raise ModelFormatError(f"{self.path}: unsupported rope scaling", got=kind, allowed="none, linear")
        factor = _short(self.require(f"{self.architecture}.rope.scaling.factor"))
        scaled = {"rope_type": "linear", "factor": factor, "rope_theta": theta}
        # transformers 4 reads rope_scaling, transformers 5 rope_parameters.
        return {"rope_theta": theta, "rope_scaling": scaled, "rope_parameters": scaled}

    def _biases(self) -> dict[str, bool]:
        if self.architecture == "qwen2":  # its code always has them on q, k and v, and nowhere else
            return {}
        biases = {"attention_bias": "model.layers.0.self_attn.q_proj.bias" in self._tensors}
        if self.architecture == "llama":
            biases["mlp_bias"] = "model.layers.0.mlp.gate_proj.bias" in self._tensors
        return biases

    def _check_complete(self) -> None:
        wanted = self._wanted()
        if missing := sorted(wanted - self._tensors.keys()):
            what = f"{self.path}: tensor {missing[0]} is missing"
            raise ModelFormatError(what, got=f"{len(missing)} missing in all", do="convert the model to GGUF again")
        if extra := sorted(self._tensors.keys() - wanted):
            what = f"{self.path}: {self.architecture} has no tensor {self._tensors[extra[0]].name}"
            raise ModelFormatError(what, got=f"{len(extra)} such in all", do="use a GGUF file of a supported model")

    def _wanted(self) -> set[str]:
        """Names of all tensors that a model of these settings has."""
        config = self._config
        head_norms = ("attn_q_norm", "attn_k_norm")
        parts = {f"{part}.weight" for part in _BLOCK_NAMES if part not in head_norms or self.architecture == "qwen3"}
        biased = list(_INPUT_PROJECTIONS) if self.architecture == "qwen2" else []
        biased += [*_INPUT_PROJECTIONS, "attn_output"] if config.get("attention_bias") else []
        biased += _FEED_FORWARD if config.get("mlp_bias") else []
        parts |= {f"{part}.bias" for part in biased}
        # A damaged count may be in the billions; one block too many is already missing.
        blocks = range(min(config["num_hidden_layers"], len(self._tensors)))
        names = {_hugging_face_name(f"blk.{i}.{part}", self.path) for i in blocks for part in parts}
        return names | set(_NAMES.values()) - ({"lm_head.weight"} if config["tie_word_embeddings"] else set())

    def _unpermute(self, tensor: Tensor, name: str) -> Tensor:
        """Undo the row order of a llama's q and k in GGUF: pairs of a rotation side by side, not in two halves of a head."""
        match = re.fullmatch(r"blk\.\d+\.attn_([qk])\.(?:weight|bias)", name)
        if self.architecture != "llama" or not match:
            return tensor
        num_heads = self._config["num_attention_heads" if match[1] == "q" else "num_key_value_heads"]
        if tensor.shape[0] % (2 * num_heads):
            what = f"{self.path}: {name} has the wrong shape"
            raise ModelFormatError(what, got=tuple(tensor.shape), allowed=f"rows for {num_heads} heads")
        return tensor.reshape(num_heads, -1, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


TOKEN_IDS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
"""Hugging Face's name of a special token -> GGUF's, under `tokenizer.ggml.`"""


def _hugging_face_name(name: str, path: Path) -> str:
    if name in _NAMES:
        return _NAMES[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match and match[2] in _BLOCK_NAMES:
        return f"model.layers.{match[1]}.{_BLOCK_NAMES[match[2]]}.{match[3]}"
    reason = "llama3 rope scaling is not supported in GGUF" if name == "rope_freqs.weight" else "no known place for it"
    raise ModelFormatError(f"{path}: unsupported tensor {name}", got=reason, do="use the Hugging Face directory instead")


def _short(value: float) -> float:
    """The shortest decimal that is the same fp32 number: 1e-05, not 9.999999747378752e-06."""
    return float(f"{value:.7g}")

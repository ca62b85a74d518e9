"""Small GGUF files for tests: a tiny random transformers model, written as llama.cpp's converter would write it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from transformers import AutoConfig, AutoModelForCausalLM

from fakes import tiny_tokenizer

NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def tiny_model(arch: str, **changes: Any) -> Any:
    shape = {
        "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False, "rope_parameters": {"rope_type": "default", "rope_theta": 50_000.0},
    } | changes  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(arch, **shape)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def settings_of(model: Any) -> dict[str, Any]:
    config = model.config
    return {
        "context_length": config.max_position_embeddings, "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers, "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads, "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim if hasattr(config, "head_dim") else 16,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps, "rope.freq_base": config.rope_parameters["rope_theta"],
    }  # fmt: skip


def tokenizer_values() -> dict[str, Any]:
    model = tiny_tokenizer().core.to_str()
    values = json.loads(model)["model"]
    tokens = sorted(values["vocab"], key=values["vocab"].get)
    return {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] + [1] * (len(tokens) - 1),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in values["merges"]],
        "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 0,
    }  # fmt: skip


def tensors_of(model: Any) -> dict[str, np.ndarray[Any, Any]]:
    """Give the tensors under GGUF's names; a llama's q and k with the two halves of each head's rows interleaved."""
    tensors = {}
    heads = {"q": model.config.num_attention_heads, "k": model.config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        values = tensor.numpy()
        if model.config.model_type == "llama" and (match := re.search(r"([qk])_proj", name)):
            halves = values.reshape(heads[match[1]], 2, -1, *values.shape[1:])
            values = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)
        stem, kind = name.rsplit(".", 1)
        block = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem)
        stem = f"blk.{block[1]}.{NAMES[block[2]]}" if block else NAMES[stem]
        if not (stem == "output" and model.config.tie_word_embeddings):
            tensors[f"{stem}.{kind}"] = values
    return tensors


def write_gguf(
    path: Path,
    model: Any,
    *,
    kinds: dict[str, Type] | None = None,
    values: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray[Any, Any] | None] | None = None,
) -> Path:
    """Write the model with its tokenizer; `kinds`, `values` and `tensors` change what is said, None leaves it out."""
    arch = model.config.model_type
    writer = gguf.GGUFWriter(path, arch)
    own = {f"{arch}.{key}": value for key, value in settings_of(model).items()}
    for key, value in (own | tokenizer_values() | (values or {})).items():
        if value is not None:
            _add_value(writer, key, value)
    for name, data in (tensors_of(model) | (tensors or {})).items():
        if data is not None:
            kind = (kinds or {}).get(name, Type.F32)
            stored = data if kind == Type.F32 or data.dtype == np.uint8 else gguf.quantize(data, kind)
            writer.add_tensor(name, stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    else:
        writer.add_float32(key, value)

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.gguf.dequant import dequantize
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from gguf_files import tiny_model, write_gguf
from powerhouse.errors import ModelFormatError
from powerhouse.models.gguf import GGUFWeights

LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 50_000.0}
FAMILIES = [
    ("llama", {}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}),
    ("llama", {"tie_word_embeddings": True, "head_dim": 32}),
    ("qwen2", {}),
    ("qwen3", {"head_dim": 32}),
]


@pytest.mark.parametrize(("arch", "changes"), FAMILIES)
def test_a_gguf_file_gives_back_the_model_it_was_made_from(tmp_path: Path, arch: str, changes: dict[str, Any]) -> None:
    model = tiny_model(arch, **changes)
    weights = GGUFWeights(write_gguf(tmp_path / "m.gguf", model))

    again = AutoModelForCausalLM.from_config(AutoConfig.for_model(**weights.config())).eval()
    state = {name: weights.read(name) for name in weights.shapes()}
    loaded = again.load_state_dict(state, strict=False)

    assert loaded.unexpected_keys == []
    assert loaded.missing_keys == (["lm_head.weight"] if changes.get("tie_word_embeddings") else [])
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == weights.shapes()
    ids_BT = torch.arange(24).view(2, 12) * 7
    assert torch.equal(again(ids_BT).logits, model(ids_BT).logits)


def test_transformers_reads_the_same_out_of_the_same_file(tmp_path: Path) -> None:
    model = tiny_model("llama")
    weights = GGUFWeights(write_gguf(tmp_path / "m.gguf", model, kinds={"blk.0.attn_q.weight": Type.Q8_0}))

    theirs = load_gguf_checkpoint(tmp_path / "m.gguf", return_tensors=True, model_to_load=model)["tensors"]

    assert theirs.keys() == weights.shapes().keys()
    assert all(torch.equal(weights.read(name), tensor) for name, tensor in theirs.items())


def test_linear_rope_scaling_is_read(tmp_path: Path) -> None:
    values = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    weights = GGUFWeights(write_gguf(tmp_path / "m.gguf", tiny_model("llama", rope_parameters=LINEAR), values=values))

    assert AutoConfig.for_model(**weights.config()).rope_parameters == LINEAR


@pytest.mark.parametrize("kind", [Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1])
def test_a_quantised_tensor_is_near_what_was_quantised(tmp_path: Path, kind: Type) -> None:
    model = tiny_model("qwen2")
    weights = GGUFWeights(write_gguf(tmp_path / "m.gguf", model, kinds={"blk.1.ffn_up.weight": kind}))

    up_FC = weights.read("model.layers.1.mlp.up_proj.weight")
    exact_FC = model.model.layers[1].mlp.up_proj.weight
    levels = {Type.F16: 2000, Type.BF16: 500, Type.Q8_0: 250}.get(kind, 16 if kind in (Type.Q4_0, Type.Q4_1) else 32)
    assert up_FC.dtype == {Type.F16: torch.float16, Type.BF16: torch.bfloat16}.get(kind, torch.float32)
    assert (up_FC - exact_FC).abs().max() < 2 * exact_FC.abs().max() / levels


@pytest.mark.parametrize("kind", [Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K, Type.Q4_1])
def test_blocks_are_dequantised_as_transformers_does(tmp_path: Path, kind: Type) -> None:
    model = tiny_model("llama", hidden_size=256, head_dim=64)
    num_bytes = 256 // gguf.GGML_QUANT_SIZES[kind][0] * gguf.GGML_QUANT_SIZES[kind][1]
    # Any bytes are blocks; below 60 their half-precision scales are finite.
    blocks = np.random.default_rng(0).integers(0, 60, (96, num_bytes), dtype=np.uint8)
    path = write_gguf(
        tmp_path / "m.gguf", model, kinds={"blk.0.ffn_gate.weight": kind}, tensors={"blk.0.ffn_gate.weight": blocks}
    )

    expected_FC = dequantize(torch.from_numpy(blocks), int(kind)).view(96, 256)
    torch.testing.assert_close(GGUFWeights(path).read("model.layers.0.mlp.gate_proj.weight"), expected_FC)


def test_float_tensors_are_views_of_the_mapped_file(tmp_path: Path) -> None:
    weights = GGUFWeights(write_gguf(tmp_path / "m.gguf", tiny_model("llama")))
    name = "model.layers.0.mlp.up_proj.weight"
    assert weights.read(name).data_ptr() == weights.read(name).data_ptr()


def cut(size: int) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(path.read_bytes()[:size])


def patch(start: int, data: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(path.read_bytes()[:start] + data + path.read_bytes()[start + len(data) :])


DAMAGE = [
    (cut(0), "not a GGUF file"),
    (patch(0, b"PK\3\4"), "not a GGUF file"),
    (cut(20), "damaged or truncated"),
    (cut(3_000), "damaged or truncated"),
    (cut(-5_000), "damaged or truncated"),
    (patch(4, b"\x63\0\0\0"), r"damaged or truncated\n  got: version 99, not 2 or 3"),
    (patch(4, b"\0\0\0\3"), "byte order"),
    (patch(8, b"\xff" * 8), "damaged or truncated"),
    (Path.unlink, "no such file"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_a_damaged_file_is_refused(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny_model("llama"))
    damage(path)
    with pytest.raises(ModelFormatError, match=message):
        GGUFWeights(path)


def test_random_damage_of_the_header_is_never_a_bare_traceback(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny_model("llama"))
    good, rng, num_refused = path.read_bytes(), np.random.default_rng(0), 0
    for _ in range(200):
        start = int(rng.integers(4, 1200))
        path.write_bytes(good[:start] + rng.bytes(4) + good[start + 4 :])
        try:
            GGUFWeights(path)
        except ModelFormatError:
            num_refused += 1
    assert num_refused > 100


ZEROS = np.zeros((4, 64), np.float32)
UNSUPPORTED = [
    ({"values": {"general.architecture": "mamba"}}, r"unknown architecture\n  got: mamba\n  allowed: llama, qwen2, qwen3"),
    ({"values": {"general.alignment": 0}}, "damaged or truncated"),
    ({"values": {"llama.block_count": None}}, "metadata llama.block_count is missing"),
    ({"values": {"llama.embedding_length": 0}}, "llama.embedding_length is not supported"),
    ({"values": {"llama.attention.head_count": [4, 2]}}, r"llama.attention.head_count is not supported\n  got: \[4, 2\]"),
    ({"values": {"llama.rope.dimension_count": 8}}, "rope.dimension_count is not supported\n  got: 8"),
    ({"values": {"llama.rope.scaling.type": "yarn"}}, "unsupported rope scaling\n  got: yarn"),
    ({"values": {"llama.rope.scaling.type": "linear"}}, "metadata llama.rope.scaling.factor is missing"),
    ({"values": {"llama.expert_count": 8}}, "metadata llama.expert_count is not supported\n  got: 8"),
    ({"values": {"llama.attention.sliding_window": 64}}, "metadata llama.attention.sliding_window is not supported"),
    ({"tensors": {"blk.1.ffn_up.weight": None}}, "tensor model.layers.1.mlp.up_proj.weight is missing"),
    ({"tensors": {"token_embd.weight": None}}, "tensor model.embed_tokens.weight is missing"),
    ({"tensors": {"blk.7.attn_q.weight": ZEROS}}, "llama has no tensor blk.7.attn_q.weight"),
    ({"tensors": {"blk.0.attn_q_norm.weight": ZEROS}}, "llama has no tensor blk.0.attn_q_norm.weight"),
    ({"tensors": {"rope_freqs.weight": ZEROS}}, "unsupported tensor rope_freqs.weight\n  got: llama3 rope scaling"),
    ({"tensors": {"blk.0.ffn_gate_exps.weight": ZEROS}}, "unsupported tensor blk.0.ffn_gate_exps.weight"),
]


@pytest.mark.parametrize(("changes", "message"), UNSUPPORTED)
def test_what_is_not_supported_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny_model("llama"), **changes)
    with pytest.raises(ModelFormatError, match=message):
        GGUFWeights(path)


def test_a_tensor_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    kinds, wrong = {"blk.0.ffn_up.weight": Type.I32}, {"blk.0.attn_k.weight": np.zeros((33, 64), np.float32)}
    weights = GGUFWeights(write_gguf(tmp_path / "m.gguf", model, tensors=wrong))
    with pytest.raises(ModelFormatError, match=r"blk.0.attn_k.weight has the wrong shape\n  got: \(33, 64\)"):
        weights.read("model.layers.0.self_attn.k_proj.weight")
    with pytest.raises(ModelFormatError, match=r"tensor lm_head.bias is missing"):
        weights.read("lm_head.bias")

    odd = {"blk.0.ffn_up.weight": np.zeros((96, 64 * 4), np.uint8)}
    weights = GGUFWeights(write_gguf(tmp_path / "odd.gguf", model, kinds=kinds, tensors=odd))
    with pytest.raises(ModelFormatError, match=r"blk.0.ffn_up.weight: unsupported type\n  got: I32\n  allowed: BF16, F16"):
        weights.read("model.layers.0.mlp.up_proj.weight")

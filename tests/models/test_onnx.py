from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, T5Config, T5ForConditionalGeneration

from powerhouse.errors import ModelFormatError
from powerhouse.models.catalog import CATALOG
from powerhouse.models.fetch import convert
from powerhouse.models.onnx import T5OnnxWeights
from powerhouse.packages import cache_folder, download, unpack

SHAPE = {
    "vocab_size": 40, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 3,
    "relative_attention_num_buckets": 8, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
}  # fmt: skip


def tiny_t5() -> Any:
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(**SHAPE))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


def quantise(values: np.ndarray[Any, Any], kind: type, zero: int) -> tuple[np.ndarray[Any, Any], np.float32]:
    scale = np.float32(np.abs(values).max() / 120)
    return (np.round(values / scale) + zero).astype(kind), scale


def path_of(module: str) -> str:
    """`block.0.layer.1.layer_norm` -> `block.0/layer.1/layer_norm`."""
    return re.sub(r"\.(?!\d)", "/", module)


class Half:
    """One ONNX graph, node by node as the exporter and the quantiser name them."""

    def __init__(self, root: str) -> None:
        self.root, self.nodes, self.values = root, [], {}  # type: ignore[var-annotated]

    def node(self, kind: str, path: str, inputs: list[str], output: str) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [output], name=path))
        return output

    def embedding(self, module: str, rows: np.ndarray[Any, Any]) -> None:
        path = f"{self.root}/{path_of(module)}/Gather"
        name = f"weights.of.{module}"
        self.values[f"{name}_q"], self.values[f"{name}_s"] = quantise(rows, np.uint8, 128)
        self.values[f"{name}_z"] = np.uint8(128)
        out = self.node("Gather", path, [f"{name}_q", "ids"], f"{path}_out")
        out = self.node("Transpose", f"{path}_move", [out], f"{path}_moved")
        self.node("DequantizeLinear", f"{path}_float", [out, f"{name}_s", f"{name}_z"], f"{path}_done")

    def matrix(self, module: str, weight_OI: np.ndarray[Any, Any], is_quantised: bool) -> None:
        path = f"{self.root}/{path_of(module)}/MatMul"
        name = f"onnx::MatMul_{len(self.nodes)}"
        if not is_quantised:
            self.values[name] = np.ascontiguousarray(weight_OI.T)
            self.node("MatMul", path, ["x", name], f"{path}_out")
            return
        self.values[f"{name}_a"], self.values[f"{name}_b"] = quantise(weight_OI.T, np.int8, 3)
        self.values[f"{name}_c"] = np.int8(3)
        out = self.node("MatMulInteger", f"{path}_quant", ["x_q", f"{name}_a", "x_z", f"{name}_c"], f"{path}_int")
        out = self.node("Cast", f"{path}_cast", [out], f"{path}_float")
        scales = self.node("Mul", f"{path}_scales", ["x_s", f"{name}_b"], f"{path}_scale")
        self.node("Mul", f"{path}_mul", [out, scales], f"{path}_out")

    def norm(self, module: str, weight_C: np.ndarray[Any, Any]) -> None:
        path = f"{self.root}/{path_of(module)}/Mul_1"
        self.values[f"some.{module}"] = weight_C
        self.node("Mul", path, [f"some.{module}", "normed"], f"{path}_out")

    def save(self, path: Path) -> None:
        initialisers = [numpy_helper.from_array(np.asarray(value), name) for name, value in self.values.items()]
        onnx.save(helper.make_model(helper.make_graph(self.nodes, "half", [], [], initialisers)), path)


def write_t5(folder: Path, model: Any, without: str = "nothing") -> Path:
    halves = {"encoder": Half("/enc"), "decoder": Half("/m/decoder")}
    shared = model.state_dict()["shared.weight"].numpy()
    halves["encoder"].embedding("embed_tokens", shared)
    halves["decoder"].embedding("shared", shared)
    for number, (name, tensor) in enumerate(model.state_dict().items()):
        stack, _, module = name.removesuffix(".weight").partition(".")
        if "embed_tokens" in name or stack == "shared" or without in name:
            continue
        if "relative_attention_bias" in name:
            halves[stack].embedding(module, tensor.numpy())
        elif tensor.dim() == 1:
            halves[stack].norm(module, tensor.numpy())
        else:
            half = halves["decoder" if stack == "lm_head" else stack]
            half.matrix(module or stack, tensor.numpy(), is_quantised=number % 5 > 0)
    folder.mkdir(exist_ok=True)
    for stack, half in halves.items():
        half.save(folder / f"{stack}.onnx")
    return folder


def test_a_t5_comes_back_from_its_int8_graphs_within_half_a_step(tmp_path: Path) -> None:
    model = tiny_t5()
    weights = T5OnnxWeights(write_t5(tmp_path / "t5", model))

    again = T5ForConditionalGeneration(T5Config(**weights.config()))
    loaded = again.load_state_dict({name: weights.read(name) for name in weights.shapes()}, strict=False)
    assert loaded.unexpected_keys == []
    assert set(loaded.missing_keys) <= {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
    assert {name: getattr(again.config, name) for name in SHAPE if name != "tie_word_embeddings"}.items() <= SHAPE.items()
    for name, tensor in model.state_dict().items():
        if "embed_tokens" not in name:
            assert tuple(tensor.shape) == weights.shapes()[name]
            torch.testing.assert_close(weights.read(name), tensor, atol=tensor.abs().max().item() / 240 + 1e-6, rtol=0)


def replace_embedding(folder: Path) -> None:
    other = Half("/enc")
    other.embedding("embed_tokens", np.ones((40, 16), np.float32))
    other.save(folder / "encoder.onnx")


def only(nodes: Callable[[Half], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        half = Half("/enc")
        nodes(half)
        half.save(folder / "encoder.onnx")

    return damage


def per_row(half: Half) -> None:
    half.embedding("embed_tokens", np.ones((4, 4), np.float32))
    half.values["weights.of.embed_tokens_s"] = np.ones(4, np.float32)


def no_cast(half: Half) -> None:
    half.matrix("block.0.layer.0.SelfAttention.q", np.ones((4, 4), np.float32), is_quantised=True)
    half.nodes = [node for node in half.nodes if node.op_type != "Cast"]


def too_few_bytes(folder: Path) -> None:
    model = onnx.load(folder / "encoder.onnx")
    tensor = next(item for item in model.graph.initializer if item.data_type == TensorProto.UINT8 and item.dims)
    tensor.raw_data = tensor.raw_data[:5]
    onnx.save(model, folder / "encoder.onnx")


BAD: list[tuple[Callable[[Path], Any], str]] = [
    (lambda folder: (folder / "decoder.onnx").unlink(), "decoder.onnx: missing"),
    (lambda folder: (folder / "decoder.onnx").write_bytes(b"no graph"), "decoder.onnx: damaged or truncated"),
    (lambda folder: (folder / "encoder.onnx").write_bytes((folder / "encoder.onnx").read_bytes()[:900]), "damaged or trunc"),
    (
        lambda folder: write_t5(folder, tiny_t5(), without="block.1.layer.0.SelfAttention.k"),
        "SelfAttention.k.weight is missing",
    ),
    (lambda folder: write_t5(folder, tiny_t5(), without="lm_head"), "its own head\n  got: lm_head.weight is missing"),
    (replace_embedding, "two different weights for shared.weight"),
    (too_few_bytes, "damaged tensor weights.of."),
    (only(lambda half: half.matrix("pooler", np.ones((4, 4), np.float32), is_quantised=False)), "not a T5\n  got: a weight at"),
    (only(per_row), "weights.of.embed_tokens_q has a scale for each row"),
    (only(no_cast), r"MatMul_int is not used as expected\n  allowed: one Cast after it"),
]


@pytest.mark.parametrize(("damage", "message"), BAD)
def test_other_graphs_are_refused(tmp_path: Path, damage: Callable[[Path], Any], message: str) -> None:
    folder = write_t5(tmp_path / "t5", tiny_t5())
    damage(folder)
    with pytest.raises(ModelFormatError, match=message):
        T5OnnxWeights(folder)


def test_a_t5_without_its_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match=r"tokenizer.json: missing"):
        convert(write_t5(tmp_path / "t5", tiny_t5()), tmp_path)


def in_floats(path: Path) -> ReferenceEvaluator:
    """Give the graph with every int8 product replaced by one of floats: the weights as they are, but no rounded inputs."""
    model = onnx.load(path)
    model.opset_import[0].version = 19  # the same operators; the evaluator lacks DequantizeLinear of version 18
    graph = model.graph
    values = {item.name: item for item in graph.initializer}
    producer = {name: node for node in graph.node for name in node.output}
    nodes, replaced = [], set()
    for node in graph.node:
        product = next((producer[name] for name in node.input if node.op_type == "Mul" and name in producer), None)
        integer = producer.get(product.input[0]) if product is not None and product.op_type == "Cast" else None
        if integer is not None and integer.op_type == "MatMulInteger":
            stem = integer.input[1].removesuffix("_quantized")
            whole, zero, scale = (
                numpy_helper.to_array(values[f"{stem}_{part}"]) for part in ("quantized", "zero_point", "scale")
            )
            floats_IO = (whole.astype(np.float32) - np.float32(zero)) * scale
            graph.initializer.append(numpy_helper.from_array(floats_IO, f"{stem}_floats"))
            inputs = [producer[integer.input[0]].input[0], f"{stem}_floats"]
            replaced |= {*integer.output, *product.output}
            node = helper.make_node("MatMul", inputs, list(node.output))
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(node for node in nodes if node.output[0] not in replaced)  # numpy takes long for products of integers
    return ReferenceEvaluator(model)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning:onnx")
def test_the_real_t5_computes_what_its_graphs_compute_on_the_same_weights(tmp_path: Path) -> None:
    package = CATALOG["t5-small-titles"]
    unpack(download(package, cache_folder()), package, tmp_path)
    source, folder = tmp_path / package.path, tmp_path / "out"
    folder.mkdir()
    assert convert(source, folder) == {"num_tensors": 190, "num_parameters": 76_961_152}

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, report = AutoModelForSeq2SeqLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    inputs = tokenizer("Refactored the connection pool, then ran the tests. " * 15, return_tensors="pt")
    given = {name: inputs[name].numpy() for name in ("input_ids", "attention_mask")}
    assert given["input_ids"].shape[1] > 128  # beyond the last bucket of distances
    labels_BT = tokenizer("Refactor connection pool", return_tensors="pt").input_ids
    with torch.no_grad():
        ours = model(**{name: inputs[name] for name in given}, decoder_input_ids=labels_BT)

    (hidden_BTC,) = in_floats(source / "encoder.onnx").run(None, given)
    decoder_inputs = {"input_ids": labels_BT.numpy(), "encoder_hidden_states": hidden_BTC}
    decoder_inputs["encoder_attention_mask"] = given["attention_mask"]
    (logits_BTV,) = in_floats(source / "decoder.onnx").run(None, decoder_inputs)
    torch.testing.assert_close(ours.encoder_last_hidden_state, torch.from_numpy(hidden_BTC), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours.logits, torch.from_numpy(logits_BTV), atol=1e-3, rtol=1e-4)

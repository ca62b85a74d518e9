"""A T5 whose two halves were exported to ONNX (encoder.onnx, decoder.onnx), seen as its Hugging Face weights in fp32.

The exporter keeps the names of embeddings and norms and gives matrices new ones (`onnx::MatMul_1022`); the quantiser puts
int8 and a scale in their place. So a weight is found through the node that uses it: the node's path is the module's name,
and its neighbours hold the scale and the zero point. A Linear's matrix stands transposed, [in, out].
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor

from powerhouse.errors import ModelFormatError

ENCODER, DECODER = "encoder.onnx", "decoder.onnx"
T5_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
T5_TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "clean_up_tokenization_spaces": False,
}
"""What every T5 has in `tokenizer_config.json`, for a folder without one."""

_ROOTS = re.compile(r"block\.\d+|final_layer_norm|embed_tokens|shared|lm_head")
_ATTENTION = ["q", "k", "v", "o"]
_FEED_FORWARD = ["wi_0", "wi_1", "wo"]


@dataclass(frozen=True)
class _Place:
    """Where one weight stands in its graph."""

    graph: _Graph
    values: str
    scale: str | None = None
    zero_point: str | None = None
    is_transposed: bool = False

    def read(self) -> Tensor:
        """Give (values - zero_point) * scale, in fp32 and torch's order."""
        values = self.graph.array(self.values)
        if self.scale is not None:
            zero = self.graph.array(self.zero_point).astype(np.int32) if self.zero_point else 0
            values = (values.astype(np.int32) - zero) * self.graph.array(self.scale)
        return torch.from_numpy(np.array((values.T if self.is_transposed else values), np.float32, order="C"))

    def shape(self) -> tuple[int, ...]:
        sizes = tuple(self.graph.initialisers[self.values].dims)
        return sizes[::-1] if self.is_transposed else sizes


class _Graph:
    """One ONNX file; `stack` is the name of its half in T5: encoder or decoder."""

    def __init__(self, path: Path, stack: str) -> None:
        self.path = path
        self.stack = stack
        graph = _load(path).graph
        self.initialisers = {item.name: item for item in graph.initializer}
        self.nodes = list(graph.node)
        self._producer = {output: node for node in self.nodes for output in node.output}
        self._consumers: dict[str, list[Any]] = {}
        for node in self.nodes:
            for name in node.input:
                self._consumers.setdefault(name, []).append(node)

    def array(self, name: str) -> Any:
        try:
            return numpy_helper.to_array(self.initialisers[name])
        except Exception as error:  # the library raises what numpy says of too few bytes, and its own checks
            raise ModelFormatError(f"{self.path}: damaged tensor {name}", got=error, do="fetch the file again") from None

    def places(self) -> Iterator[tuple[str, _Place]]:
        """Yield every weight by its Hugging Face name."""
        for node in self.nodes:
            if node.op_type in _READERS and (place := _READERS[node.op_type](self, node)):
                yield f"{self._module(node.name)}.weight", place

    def _module(self, node_name: str) -> str:
        """`/enc/block.0/layer.0/SelfAttention/q/MatMul_quant` -> `encoder.block.0.layer.0.SelfAttention.q`."""
        parts = node_name.strip("/").split("/")[:-1]
        start = next((i for i, part in enumerate(parts) if _ROOTS.fullmatch(part)), None)
        if start is None:
            raise ModelFormatError(f"{self.path}: not a T5", got=f"a weight at node {node_name!r}", allowed="modules of a T5")
        if parts[start] in ("embed_tokens", "shared"):
            return "shared"
        return parts[start] if parts[start] == "lm_head" else ".".join([self.stack, *parts[start:]])

    def matrix(self, node: Any) -> _Place | None:
        """Find a Linear's weight, if MatMul multiplies by one at all."""
        return _Place(self, node.input[1], is_transposed=True) if node.input[1] in self.initialisers else None

    def quantised_matrix(self, node: Any) -> _Place | None:
        """Find the scale on the way of the product to float: Cast, then Mul by (input scale * weight scale)."""
        cast = self._next(node.output[0], "Cast")
        product = self._next(cast.output[0], "Mul")
        scales = self._producer[next(name for name in product.input if name != cast.output[0])]
        scale = next((name for name in scales.input if name in self.initialisers), None)
        if scale is None or node.input[1] not in self.initialisers:
            raise ModelFormatError(f"{self.path}: {node.name} has no scale", do="export the model again")
        return _Place(self, node.input[1], scale, node.input[3] if len(node.input) > 3 else None, is_transposed=True)

    def embedding(self, node: Any) -> _Place | None:
        """Find an embedding's rows, and behind them, through nodes that only move values, their scale."""
        rows = node.input[0]
        if rows not in self.initialisers:
            return None
        if self.initialisers[rows].data_type == onnx.TensorProto.FLOAT:
            return _Place(self, rows)
        while node.op_type != "DequantizeLinear":
            node = self._next(node.output[0], "DequantizeLinear", "Transpose", "Unsqueeze", "Reshape")
        if self.initialisers[node.input[1]].dims:
            raise ModelFormatError(f"{self.path}: {rows} has a scale for each row", allowed="one scale")
        return _Place(self, rows, node.input[1], node.input[2])

    def norm(self, node: Any) -> _Place | None:
        """Find the factor of an RMSNorm: the only Mul by a vector of weights."""
        weights = [name for name in node.input if name in self.initialisers and len(self.initialisers[name].dims) == 1]
        return _Place(self, weights[0]) if weights and "layer_norm" in node.name else None

    def _next(self, name: str, *kinds: str) -> Any:
        found = [node for node in self._consumers.get(name, []) if node.op_type in kinds]
        if len(found) != 1:
            raise ModelFormatError(f"{self.path}: {name} is not used as expected", allowed=f"one {' or '.join(kinds)} after it")
        return found[0]


_READERS = {
    "MatMul": _Graph.matrix,
    "MatMulInteger": _Graph.quantised_matrix,
    "Gather": _Graph.embedding,
    "Mul": _Graph.norm,
}


class T5OnnxWeights:
    """A folder with encoder.onnx and decoder.onnx of a T5 with gated GELU and a head of its own, as flan-t5 has.

    Raises:
        ModelFormatError: a file is missing or damaged, or is of another model.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        halves = [_Graph(folder / ENCODER, "encoder"), _Graph(folder / DECODER, "decoder")]
        self._places: dict[str, _Place] = {}
        for name, place in (item for half in halves for item in half.places()):
            if name in self._places and not torch.equal(self._places[name].read(), place.read()):
                raise ModelFormatError(f"{folder}: two different weights for {name}", allowed="one embedding for both halves")
            self._places[name] = place
        self._check_complete()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Give every tensor's Hugging Face name and its shape."""
        return {name: place.shape() for name, place in self._places.items()}

    def read(self, name: str) -> Tensor:
        """Give one tensor, dequantised to fp32."""
        return self._places[name].read()

    def config(self) -> dict[str, Any]:
        """Give the values of `config.json`: sizes from the weights; the rest is the same in every T5."""
        shapes = self.shapes()
        num_buckets, num_heads = shapes[_bias("encoder")]
        inner, width = shapes["encoder.block.0.layer.0.SelfAttention.q.weight"]
        return {
            "architectures": ["T5ForConditionalGeneration"],
            "model_type": "t5",
            "is_encoder_decoder": True,
            "vocab_size": shapes["shared.weight"][0],
            "d_model": width,
            "d_kv": inner // num_heads,
            "d_ff": shapes["encoder.block.0.layer.1.DenseReluDense.wo.weight"][1],
            "num_layers": self._num_blocks("encoder"),
            "num_decoder_layers": self._num_blocks("decoder"),
            "num_heads": num_heads,
            "relative_attention_num_buckets": num_buckets,
            "relative_attention_max_distance": 128,
            "feed_forward_proj": "gated-gelu",
            "layer_norm_epsilon": 1e-6,
            "dropout_rate": 0.1,
            "initializer_factor": 1.0,
            "tie_word_embeddings": False,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "decoder_start_token_id": 0,
            "dtype": "float32",
        }

    def _num_blocks(self, stack: str) -> int:
        return len({name.split(".")[2] for name in self._places if name.startswith(f"{stack}.block.")})

    def _check_complete(self) -> None:
        wanted = {"shared.weight", "lm_head.weight"} | _wanted("encoder", self._num_blocks("encoder"), ["SelfAttention"])
        wanted |= _wanted("decoder", self._num_blocks("decoder"), ["SelfAttention", "EncDecAttention"])
        if odd := sorted(wanted ^ self._places.keys()):
            what = "missing" if odd[0] in wanted else "not known"
            raise ModelFormatError(f"{self.folder}: not a T5 with gated GELU and its own head", got=f"{odd[0]} is {what}")


def _bias(stack: str) -> str:
    return f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"


def _wanted(stack: str, num_blocks: int, attentions: list[str]) -> set[str]:
    """Names of the tensors of one half."""
    names = {_bias(stack), f"{stack}.final_layer_norm.weight"}
    parts = [[f"{attention}.{part}" for part in _ATTENTION] for attention in attentions]
    parts.append([f"DenseReluDense.{part}" for part in _FEED_FORWARD])
    for block in range(num_blocks):
        for layer, modules in enumerate(parts):
            names |= {f"{stack}.block.{block}.layer.{layer}.{module}.weight" for module in [*modules, "layer_norm"]}
    return names


def _load(path: Path) -> Any:
    if not path.is_file():
        raise ModelFormatError(f"{path}: missing", do="give a folder with encoder.onnx and decoder.onnx")
    try:
        return onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's own kind of error, which is no part of this package
        raise ModelFormatError(f"{path}: damaged or truncated", got=error, do="fetch the file again") from None

"""BERTScore (Zhang et al. 2020): each token is matched to its most similar one in the other text, by an encoder's states.

The values depend on the encoder and on its layer, so that both are in the signature; those of a small sentence encoder are not
comparable to published ones of roberta-large. Shapes: T tokens, U tokens of the other text, C model width.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, PrivateAttr
from torch import Tensor

from powerhouse.config import StoragePath
from powerhouse.device import DeviceName, choose_device
from powerhouse.errors import ConfigError, InputError, ModelFormatError
from powerhouse.evaluation.metric import Metric, Pair
from powerhouse.evaluation.score import Sums, Values
from powerhouse.models.encoder import Encoder
from powerhouse.models.hub import load_model
from powerhouse.tokenizer import Tokenizer

Three = tuple[float, float, float]
Weights = Mapping[int, float]


class BertScore(Metric):
    """Mean over items of precision, recall and F1; of several references each takes the best. An empty text has 0."""

    metric: Literal["bertscore"] = "bertscore"
    """Name of the metric."""
    model: StoragePath = Path("models/minilm-l6")
    """Directory of an encoder; `jobs/fetch_model.py minilm-l6` writes the default one."""
    layer: int = Field(default=5, ge=1)
    """The layer whose states are compared. The last one of a sentence encoder makes all tokens of a text alike."""
    uses_idf: bool = False
    """Whether a token weighs by how few references have it; they are counted by `prepare`."""
    baseline: Three | None = None
    """Precision, recall and F1 of unrelated texts, which become 0 on the scale; unscaled where it is not set."""
    batch_texts: int = Field(default=1, ge=1)
    """Texts in one forward pass. By one, an item's score is the same to the bit whatever else is scored; more suit a GPU."""
    device: DeviceName = "auto"
    """Where the encoder computes."""
    _idf: Weights | None = PrivateAttr(None)

    def prepare(self, pairs: Sequence[Pair]) -> Self:
        if not self.uses_idf:
            return self
        texts = [text for pair in pairs for text in pair.references]
        counts = Counter(token for ids in self._matcher().tokens(texts) for token in set(ids))
        ready = self.model_copy()
        ready._idf = {token: math.log((len(texts) + 1) / (count + 1)) for token, count in sorted(counts.items())}
        ready._idf[_UNSEEN] = math.log(len(texts) + 1)
        return ready

    def statistic(self, pair: Pair) -> Sequence[float]:
        return [float(value) for value in self.own_statistics([pair])[0]]

    def own_statistics(self, pairs: Sequence[Pair]) -> Sums:
        """Rows [N, 3]: precision, recall, F1.

        Raises:
            InputError: the weights of tokens are wanted and `prepare` was not called.
        """
        if self.uses_idf and self._idf is None:
            raise InputError("BERTScore weighs tokens by all references", do="call metric.prepare(pairs) first")
        texts = sorted({text for pair in pairs for text in (pair.hypothesis, *pair.references)})
        coded = dict(zip(texts, self._matcher().encode(texts, self._idf, self.batch_texts), strict=True))
        found = [[compare(coded[pair.hypothesis], coded[text]) for text in pair.references] for pair in pairs]
        return np.array([np.max(scores, axis=0) for scores in found])

    def finalise(self, num_items: Values, sums: Sums) -> Mapping[str, Values]:
        means = sums / num_items[..., None]
        if self.baseline is not None:
            means = (means - np.array(self.baseline)) / (1 - np.array(self.baseline))
        return {f"bertscore_{part}": means[..., number] for number, part in enumerate(("precision", "recall", "f1"))}

    def facts(self) -> dict[str, Any]:
        matcher = self._matcher()
        return {
            "metric": self.metric,
            "model": f"{self.model.name},{model_digest(self.model)}",
            "layer": self.layer,
            "idf": _digest(repr(self._idf).encode()) if self.uses_idf else "no",
            "rescaled": ",".join(map(str, self.baseline)) if self.baseline else "no",
            "cut_at": f"{matcher.max_tokens}tokens",
        }

    def _matcher(self) -> Matcher:
        return _load(self.model, self.layer, self.device)


_UNSEEN = -1
"""Stands for every token that no reference has."""


@dataclass(frozen=True)
class Coded:
    """A text as it is compared."""

    states_TC: Tensor
    """Of length one each."""
    weights_T: Tensor
    """That add to one; none on the special tokens, which may only be matched."""


@dataclass(frozen=True)
class Matcher:
    """An encoder up to one layer, and its tokenizer."""

    encoder: Encoder
    tokenizer: Tokenizer

    @property
    def max_tokens(self) -> int:
        """Longer texts are cut, special tokens included."""
        return self.encoder.config.max_position_embeddings

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text between the encoder's special tokens."""
        start, end = self.tokenizer.start_of_text_ids, self.tokenizer.end_of_text_id
        room = self.max_tokens - len(start) - 1
        return [[*start, *ids[:room], end] for ids in self.tokenizer.encode_batch([text.strip() for text in texts])]

    @torch.inference_mode()
    def encode(self, texts: Sequence[str], idf: Weights | None, batch_texts: int) -> list[Coded]:
        rows = self.tokens(texts)
        order = sorted(range(len(rows)), key=lambda number: len(rows[number]))
        states: dict[int, Tensor] = {}
        for start in range(0, len(order), batch_texts):
            numbers = order[start : start + batch_texts]
            states |= zip(numbers, self._states([rows[number] for number in numbers]), strict=True)
        return [Coded(states[number], self._weights(ids, idf)) for number, ids in enumerate(rows)]

    def _states(self, rows: Sequence[list[int]]) -> list[Tensor]:
        device = next(self.encoder.parameters()).device
        ids_BT = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in rows], batch_first=True)
        lengths_B = torch.tensor([len(ids) for ids in rows])
        valid_BT = torch.arange(ids_BT.shape[1]) < lengths_B[:, None]
        states_BTC = self.encoder.encode(ids_BT.to(device), None if valid_BT.all() else valid_BT.to(device))
        normed_BTC = F.normalize(states_BTC.float(), dim=-1)
        return [states_TC[: len(ids)] for states_TC, ids in zip(normed_BTC, rows, strict=True)]

    def _weights(self, ids: list[int], idf: Weights | None) -> Tensor:
        num_special = len(self.tokenizer.start_of_text_ids)
        weights_T = torch.tensor([1.0 if idf is None else idf.get(token, idf[_UNSEEN]) for token in ids])
        weights_T[:num_special] = weights_T[-1] = 0.0
        return (weights_T / weights_T.sum().clamp(min=1e-12)).to(next(self.encoder.parameters()).device)


def compare(said: Coded, wanted: Coded) -> Three:
    """Precision, recall and F1; a text without a weighted token has 0 and gives 0."""
    if not said.weights_T.any() or not wanted.weights_T.any():
        return 0.0, 0.0, 0.0
    similarity_TU = said.states_TC @ wanted.states_TC.T
    precision = float((similarity_TU.amax(dim=1) * said.weights_T).sum())
    recall = float((similarity_TU.amax(dim=0) * wanted.weights_T).sum())
    return precision, recall, 2 * precision * recall / (precision + recall)


@lru_cache(maxsize=2)
def _load(path: Path, layer: int, device: DeviceName) -> Matcher:
    """Read once a process, without the layers above the one that is asked for."""
    encoder = load_model(path, device=choose_device(device))
    if not isinstance(encoder, Encoder):
        raise ModelFormatError(f"{path}: BERTScore needs an encoder", got=type(encoder).__name__, allowed="Encoder")
    if layer > (num_layers := len(encoder.layers)):
        raise ConfigError(f"{path}: the encoder has no such layer", got=layer, allowed=f"1 to {num_layers}")
    for name in list(encoder.layers)[layer:]:
        del encoder.layers[name]
    return Matcher(encoder, Tokenizer.load(path))


@lru_cache(maxsize=8)
def model_digest(path: Path) -> str:
    """Eight digits of the hash of the weights, the settings and the tokenizer."""
    files = sorted([*path.glob("*.safetensors"), path / "config.json", path / "tokenizer.json"])
    parts = []
    for name in files:
        with name.open("rb") as file:
            parts.append(hashlib.file_digest(file, "sha256").digest())
    return _digest(b"".join(parts))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:8]

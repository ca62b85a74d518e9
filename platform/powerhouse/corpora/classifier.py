"""How likely a sentence is an insult, by the linear model of alt-profanity-check (MIT), learnt from 200,000 rated comments.

It is what scikit-learn calls TfidfVectorizer and CalibratedClassifierCV(LinearSVC): words counted and weighed by how rare they
are, a vector of length 1, a weight for each word, a sigmoid of the sum (Platt 1999); the mean of five such models. The package
keeps the numbers in pickles, which could hold any program. They are read here by a reader that makes records of names and
numbers, calls nothing, and refuses every name that is not listed; the package's sha256 is checked before that.

Shapes: V words of the vocabulary, M models, S sentences, E different words of each sentence, one sentence after the other.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import struct
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from powerhouse.errors import InputError
from powerhouse.packages import Package, cache_folder, download

PACKAGE = Package(
    licence="MIT",
    name="alt-profanity-check",
    version="1.9.1",
    sha256="cccb8ce072306bac21188670777a25cfb1de978aa8c7a93c8e4a43c03b3945c3",
    members=["profanity_check/data/*.joblib"],
)
_NAMES = frozenset(
    [
        "sklearn.feature_extraction.text.TfidfVectorizer",
        "sklearn.feature_extraction.text.TfidfTransformer",
        "sklearn.calibration.CalibratedClassifierCV",
        "sklearn.calibration._CalibratedClassifier",
        "sklearn.calibration._SigmoidCalibration",
        "sklearn.svm._classes.LinearSVC",
        "joblib.numpy_pickle.NumpyArrayWrapper",
        "numpy.ndarray",
        "numpy.float64",
        "numpy.dtype",
        "numpy._core.multiarray.scalar",
    ]
)
_WORD = re.compile(r"\b\w\w+\b")

Floats = npt.NDArray[np.float64]


class Record:
    """Stands for an object of any class: what it was made of, and its fields."""

    arguments: tuple[Any, ...]
    fields: Any

    def __new__(cls, *arguments: Any) -> Record:
        made = super().__new__(cls)
        made.arguments, made.fields = arguments, {}
        return made

    def __setstate__(self, state: Any) -> None:
        self.fields = state


def read_pickle(content: bytes) -> Any:
    """Read a pickle written by joblib: objects as records, arrays of numbers as arrays. Nothing of it is imported or called.

    Raises:
        InputError: it names a class that is not listed, or is damaged.
    """
    file = io.BytesIO(content)

    class ArrayRecord(Record):
        """joblib puts the bytes of an array right behind the record that describes it, so that it must be read at once."""

        def __setstate__(self, state: Any) -> None:
            dtype = np.dtype(state["dtype"].arguments[0])
            if dtype.hasobject:
                raise pickle.UnpicklingError("an array of objects")
            file.read(file.read(1)[0])
            array = np.frombuffer(file.read(math.prod(state["shape"]) * dtype.itemsize), dtype=dtype)
            self.fields = array.reshape(state["shape"], order=state["order"])

    class Reader(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> type[Record]:
            if f"{module}.{name}" not in _NAMES:
                raise pickle.UnpicklingError(f"the name {module}.{name}")
            return ArrayRecord if name == "NumpyArrayWrapper" else Record

    try:
        return Reader(file).load()
    except (pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError, AttributeError, TypeError) as error:
        raise InputError(
            "a pickle of numbers holds what it should not", got=error, allowed=sorted(_NAMES), do="do not use this file"
        ) from None


def fetch() -> str:
    """Download the package, if it is not in the cache, before many workers want it; give its sha256.

    Raises:
        InputError: it cannot be fetched, or it is not what it was.
    """
    download(PACKAGE, cache_folder())
    return PACKAGE.sha256


@dataclass(frozen=True)
class Classifier:
    """Gives each text the probability that people call it an insult."""

    places: dict[str, int]
    """Of each word of the vocabulary, V."""
    rarity_V: Floats
    weights_VM: Floats
    biases_M: Floats
    slopes_M: Floats
    offsets_M: Floats

    @classmethod
    def load(cls) -> Classifier:
        """Read the model from the package, which is fetched into the cache (packages.py) if it is not there.

        Raises:
            InputError: it cannot be fetched, or it is not what it was.
        """
        with zipfile.ZipFile(download(PACKAGE, cache_folder())) as wheel:
            vectorizer, model = (
                read_pickle(wheel.read(f"profanity_check/data/{name}.joblib")).fields for name in ("vectorizer", "model")
            )
        parts = [part.fields for part in model["calibrated_classifiers_"]]
        linear = [part["estimator"].fields for part in parts]
        sigmoids = [part["calibrators"][0].fields for part in parts]
        return cls(
            places=vectorizer["vocabulary_"],
            rarity_V=vectorizer["_tfidf"].fields["idf_"].fields,
            weights_VM=np.stack([one["coef_"].fields[0] for one in linear], axis=1),
            biases_M=np.array([one["intercept_"].fields[0] for one in linear]),
            slopes_M=np.array([_number(one["a_"]) for one in sigmoids]),
            offsets_M=np.array([_number(one["b_"]) for one in sigmoids]),
        )

    def __call__(self, texts: Sequence[str]) -> Floats:
        """Give the probability of each text, [S]."""
        found = [
            [place for word in _WORD.findall(text.lower()) if (place := self.places.get(word)) is not None] for text in texts
        ]
        num_words, num_texts = len(self.places), len(texts)
        text_of = np.repeat(np.arange(num_texts), list(map(len, found)))
        keys_E, counts_E = np.unique(
            text_of * num_words + np.array([place for places in found for place in places], dtype=np.int64), return_counts=True
        )
        text_E, word_E = keys_E // num_words, keys_E % num_words
        values_E = counts_E * self.rarity_V[word_E]
        lengths_S = np.sqrt(np.bincount(text_E, values_E**2, num_texts))
        sums_SM = np.zeros((num_texts, len(self.biases_M)))
        np.add.at(sums_SM, text_E, values_E[:, None] * self.weights_VM[word_E])
        sums_SM = sums_SM / np.where(lengths_S > 0, lengths_S, 1)[:, None] + self.biases_M
        return np.asarray((1 / (1 + np.exp(self.slopes_M * sums_SM + self.offsets_M))).mean(axis=1))


def _number(scalar: Record) -> float:
    """Read a float64 of numpy, pickled as its eight bytes."""
    return float(struct.unpack("<d", scalar.arguments[1])[0])

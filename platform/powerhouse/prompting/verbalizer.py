"""Which words stand for which label: P(y | x) = sum over y's words of P(O = word | template(x)) (Schick and Schütze 2021).

Shapes: W words of all labels, one after the other, Y labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from powerhouse.errors import InputError

Floats = npt.NDArray[np.float64]


class Verbalizer:
    """Labels, and for each the words that say it; the first of them says it in an example.

    Raises:
        InputError: fewer than two labels, a label without a word, an empty word, or a word twice.
    """

    def __init__(self, words: Mapping[str, Sequence[str]]) -> None:
        self.labels = tuple(words)
        self.words = tuple(word for label in words.values() for word in label)
        self._owner_W = np.array([number for number, label in enumerate(words.values()) for _ in label], dtype=np.int64)
        self._first = {label: next(iter(of_label), "") for label, of_label in words.items()}
        if len(self.labels) < 2:
            raise InputError("a verbalizer tells labels apart", got=list(words), allowed="at least two labels")
        if empty := [label for label, of_label in words.items() if not of_label or not all(map(str.strip, of_label))]:
            raise InputError("a label without a word, or with an empty one", got=empty[0], allowed="at least one word")
        if twice := sorted({word for word in self.words if self.words.count(word) > 1}):
            raise InputError("a word stands for a label once", got=twice[0], do="take it out of one label")

    def index_of(self, label: object) -> int:
        """Give the label's number.

        Raises:
            InputError: there is no such label.
        """
        if str(label) not in self.labels:
            raise InputError("a label that the verbalizer has no word for", got=repr(label), allowed=", ".join(self.labels))
        return self.labels.index(str(label))

    def word_of(self, label: object) -> str:
        """The word that stands for the label in an example."""
        return self._first[self.labels[self.index_of(label)]]

    def check_tokens(self, ids_of_words: Sequence[Sequence[int]]) -> None:
        """Refuse words that the tokenizer does not keep apart, given their tokens in the slot.

        After the first token two labels must be told apart, for a family that fills one token at a time and for whoever reads
        its probabilities; and a word that begins as another one of its label does would be counted twice.

        Raises:
            InputError: two labels share a first token, or a word's tokens begin with those of another.
        """
        for number, ids in enumerate(ids_of_words):
            for other, others in enumerate(ids_of_words[:number]):
                if self._owner_W[number] != self._owner_W[other]:
                    if ids[0] == others[0]:
                        raise self._alike("two labels share a first token", number, other)
                elif list(ids[: len(others)]) == list(others) or list(others[: len(ids)]) == list(ids):
                    raise self._alike("a word begins with another one of its label", number, other)

    def _alike(self, what: str, number: int, other: int) -> InputError:
        pair = " and ".join(f"{self.words[i]!r} ({self.labels[self._owner_W[i]]})" for i in (other, number))
        return InputError(f"{what} in this model's tokenizer", got=pair, do="choose other words, or drop one of them")

    def probabilities(self, logprobs_W: Sequence[float] | Floats) -> Floats:
        """P(label | x) [Y] among the labels, from log P(word | x) of each word, exact up to a constant of all words."""
        logprobs = np.asarray(logprobs_W, dtype=np.float64)
        assert logprobs.shape == self._owner_W.shape, "one log-probability for each word"
        weights_W = np.exp(logprobs - logprobs.max())
        sums_Y = np.bincount(self._owner_W, weights=weights_W, minlength=len(self.labels))
        probabilities_Y: Floats = sums_Y / sums_Y.sum()
        return probabilities_Y

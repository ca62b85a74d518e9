"""A text with what several steps need of it, each made once and only when asked for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class DocumentView:
    text: str

    @cached_property
    def words(self) -> list[str]:
        return self.text.split()

    @cached_property
    def lines(self) -> list[str]:
        return [line for raw in self.text.splitlines() if (line := raw.strip())]

    @cached_property
    def normalised_words(self) -> list[str]:
        """Runs of letters and digits in lower case: the words of n-grams."""
        return _WORD.findall(self.text.lower())

"""Synonyms out of WordNet's own files (Fellbaum 1998; their format: wndb(5WN)), wherever they are installed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from functools import cached_property, lru_cache
from pathlib import Path

from powerhouse.errors import InputError

_ENDINGS = {
    "noun": "s: ses:s ves:f xes:x zes:z ches:ch shes:sh men:man ies:y",
    "verb": "s: ies:y es:e es: ed:e ed: ing:e ing:",
    "adj": "er: est: er:e est:e",
    "adv": "",
}
"""Inflections and what a base form has instead (morphy(7WN))."""


def find_wordnet(folder: Path | None) -> Path:
    """Give the folder with WordNet's files, looking where WordNet, nltk and Debian have it unless one is named.

    Raises:
        InputError: it is not there.
    """
    places = [folder] if folder else list(_usual_places())
    for place in places:
        if all((place / f"{kind}.{part}").is_file() for kind in ("index", "data") for part in _ENDINGS):
            return place
    raise InputError(
        "METEOR's synonyms need WordNet, which is not installed",
        got=f"no index.* and data.* files in {', '.join(map(str, places))}",
        do="apt-get install wordnet-base, or name the folder in `wordnet`, or leave them out by `has_synonyms: false`",
    )


def _usual_places() -> Iterator[Path]:
    if home := os.environ.get("WNHOME"):
        yield Path(home) / "dict"
    own = [folder for folder in os.environ.get("NLTK_DATA", "").split(os.pathsep) if folder]
    for folder in [*own, "~/nltk_data", "/usr/share/nltk_data"]:
        yield Path(folder).expanduser() / "corpora" / "wordnet"
    yield Path("/usr/share/wordnet")


class WordNet:
    """The part of it that METEOR asks for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._offsets = {part: _read_index(folder / f"index.{part}") for part in _ENDINGS}
        self._data = {part: (folder / f"data.{part}").read_bytes() for part in _ENDINGS}
        self._exceptions = {part: _read_exceptions(folder / f"{part}.exc") for part in _ENDINGS}
        self._found: dict[str, frozenset[str]] = {}

    @cached_property
    def digest(self) -> str:
        """Eight digits of the hash of what the answers depend on."""
        files = (self.folder / f"{kind}.{part}" for part in _ENDINGS for kind in ("index", "data"))
        parts = [*(path.read_bytes() for path in files), repr(self._exceptions).encode()]
        return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:8]

    def synonyms(self, word: str) -> frozenset[str]:
        """The word and the single words that share a meaning with one of its base forms."""
        if word not in self._found:
            self._found[word] = frozenset(self._find(word))
        return self._found[word]

    def _find(self, word: str) -> set[str]:
        found = {word}
        for part, offsets in self._offsets.items():
            for form in self._base_forms(word, part):
                for offset in offsets[form]:
                    found.update(self._words_at(part, int(offset)))
        return found

    def _base_forms(self, word: str, part: str) -> list[str]:
        forms = self._exceptions[part].get(word)
        if forms is None:
            endings = (ending.split(":") for ending in _ENDINGS[part].split())
            forms = [word[: -len(old)] + new for old, new in endings if word.endswith(old)]
        return [form for form in dict.fromkeys([word, *forms]) if form in self._offsets[part]]

    def _words_at(self, part: str, offset: int) -> Iterator[str]:
        """The synonym set at that byte: offset, file, type, number of words (hexadecimal), then each with its sense."""
        data = self._data[part]
        fields = data[offset : data.find(b"\n", offset)].decode("utf-8").split(" ")
        if fields[0] != f"{offset:08d}":
            what = f"{self.folder}: index.{part} and data.{part} do not belong together"
            raise InputError(what, got=f"no synonyms at byte {offset}", do="install WordNet again")
        for name in fields[4 : 4 + 2 * int(fields[3], 16) : 2]:
            if "_" not in name:
                yield name.partition("(")[0]  # an adjective may say where it stands: alive(p)


def _read_index(path: Path) -> dict[str, list[str]]:
    """Base form -> offsets of its synonym sets. The licence stands in front, on lines that begin with a space."""
    found = {}
    with path.open(encoding="utf-8") as file:
        for line in file:
            if not line.startswith(" "):
                fields = line.split()
                found[fields[0]] = fields[-int(fields[2]) :]
    return found


def _read_exceptions(path: Path) -> dict[str, list[str]]:
    """Irregular form -> base forms; some editions come without the file."""
    if not path.is_file():
        return {}
    lines = (line.split() for line in path.read_text(encoding="utf-8").splitlines())
    return {form: bases for form, *bases in lines}


@lru_cache(maxsize=2)
def load_wordnet(folder: Path) -> WordNet:
    """Read once a process.

    Raises:
        InputError: a file of it is damaged.
    """
    try:
        return WordNet(folder)
    except (ValueError, IndexError) as error:
        raise InputError(f"{folder}: damaged WordNet files", got=error, do="install WordNet again") from None

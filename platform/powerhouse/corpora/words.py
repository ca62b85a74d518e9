"""Words as spaCy's English rules split them, each with a number, at the price of one look-up for a run of non-spaces.

The published thresholds of Gopher's and FineWeb's rules are used with these words, punctuation marks being words of their own.
A run between white space is split once and then remembered: running text repeats its words, so that the split itself costs
next to nothing. The rules are those of spaCy 3's documentation ("How spaCy's tokenizer works"), written anew.
"""

from __future__ import annotations

import re
import string
import sys
import unicodedata
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

MAX_CHUNK_CHARS = 1000
"""A longer run of non-spaces is one word: it is no text, and nobody wants to wait for its rules."""
_MAX_KNOWN_CHUNKS = 500_000

_QUOTES = "'\"”“`‘´’‚„»«「」『』（）〔〕【】《》〈〉〈〉⟦⟧"
_PUNCTUATION = "…,:;!?¿؟¡()[]{}<>_#*&。？！，、；：～·।،۔؛٪"
_CURRENCY = "$£€¥฿₽﷼₴₠₡₢₣₤₥₦₧₨₩₪₫€₭₮₯₰₱₲₳₴₵₸₹₺₻₼₽₾₿"
_UNITS = (
    "km²|km³|km|m²|m³|m|dm²|dm³|dm|cm²|cm³|cm|mm²|mm³|mm|ha|µm|nm|yd|in|ft|kg|g|mg|µg|t|lb|oz|m/s|km/h|mph|hPa|Pa|mbar|mb|"
    "MB|kb|KB|gb|GB|tb|TB|T|G|M|K|%"
)
_HYPHENS = "-|–|—|--|---|——|~"
_ALPHA = r"[^\W\d_]"
_LOWER = "a-zà-öø-ÿа-яα-ω"
_UPPER = "A-ZÀ-ÖØ-ÞА-ЯΑ-Ω"
_ICON = "\u00a6\u00a9\u00ae\u00b0\u0482\u2100-\u214f\u2190-\u23ff\u2400-\u27bf\u2900-\u297f\u2b00-\u2bff\U0001f000-\U0001faff"

_PREFIX = re.compile(
    rf"§|%|=|—|–|\+(?![0-9])|\.\.+|…|[{re.escape(_PUNCTUATION)}]|[{_QUOTES}]|[{re.escape(_CURRENCY)}]|[{_ICON}]"
)
_SUFFIX = re.compile(
    rf"(?:…|\.\.+|[{re.escape(_PUNCTUATION)}]|[{_QUOTES}]|[{_ICON}]|['’][sS]|—|–|(?<=[0-9])\+|(?<=°[FfCcKk])\."
    rf"|(?<=[0-9])[{re.escape(_CURRENCY)}]|(?<=[0-9])(?:{_UNITS})"
    rf"|(?<=[0-9{_LOWER}%²\-+{_QUOTES}{re.escape(_PUNCTUATION)}])\.|(?<=[{_UPPER}][{_UPPER}])\.)$"
)
_INFIX = re.compile(
    rf"\.\.+|…|[{_ICON}]|(?<=[0-9])[+\-*^](?=[0-9-])|(?<=[{_LOWER}{_QUOTES}])\.(?=[{_UPPER}{_QUOTES}])"
    rf"|(?<={_ALPHA}),(?={_ALPHA})|(?<=[^\W_])(?:{_HYPHENS})(?={_ALPHA})|(?<=[^\W_])[:<>=/](?={_ALPHA})"
)
_CAN_BE_INFIX = re.compile(rf"[.…+*^,~:<>=/–—{_ICON}-]")
_SCHEME, _USER = r"(?:(?:[a-z][\w.+-]*)://|mailto:)?", r"(?:\S+(?::\S*)?@)?"
_HOST = r"(?:\d{1,3}(?:\.\d{1,3}){3}|(?:[^\W_](?:[\w-]*[^\W_])?\.)+[a-z]{2,63})(?::\d{2,5})?(?:[/?#]\S*)?"
_URL, _URL_WITH_USER = re.compile(_SCHEME + _HOST), re.compile(_SCHEME + _USER + _HOST)


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


_CONTRACTION = re.compile(
    r"(?:ai|are|ca|could|dare|did|does|do|had|has|have|is|may|might|must|need|ought|sha|should|was|were|wo|would)"
    r"n['’]?t(?:['’]?ve)?"
    r"|(?:i|you|he|she|it|we|they|who|what|when|where|why|how|there|that|this|these|those)"
    r"['’]?(?:ll|ve|re|m|d|s)(?:['’]?ve)?"
    r"|can(?=not$)not|(?:gon|got)(?=(?:na|ta)$)(?:na|ta)",
    re.IGNORECASE,
)
_CONTRACTED = re.compile(r"n['’]?t(?=$|['’]?ve$)|['’]?(?:ll|ve|re|m|d|s)$|(?<=can)not|(?<=gon)na|(?<=got)ta", re.IGNORECASE)
_UNCONTRACTED = _set("""
    here whom ill its hell shell shed were well whore theres hows whats thats hes shes is
""")
_EMOTICONS = _set("""
    :) :-) :( :-( ;) ;-) :D :-D :P :-P :p :-p :/ :-/ :| :-| :O :-O :o :-o :0 :3 :> :x :X :* :-* :] :[ =) =( =D =/ =| =3 (:
    (-: ): )-: (; (-; (= )= [: :} :{ [= =] 8) 8-) 8D 8-D XD xD <3 </3 ^_^ -_- o_O O_o o_o O.o o.O o.o 0.0 0_0 >.< >:( >:o
    ;_;
""")
_ABBREVIATIONS = _set("""
    and/or w/o E.g. I.e. &c. 's 'em 'til ol' o'clock ma'am e.g. i.e. a.m. p.m. E.G. I.E. A.M. P.M. v.s. v.v. vs. Adm.
    Bros. Co. Corp. Dr. Gen. Gov. Inc. Jr. Ltd. Md. Messrs. Mo. Mont. Mr. Mrs. Ms. Ph.D. Prof. Rep. Rev. Sen. St. Apr.
    Aug. Dec. Feb. Jan. Jul. Jun. Mar. Nov. Oct. Sep. Sept. Ala. Ariz. Ark. Calif. Colo. Conn. Del. D.C. Fla. Ga. Ia. Id.
    Ill. Ind. Kan. Kans. Ky. La. Mass. Mich. Minn. Miss. N.C. N.D. N.H. N.J. N.M. N.Y. Neb. Nebr. Nev. Okla. Ore. Pa. S.C.
    Tenn. Va. Wash. Wis.
""")
_UNSPLIT = _ABBREVIATIONS | _EMOTICONS
_ABBREVIATED_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyzäöü")
_MAX_SPECIAL_CHARS = 11  # mightn't've
_MARKS = frozenset(_PUNCTUATION + _QUOTES + "—–")  # each by itself a prefix and a suffix, and the end of no longer one
_PLAIN = frozenset(string.ascii_letters + string.digits)
_MAX_SUFFIX_CHARS = 4  # mbar; but any number of dots
_CONTRACTION_ENDS = frozenset("tedsmlaTEDSMLAſ")
_SENTENCE_ENDS = frozenset("!.?։؟۔܀܁܂‼‽⁇⁈⁉⸮﹖﹗！．？｡。")

STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
IS_WORD, HAS_LETTER, ENDS_SENTENCE, IS_OTHER_MARK, FIRST_STOP_WORD = 1, 2, 4, 8, 16
"""Bits of a word's facts: it is no mere symbol; it has a letter; it is a mark that ends a sentence, or another mark;
it is the first of the stop words, and so on, a bit for each."""
LENGTH_SHIFT = 12
"""From this bit on: its length in characters."""

Numbers = npt.NDArray[np.int64]


def split_chunk(chunk: str) -> list[str]:
    """Split one run of non-spaces into words."""
    if chunk.isalpha() and (chunk.isascii() or len(chunk) > _MAX_SPECIAL_CHARS):
        return _whole(chunk) or [chunk]
    left, right, text = [], [], chunk
    while text and not (whole := _whole(text)):
        prefix, suffix = _find_prefix(text), _find_suffix(text)
        if not (prefix or suffix):
            break
        if prefix:
            left.append(prefix)
            text = text[len(prefix) :]
            if whole := _whole(text):
                break
        if suffix and len(suffix) <= len(text):
            right.append(suffix)
            text = text[: len(text) - len(suffix)]
    if text:
        left += whole or ([text] if _is_url(text) else _split_infixes(text))
    return left + right[::-1]


def _find_prefix(text: str) -> str:
    if text[0] in _MARKS or text[0] in _PLAIN:
        return text[0] if text[0] in _MARKS else ""
    found = _PREFIX.match(text)
    return found.group() if found else ""


def _find_suffix(text: str) -> str:
    if text[-1] in _MARKS or text[-1] in string.digits:
        return text[-1] if text[-1] in _MARKS else ""
    found = _SUFFIX.search(text, 0 if text.endswith("..") else max(0, len(text) - _MAX_SUFFIX_CHARS))
    return found.group() if found else ""


def _whole(text: str) -> list[str]:
    """Give the words of a text that has rules of its own; none for any other."""
    if len(text) > _MAX_SPECIAL_CHARS:
        return []
    if text in _UNSPLIT or (len(text) == 2 and text[1] == "." and text[0] in _ABBREVIATED_LETTERS):
        return [text]
    if not text or text[-1] not in _CONTRACTION_ENDS or text in ("ID", "IM") or text.lower() in _UNCONTRACTED:
        return []
    return _cut(text, [match.start() for match in _CONTRACTED.finditer(text)]) if _CONTRACTION.fullmatch(text) else []


def _is_url(text: str) -> bool:
    return "." in text and (_URL_WITH_USER if "@" in text else _URL).fullmatch(text) is not None


def _split_infixes(text: str) -> list[str]:
    if text.isalnum() or not _CAN_BE_INFIX.search(text):
        return [text]
    found = [match for match in _INFIX.finditer(text) if match.start()]
    return _cut(text, [place for match in found for place in match.span()])


def _cut(text: str, places: list[int]) -> list[str]:
    bounds = [0, *places, len(text)]
    return [text[start:end] for start, end in pairwise(bounds) if end > start]


class Words:
    """Numbers for words, with what the rules ask of each. One worker has one; it forgets all before it grows too large."""

    def __init__(self) -> None:
        self._numbers = _Numbers()
        self._chunks = _Chunks(self._numbers)

    def encode(self, chunks: Sequence[str]) -> tuple[Numbers, Numbers, npt.NDArray[np.int32]]:
        """Give the number of each word of these runs of non-spaces, how many words each run has, and the facts of each word."""
        if len(self._chunks) > _MAX_KNOWN_CHUNKS:
            self._chunks.clear()
            self._numbers.clear()
        pieces = list(map(self._chunks.__getitem__, chunks))
        numbers = np.frombuffer(b"".join(pieces), dtype=np.int64)
        lengths = np.fromiter(map(len, pieces), dtype=np.int64, count=len(pieces))
        return numbers, lengths // numbers.itemsize, self._numbers.facts[numbers]


class _Numbers(dict[str, bytes]):
    """A number for each word met so far, in the order in which they were met, and the facts of each."""

    def __init__(self) -> None:
        self.facts = np.zeros(2**16, dtype=np.int32)

    def __missing__(self, word: str) -> bytes:
        number = len(self)
        self[word] = as_bytes = number.to_bytes(8, sys.byteorder)
        if number == len(self.facts):
            self.facts = np.concatenate([self.facts, np.zeros_like(self.facts)])
        self.facts[number] = _facts(word)
        return as_bytes


class _Chunks(dict[str, bytes]):
    """The numbers of the words of each run of non-spaces met so far, as bytes, which are quick to join to an array."""

    def __init__(self, numbers: _Numbers) -> None:
        self._numbers = numbers

    def __missing__(self, chunk: str) -> bytes:
        if len(chunk) > MAX_CHUNK_CHARS:
            return self._numbers[chunk[:MAX_CHUNK_CHARS]]
        self[chunk] = numbers = b"".join(map(self._numbers.__getitem__, split_chunk(chunk)))
        return numbers


def _facts(word: str) -> int:
    if word.isalnum():
        bits = IS_WORD | (HAS_LETTER if word.isalpha() or any(map(str.isalpha, word)) else 0)
    else:
        is_mark = all(map(_is_mark, word))
        is_symbol = is_mark or all(char in "$+<=>^`|~" or ord(char) < 32 or _is_mark(char) for char in word)
        bits = (HAS_LETTER if any(map(str.isalpha, word)) else 0) | (0 if is_symbol else IS_WORD)
        bits |= ENDS_SENTENCE if word in _SENTENCE_ENDS else IS_OTHER_MARK if is_mark else 0
    bits |= FIRST_STOP_WORD << STOP_WORDS.index(word) if word in STOP_WORDS else 0
    return bits | len(word) << LENGTH_SHIFT


def _is_mark(char: str) -> bool:
    return unicodedata.category(char)[0] == "P"

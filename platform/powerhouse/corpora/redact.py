"""Personal data in a text become a tag of their kind, <EMAIL>, or with a key a pseudonym of their own, <EMAIL:bdkfhcap>.

A pseudonym is a keyed hash of the value: equal values get equal ones in every document, run and machine, and without the key
nobody can test a guess. What a number looks like is never enough: it must pass its own check, and must not stand
after a word such as ISBN or version.
"""

from __future__ import annotations

import hashlib
import re
from bisect import bisect
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import phonenumbers
import pyarrow as pa

from powerhouse.corpora.document import Columns, Draft
from powerhouse.corpora.identifiers import NATIONAL_IDS, is_card, is_iban, is_public_address, is_random
from powerhouse.errors import InputError

KINDS = ("SECRET", "EMAIL", "IBAN", "CARD", "NATIONAL_ID", "IP", "PHONE")
"""In the order of precedence: where two finds overlap, the kind that comes first is taken."""

Span = tuple[int, int, str]

_AFTER_AT = re.compile(r"@(?:[a-zA-Z0-9-]{1,63}\.){1,8}[a-zA-Z]{2,24}(?![\w-]|\.\w|:\w)")
_BEFORE_AT = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}$")
_SPELT_OUT = re.compile(r"\b[\w.+-]{1,64} ?[\[(]at[\])] ?[\w-]{1,63} ?[\[(]dot[\])] ?[a-zA-Z]{2,24}\b")
_FILE = re.compile(r"\.(?:png|jpe?g|gif|svg|webp|ico|css|js|html?|php|py|so|whl|zip|gz)$", re.IGNORECASE)
# What stands before is looked at after the first digit: the search for one is faster than that for a place.
_IPV4 = re.compile(r"\d(?<![\w.].)(?<![A-Za-z]/.)\d{0,2}\.\d{1,3}\.\d{1,3}\.\d{1,3}(?![\w.]*\w)")
_IPV6 = re.compile(r"[23](?<![\w:.].)[0-9a-fA-F]{3}(?::[0-9a-fA-F]{0,4}){2,7}(?![\w:])")
_CARD = re.compile(r"(?<![\w.+-])(?:\d{4}([ -])\d{4}\1\d{4}\1\d{4}|\d{4}([ -])\d{6}\2\d{4,5}|\d{13,19})(?![\w-]|\.\d)")
_IBAN = re.compile(r"(?<!\w)[A-Z]{2}\d{2}(?:([ -]?)[A-Z0-9]{4}(?:\1[A-Z0-9]{4}){1,6}(?:\1[A-Z0-9]{1,3})?)(?!\w)")
_CHECKED: list[tuple[re.Pattern[str], Callable[[str], bool], str]] = [
    (_IBAN, is_iban, "IBAN"),
    (_CARD, is_card, "CARD"),
    *(
        (re.compile(rf"(?<![\w.+-])(?:{form})(?![\w-]|\.\d)"), is_valid, "NATIONAL_ID")
        for form, is_valid in NATIONAL_IDS.values()
    ),
]
_KEY_STARTS = (
    "AKIA", "ASIA", "gho_", "ghp_", "ghr_", "ghs_", "ghu_", "github_pat_", "glpat-", "xox", "k_live_", "k_test_", "sk-", "AIza",
    "hf_", "npm_", "pypi-", "eyJ",
)  # fmt: skip
_KEY = re.compile(
    r"(?<!\w)(?:A[KS]IA[0-9A-Z]{16}|gh[opsru]_\w{36,255}|github_pat_\w{22,255}|glpat-[\w-]{20,64}|xox[abprs]-[\w-]{10,255}"
    r"|[rs]k_(?:live|test)_\w{16,255}|sk-(?:proj-|ant-)?[\w-]{20,255}|AIza[\w-]{35}|hf_\w{30,64}|npm_\w{36}|pypi-[\w-]{50,255}"
    r"|eyJ[\w-]{8,4096}\.eyJ[\w-]{8,4096}\.[\w-]{8,4096})(?![\w-])"
)
_PRIVATE_KEY = re.compile(r"-----BEGIN (?P<name>[A-Z ]{0,20}PRIVATE KEY)-----[\s\w+/=:,-]{16,8192}?-----END (?P=name)-----")
_ASSIGNED = re.compile(r"[:=]\s{0,3}[\"']?([\w+/=.~!@#$%^&*-]{12,256})(?![\w(\[])")
_SECRET_NAME = re.compile(r"(?:pass(?:word|wd|phrase)|secret|token|api[_-]?key|access[_-]?key)[\"']?\s{0,3}$", re.IGNORECASE)
_IN_ADDRESS = re.compile(r"://[^\s/@:]{1,64}:([^\s/@:<]{3,128})(?=@)")
_DIALLED = re.compile(
    r"(?:tel|phone|call|fax|mobile|cell|whatsapp|dial|ring|sms|text|contact|number is)\W{0,3}(?:\w+\W+){0,3}$", re.IGNORECASE
)
_OTHER_FORM = re.compile(r"\d{1,3}(?:\.\d{1,3}){3}|\d{6}[-+]\d{4}|\d{3}\.\d{3}\.\d{3}-\d{2}")
"""An address, a Swedish or a Brazilian number: those that are none are no phone number either."""
_OTHER_NUMBER = re.compile(
    r"(?:isbn|issn|doi|10\.\d{4,9}/\S*|arxiv|pmid|oclc|lccn|rfc|version|ver\.?|release|build|section|chapter|figure|table|oid"
    r"|\bv)(?:-1[03])?[\s:#=.(]{0,3}$",
    re.IGNORECASE,
)
_CONTEXT_CHARS = 40
_MIN_KEY_BYTES = 16
_MIN_DIGITS = 6
_WINDOW_CHARS = 24
_PSEUDONYM_LETTERS = str.maketrans("0123456789abcdef", "abcdefghijklmnop")  # no digits, which could look like a number


def redact(text: str, phone_region: str, key: str | None = None) -> tuple[str, dict[str, int]]:
    """Replace what is found; return the new text and how many of each kind.

    `phone_region` is the country (ISO 3166) whose national numbers count as phone numbers; international ones always do.
    Only public addresses are personal: 127.0.0.1 or 10.0.0.1 stay. With a `key` each becomes its pseudonym.
    """
    pieces, end, counts = [], 0, Counter[str]()
    for start, stop, kind in find(text, phone_region):
        pieces += [text[end:start], _tag(kind, text[start:stop], key)]
        counts[kind] += 1
        end = stop
    return "".join([*pieces, text[end:]]), dict(counts)


def find(text: str, phone_region: str) -> list[Span]:
    """Give start, stop and kind of all that is personal, in order and without overlaps."""
    windows = digit_windows(text)
    taken: list[Span] = []
    for spans in (
        _secrets(text),
        _emails(text),
        _numbers(text, windows),
        _addresses(text),
        _phones(text, windows, phone_region),
    ):
        _take(taken, spans)
    return taken


def digit_windows(text: str) -> list[tuple[int, int]]:
    """Give the stretches of a text that have 6 digits within 24 characters, and 24 characters around each."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    digits = np.flatnonzero((codes >= ord("0")) & (codes <= ord("9")))
    last = _MIN_DIGITS - 1
    is_dense = digits[last:] - digits[:-last] < _WINDOW_CHARS
    windows: list[tuple[int, int]] = []
    for first, final in zip(digits[:-last][is_dense].tolist(), digits[last:][is_dense].tolist(), strict=True):
        start, stop = max(0, first - _WINDOW_CHARS), min(len(text), final + 1 + _WINDOW_CHARS)
        if windows and start <= windows[-1][1]:
            windows[-1] = (windows[-1][0], stop)
        else:
            windows.append((start, stop))
    return windows


def _take(taken: list[Span], spans: Iterator[Span]) -> None:
    """Put in what overlaps nothing that is there; both in order."""
    for span in spans:
        place = bisect(taken, span)
        is_after = place == 0 or taken[place - 1][1] <= span[0]
        if is_after and (place == len(taken) or span[1] <= taken[place][0]):
            taken.insert(place, span)


def _tag(kind: str, value: str, key: str | None) -> str:
    if key is None:
        return f"<{kind}>"
    same = value.casefold() if kind == "EMAIL" else re.sub(r"[^\w:.+/=]", "", value)
    digest = hashlib.blake2b(f"{kind}\0{same}".encode(), key=hashlib.sha256(key.encode()).digest(), digest_size=5).hexdigest()
    return f"<{kind}:{digest.translate(_PSEUDONYM_LETTERS)}>"


def _secrets(text: str) -> Iterator[Span]:
    if "PRIVATE KEY-----" in text:
        yield from ((*match.span(), "SECRET") for match in _PRIVATE_KEY.finditer(text))
    if any(start in text for start in _KEY_STARTS):
        yield from ((*match.span(), "SECRET") for match in _KEY.finditer(text) if is_random(match.group()))
    for match in _ASSIGNED.finditer(text):
        if _SECRET_NAME.search(text[max(0, match.start() - _CONTEXT_CHARS) : match.start()]) and is_random(match[1]):
            yield (*match.span(1), "SECRET")
    if "://" in text and "@" in text:
        yield from ((*match.span(1), "SECRET") for match in _IN_ADDRESS.finditer(text))


def _emails(text: str) -> Iterator[Span]:
    if "@" in text:
        for match in _AFTER_AT.finditer(text):
            local = _BEFORE_AT.search(text[max(0, match.start() - 65) : match.start()])
            if local and not _FILE.search(match.group()):
                yield match.start() - len(local.group()), match.end(), "EMAIL"
    if "dot]" in text or "dot)" in text:
        yield from ((*match.span(), "EMAIL") for match in _SPELT_OUT.finditer(text))


def _numbers(text: str, windows: list[tuple[int, int]]) -> Iterator[Span]:
    for pattern, is_valid, kind in _CHECKED:
        for start, stop in windows:
            for match in pattern.finditer(text, start, stop):
                if is_valid(match.group()) and not _is_other_number(text, match.start()):
                    yield (*match.span(), kind)


def _addresses(text: str) -> Iterator[Span]:
    for pattern in (_IPV4, _IPV6):
        for match in pattern.finditer(text):
            if is_public_address(match.group()) and not _is_other_number(text, match.start()):
                yield (*match.span(), "IP")


def _phones(text: str, windows: list[tuple[int, int]], region: str) -> Iterator[Span]:
    for first, last in windows:
        for match in phonenumbers.PhoneNumberMatcher(text[first:last], region, max_tries=last - first):
            raw = match.raw_string
            is_in_brackets = raw.startswith("(") and ")" not in raw  # "(+48 12 ...)": the bracket is the sentence's
            start, stop = first + match.start + is_in_brackets, first + match.end
            number = raw.strip("() ")
            # Ten digits alone are more often a number of something else.
            is_named = not number.isdigit() or _DIALLED.search(text[max(0, start - _CONTEXT_CHARS) : start])
            if is_named and not _OTHER_FORM.fullmatch(number) and not _is_other_number(text, start):
                yield start, stop, "PHONE"


def _is_other_number(text: str, start: int) -> bool:
    """The words before say that the number is that of a book, a version, a figure."""
    return bool(_OTHER_NUMBER.search(text[max(0, start - _CONTEXT_CHARS) : start]))


PERSONAL_COLUMNS: Columns = tuple((f"num_{kind.lower()}s", pa.int32()) for kind in KINDS)


class Redact:
    """The document step: personal data out, and how many of each kind as columns."""

    schema = PERSONAL_COLUMNS

    def __init__(self, phone_region: str, key: str | None = None) -> None:
        self._phone_region = phone_region
        self._key = key

    def __call__(self, draft: Draft) -> None:
        text, found = redact(draft.text, self._phone_region, self._key)
        draft.replace_text(text)
        draft.columns |= {name: found.get(kind, 0) for kind, (name, _) in zip(KINDS, PERSONAL_COLUMNS, strict=True)}


def read_key(path: Path | None) -> str | None:
    """Read the key of the pseudonyms; none without a file.

    Raises:
        InputError: the file is missing, or holds less than 16 bytes.
    """
    if path is None:
        return None
    try:
        key = path.read_bytes().strip().hex()
    except OSError as error:
        raise InputError("the key of the pseudonyms cannot be read", got=error, do="correct pseudonym_key_file") from None
    if len(key) < 2 * _MIN_KEY_BYTES:
        raise InputError(
            f"{path}: too short for a key", got=f"{len(key) // 2} bytes", allowed=f"{_MIN_KEY_BYTES} or more random bytes"
        )
    return key

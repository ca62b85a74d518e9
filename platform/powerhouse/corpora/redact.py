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
from collections.abc import Iterator

import phonenumbers

from powerhouse.corpora.identifiers import NATIONAL_IDS, is_card, is_iban, is_public_address, is_random

KINDS = ("SECRET", "EMAIL", "IBAN", "CARD", "NATIONAL_ID", "IP", "PHONE")
"""In the order of precedence: where two finds overlap, the kind that comes first is taken."""

Span = tuple[int, int, str]

_EMAIL = re.compile(
    r"(?<![\w.+-])[\w.+-]{1,64}@(?:[a-zA-Z0-9-]{1,63}\.){1,8}[a-zA-Z]{2,24}(?![\w-]|\.\w|:\w)"
    r"|(?<![\w.+-])[\w.+-]{1,64} ?[\[(]at[\])] ?[\w-]{1,63} ?[\[(]dot[\])] ?[a-zA-Z]{2,24}\b"
)
_FILE = re.compile(r"\.(?:png|jpe?g|gif|svg|webp|ico|css|js|html?|php|py|so|whl|zip|gz)$", re.IGNORECASE)
_IPV4 = re.compile(r"(?<![\w.])(?<![A-Za-z]/)(?:\d{1,3}\.){3}\d{1,3}(?![\w.]*\w)")
_IPV6 = re.compile(r"(?<![\w:.])[23][0-9a-fA-F]{3}(?::[0-9a-fA-F]{0,4}){2,7}(?![\w:])")
_CARD = re.compile(r"(?<![\w.+-])(?:\d{4}([ -])\d{4}\1\d{4}\1\d{4}|\d{4}([ -])\d{6}\2\d{4,5}|\d{13,19})(?![\w-]|\.\d)")
_IBAN = re.compile(r"(?<!\w)[A-Z]{2}\d{2}(?:([ -]?)[A-Z0-9]{4}(?:\1[A-Z0-9]{4}){1,6}(?:\1[A-Z0-9]{1,3})?)(?!\w)")
_NATIONAL_IDS = [(re.compile(rf"(?<![\w.+-]){form}(?![\w-]|\.\d)"), is_valid) for form, is_valid in NATIONAL_IDS.values()]
_SECRET = re.compile(
    r"(?<!\w)(?:A[KS]IA[0-9A-Z]{16}|gh[opsru]_\w{36,255}|github_pat_\w{22,255}|glpat-[\w-]{20,64}|xox[abprs]-[\w-]{10,255}"
    r"|[rs]k_(?:live|test)_\w{16,255}|sk-(?:proj-|ant-)?[\w-]{20,255}|AIza[\w-]{35}|hf_\w{30,64}|npm_\w{36}|pypi-[\w-]{50,255}"
    r"|eyJ[\w-]{8,4096}\.eyJ[\w-]{8,4096}\.[\w-]{8,4096})(?![\w-])"
)
_PRIVATE_KEY = re.compile(r"-----BEGIN (?P<name>[A-Z ]{0,20}PRIVATE KEY)-----[\s\w+/=:,-]{16,8192}?-----END (?P=name)-----")
_ASSIGNED = re.compile(
    r"(?i:pass(?:word|wd|phrase)|secret|token|api[_-]?key|access[_-]?key)[\"']?\s{0,3}[:=]\s{0,3}[\"']?"
    r"(?P<value>[\w+/=.~!@#$%^&*-]{12,256})(?![\w(\[])"
    r"|://[^\s/@:]{1,64}:(?P<password>[^\s/@:]{3,128})(?=@)"
)
_MAYBE_PHONE = re.compile(r"\d(?:[\s().+/-]{0,3}\d){6}")
_DIALLED = re.compile(
    r"(?:tel|phone|call|fax|mobile|cell|whatsapp|dial|ring|sms|text|contact|number is)\W{0,3}(?:\w+\W+){0,3}$", re.I
)
_OTHER_NUMBER = re.compile(
    r"(?:isbn|issn|doi|10\.\d{4,9}/\S*|arxiv|pmid|oclc|lccn|rfc|version|ver\.?|release|build|section|chapter|figure|table|oid"
    r"|\bv)(?:-1[03])?[\s:#=.(]{0,3}$",
    re.IGNORECASE,
)
_CONTEXT_CHARS = 40
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
    has_digits = any(digit in text for digit in "0123456789")
    taken: list[Span] = []
    for finder in (_secrets, _emails):
        _take(taken, finder(text))
    if has_digits:
        for spans in (_numbers(text), _addresses(text), _phones(text, phone_region)):
            _take(taken, spans)
    return taken


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
    for pattern in (_PRIVATE_KEY, _SECRET):
        yield from ((*match.span(), "SECRET") for match in pattern.finditer(text) if is_random(match.group()))
    for match in _ASSIGNED.finditer(text):
        name = match.lastgroup or ""
        if name == "password" or is_random(match[name]):
            yield (*match.span(name), "SECRET")


def _emails(text: str) -> Iterator[Span]:
    if "@" in text or "at]" in text or "at)" in text:
        yield from ((*match.span(), "EMAIL") for match in _EMAIL.finditer(text) if not _FILE.search(match.group()))


def _numbers(text: str) -> Iterator[Span]:
    for pattern, is_valid, kind in (
        (_IBAN, is_iban, "IBAN"),
        (_CARD, is_card, "CARD"),
        *((pattern, is_valid, "NATIONAL_ID") for pattern, is_valid in _NATIONAL_IDS),
    ):
        for match in pattern.finditer(text):
            if is_valid(match.group()) and not _is_other_number(text, match.start()):
                yield (*match.span(), kind)


def _addresses(text: str) -> Iterator[Span]:
    for pattern in (_IPV4, _IPV6):
        for match in pattern.finditer(text):
            if is_public_address(match.group()) and not _is_other_number(text, match.start()):
                yield (*match.span(), "IP")


def _phones(text: str, region: str) -> Iterator[Span]:
    if not _MAYBE_PHONE.search(text):
        return
    for match in phonenumbers.PhoneNumberMatcher(text, region, max_tries=len(text)):
        before = text[max(0, match.start - _CONTEXT_CHARS) : match.start]
        is_bare = match.raw_string.isdigit()
        if not _is_other_number(text, match.start) and (not is_bare or _DIALLED.search(before)):
            yield match.start, match.end, "PHONE"


def _is_other_number(text: str, start: int) -> bool:
    """The words before say that the number is that of a book, a version, a figure."""
    return bool(_OTHER_NUMBER.search(text[max(0, start - _CONTEXT_CHARS) : start]))

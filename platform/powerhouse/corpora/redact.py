"""Personal data in a text become a tag of their type: <EMAIL>, <PHONE>, <IP>."""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Iterator

import phonenumbers

_EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?:[a-zA-Z0-9-]{1,63}\.){1,8}[a-zA-Z]{2,24}(?![\w-])")
_IPV4 = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w.]*\w)")
_IPV6 = re.compile(r"(?<![\w:.])[0-9a-fA-F]{0,4}(?::[0-9a-fA-F]{0,4}){2,7}(?![\w:])")
_MAYBE_PHONE = re.compile(r"\d[\d\s().+-]{5,}\d")

Span = tuple[int, int, str]


def redact(text: str, phone_region: str) -> tuple[str, dict[str, int]]:
    """Replace what is found; return the new text and how many of each type.

    `phone_region` is the country (ISO 3166) whose national numbers count as phone numbers; international ones always do.
    Only public addresses are personal: 127.0.0.1 or 10.0.0.1 stay.
    """
    spans = sorted({*_emails(text), *_addresses(text), *_phones(text, phone_region)})
    pieces, end, counts = [], 0, Counter[str]()
    for start, stop, kind in spans:
        if start >= end:
            pieces += [text[end:start], f"<{kind}>"]
            counts[kind] += 1
            end = stop
    return "".join([*pieces, text[end:]]), dict(counts)


def _emails(text: str) -> Iterator[Span]:
    if "@" in text:
        yield from ((*match.span(), "EMAIL") for match in _EMAIL.finditer(text))


def _addresses(text: str) -> Iterator[Span]:
    for pattern in (_IPV4, _IPV6):
        yield from ((*match.span(), "IP") for match in pattern.finditer(text) if _is_public(match.group()))


def _is_public(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_global
    except ValueError:
        return False


def _phones(text: str, region: str) -> Iterator[Span]:
    if _MAYBE_PHONE.search(text):
        found = phonenumbers.PhoneNumberMatcher(text, region, max_tries=len(text))
        yield from ((match.start, match.end, "PHONE") for match in found)

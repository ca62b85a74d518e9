from __future__ import annotations

import pytest

from powerhouse.corpora.redact import redact

FOUND = [
    ("Write to ada.lovelace+notes@example.co.uk.", "Write to <EMAIL>.", {"EMAIL": 1}),
    ("a@example.com, b@example.com", "<EMAIL>, <EMAIL>", {"EMAIL": 2}),
    ("Call (650) 253-0000 or +49 30 901820 now", "Call <PHONE> or <PHONE> now", {"PHONE": 2}),
    ("from 8.8.8.8 to 2001:4860:4860::8888", "from <IP> to <IP>", {"IP": 2}),
    ("8.8.8.8: a@example.com", "<IP>: <EMAIL>", {"IP": 1, "EMAIL": 1}),
]
LEFT = [
    "on 127.0.0.1, 10.0.0.1, 192.168.1.20, ::1 and fe80::1",
    "version 2.1.9, 300.1.1.1 and 1.2.3.4.5",
    "scott@localhost; me @ home; C++ std::vector::push_back at 12:30:45",
    "in 1605, at 12:30, for 1,000,000 crowns on page 1234567",
]


@pytest.mark.parametrize(("text", "expected", "counts"), FOUND)
def test_personal_data_become_tags_of_their_type(text: str, expected: str, counts: dict[str, int]) -> None:
    assert redact(text, "US") == (expected, counts)


@pytest.mark.parametrize("text", LEFT)
def test_what_only_looks_alike_stays(text: str) -> None:
    assert redact(text, "US") == (text, {})


def test_a_national_number_counts_in_its_own_region_only() -> None:
    text = "Ruf an: 030 901820"
    assert redact(text, "DE") == ("Ruf an: <PHONE>", {"PHONE": 1})
    assert redact(text, "US") == (text, {})


def test_redacting_again_changes_nothing() -> None:
    once, _ = redact("a@example.com called +49 30 901820 from 8.8.8.8", "US")
    assert redact(once, "US") == (once, {})

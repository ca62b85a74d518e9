from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from planted import personal_data
from powerhouse.corpora.document import Draft, RawDocument
from powerhouse.corpora.redact import KINDS, Redact, digit_windows, find, read_key, redact
from powerhouse.errors import InputError

FOUND = [
    ("Write to ada.lovelace+notes@example.co.uk.", "Write to <EMAIL>.", {"EMAIL": 1}),
    ("a@example.com, b@example.com", "<EMAIL>, <EMAIL>", {"EMAIL": 2}),
    ("ada [at] example [dot] org", "<EMAIL>", {"EMAIL": 1}),
    ("Call (650) 253-0000 or +49 30 901820 now", "Call <PHONE> or <PHONE> now", {"PHONE": 2}),
    ("from 8.8.8.8 to 2001:4860:4860::8888", "from <IP> to <IP>", {"IP": 2}),
    ("8.8.8.8: a@example.com", "<IP>: <EMAIL>", {"IP": 1, "EMAIL": 1}),
    # Numbers that their issuers publish as examples.
    ("card 4111 1111 1111 1111, 3782-822463-10005", "card <CARD>, <CARD>", {"CARD": 2}),
    ("DE89 3704 0044 0532 0130 00 or GB82WEST12345698765432", "<IBAN> or <IBAN>", {"IBAN": 2}),
    ("SSN 078-05-1120, NINO JG 12 14 16 B", "SSN <NATIONAL_ID>, NINO <NATIONAL_ID>", {"NATIONAL_ID": 2}),
    ("DNI 12345678Z, NIE X1234567L", "DNI <NATIONAL_ID>, NIE <NATIONAL_ID>", {"NATIONAL_ID": 2}),
    ("2 69 05 49 588 157 80, 255 08 14 168 025 38", "<NATIONAL_ID>, <NATIONAL_ID>", {"NATIONAL_ID": 2}),
    ("CPF 529.982.247-25", "CPF <NATIONAL_ID>", {"NATIONAL_ID": 1}),
    ("RSSMRA85T10A562S", "<NATIONAL_ID>", {"NATIONAL_ID": 1}),
    ("811218-9876 and SIN 130-692-544", "<NATIONAL_ID> and SIN <NATIONAL_ID>", {"NATIONAL_ID": 2}),
    ("redis://user:hunter2@cache:6379/0", "redis://user:<SECRET>@cache:6379/0", {"SECRET": 1}),
]
LEFT = [
    "on 127.0.0.1, 10.0.0.1, 192.168.1.20, ::1 and fe80::1",
    "version 2.1.9, 300.1.1.1 and 1.2.3.4.5",
    "scott@localhost; me @ home; C++ std::vector::push_back at 12:30:45",
    "in 1605, at 12:30, for 1,000,000 crowns on page 1234567",
    "ISBN 978-0-306-40615-7, doi:10.1000/6502530000, RFC 8200",
    "card 4111 1111 1111 1112, account DE89 3704 0044 0532 0130 01",
]


@pytest.mark.parametrize(("text", "expected", "counts"), FOUND)
def test_personal_data_become_tags_of_their_kind(text: str, expected: str, counts: dict[str, int]) -> None:
    assert redact(text, "US") == (expected, counts)


@pytest.mark.parametrize("text", LEFT)
def test_what_only_looks_alike_stays(text: str) -> None:
    assert redact(text, "US") == (text, {})


def test_precision_and_recall_of_each_kind_on_planted_texts_are_over_95_percent() -> None:
    cases = personal_data()
    assert sum(case.is_personal for case in cases) > 500
    assert sum(not case.is_personal for case in cases) > 500
    planted, found, right = Counter[str](), Counter[str](), Counter[str]()
    for case in cases:
        start = case.text.index(case.value)
        spans = find(case.text, "US")
        planted[case.kind] += case.is_personal
        found.update(kind for _, _, kind in spans)
        right[case.kind] += case.is_personal and (start, start + len(case.value), case.kind) in spans
    assert min(right[kind] / found[kind] for kind in KINDS) > 0.95
    assert min(right[kind] / planted[kind] for kind in KINDS) > 0.95


def test_a_national_number_counts_in_its_own_region_only() -> None:
    text = "Ruf an: 030 901820"
    assert redact(text, "DE") == ("Ruf an: <PHONE>", {"PHONE": 1})
    assert redact(text, "US") == (text, {})


PSEUDONYMS = [
    ("Ada@Example.com", "ada@example.com", True),
    ("4111 1111 1111 1111", "4111-1111-1111-1111", True),
    ("ada@example.com", "bob@example.com", False),
]


@pytest.mark.parametrize(("one", "other", "is_same"), PSEUDONYMS)
def test_a_pseudonym_is_of_the_value_and_the_key_alone(one: str, other: str, is_same: bool) -> None:
    first = redact(one, "US", "key")[0]
    assert first != one
    assert (redact(f"Well: {other}!", "DE", "key")[0] == f"Well: {first}!") == is_same
    assert redact(one, "US", "another key")[0] != first


@pytest.mark.parametrize("key", [None, "a key"])
def test_redacting_again_changes_nothing(key: str | None) -> None:
    for case in personal_data(1):
        once, _ = redact(case.text, "US", key)
        assert redact(once, "US", key) == (once, {})


def test_a_window_is_where_six_digits_stand_close_together() -> None:
    text = "x" * 100 + "12345" + "y" * 100 + "123 456" + "z" * 100 + "1" + "-" * 23 + "23456"
    assert [text[start:stop].strip("yz") for start, stop in digit_windows(text)] == ["123 456"]
    assert digit_windows("") == []


def test_a_text_without_end_or_with_half_a_surrogate_pair_is_read() -> None:
    assert redact("\ud800 a@example.com", "US") == ("\ud800 <EMAIL>", {"EMAIL": 1})
    for hard in ("1 " * 20_000, "a." * 20_000 + "@", "password=" * 5_000, ":" * 50_000, "2001:" * 9_000):
        assert redact(hard, "US")[1].keys() <= {"PHONE"}


def test_the_step_changes_the_text_and_counts_every_kind() -> None:
    draft = Draft(RawDocument(0, "text", ""), "ada@example.com from 8.8.8.8")
    step = Redact("US")
    step(draft)
    assert draft.text == "<EMAIL> from <IP>"
    assert draft.columns == {name: int(name in ("num_emails", "num_ips")) for name, _ in step.schema}


def test_a_key_is_read_from_its_file_and_a_missing_or_short_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(b"\xff" * 16 + b"\n")
    assert read_key(tmp_path / "key") == "ff" * 16
    assert read_key(None) is None
    (tmp_path / "key").write_bytes(b"short\n")
    with pytest.raises(InputError, match="too short for a key\n  got: 5 bytes\n  allowed: 16 or more"):
        read_key(tmp_path / "key")
    with pytest.raises(InputError, match="the key of the pseudonyms cannot be read"):
        read_key(tmp_path / "nowhere")

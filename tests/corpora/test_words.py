from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from powerhouse.corpora import words as facts
from powerhouse.corpora.words import Words, split_chunk

# What spaCy 3.8's English tokenizer gives for each.
SPLITS = {
    "word": ["word"],
    "end.": ["end", "."],
    "(“quoted,”": ["(", "“", "quoted", ",", "”"],
    "wait...": ["wait", "..."],
    "U.S.": ["U.S."],
    "NATO.": ["NATO", "."],
    "Mr.": ["Mr."],
    "(e.g.": ["(", "e.g."],
    "don't": ["do", "n't"],
    "I'll": ["I", "'ll"],
    "king's": ["king", "'s"],
    "cannot": ["can", "not"],
    "here": ["here"],
    "well-known": ["well", "-", "known"],
    "64-bit": ["64", "-", "bit"],
    "1-2": ["1", "-", "2"],
    "3.14": ["3.14"],
    "10km": ["10", "km"],
    "$5": ["$", "5"],
    "and/or": ["and/or"],
    "this/that": ["this", "/", "that"],
    "https://example.com/a-b": ["https://example.com/a-b"],
    "f(x).": ["f(x", ")", "."],
    ":-)": [":-)"],
    "a,b": ["a", ",", "b"],
    "end.Next": ["end", ".", "Next"],
    "===": ["=", "=", "="],
    "猫も眠る": ["猫も眠る"],
}


@pytest.mark.parametrize("chunk", SPLITS)
def test_a_run_of_non_spaces_is_split_as_spacy_does(chunk: str) -> None:
    assert split_chunk(chunk) == SPLITS[chunk]


def plain_whole(text: str) -> list[str]:
    if len(text) > 11 or not text:
        return []
    if text in facts._ABBREVIATIONS | facts._EMOTICONS or facts.re.fullmatch(r"[a-zäöü]\.", text):
        return [text]
    if text not in ("ID", "IM") and text.lower() not in facts._UNCONTRACTED and facts._CONTRACTION.fullmatch(text):
        return facts._cut(text, [match.start() for match in facts._CONTRACTED.finditer(text)])
    return []


def plain_split(text: str) -> list[str]:
    """Peel one mark from each side until a rule of its own or nothing is left: no short cut for any kind of text."""
    if whole := plain_whole(text):
        return whole
    prefix, suffix = facts._PREFIX.match(text), facts._SUFFIX.search(text)
    if prefix:
        rest = text[prefix.end() :]
        if not suffix or plain_whole(rest) or len(suffix.group()) > len(rest):
            return [prefix.group(), *(plain_split(rest) if rest else [])]
        core = rest[: len(rest) - len(suffix.group())]
        return [prefix.group(), *(plain_split(core) if core else []), suffix.group()]
    if suffix:
        core = text[: len(text) - len(suffix.group())]
        return [*(plain_split(core) if core else []), suffix.group()]
    if "." in text and facts._URL_WITH_USER.fullmatch(text):
        return [text]
    return facts._cut(text, [place for found in facts._INFIX.finditer(text) if found.start() for place in found.span()])


PARTS = """a the don't can't we'd gonna 's 'S Mr. U.S e.g. x. ID 12 km kg% 1+ °C. :) . .. ... … , ( ) [ ] - -- — ~ / : = + $ é
    ſ ℃ © w.org @ http://"""


@given(st.lists(st.sampled_from(PARTS.split()), min_size=1, max_size=6).map("".join) | st.text("aB1.,'-:/@x(_)…", min_size=1))
def test_the_short_cuts_of_splitting_change_nothing(chunk: str) -> None:
    assert split_chunk(chunk) == plain_split(chunk)


def test_equal_words_have_one_number_and_facts_of_their_own() -> None:
    numbers, lengths, found = Words().encode(["the", "end,", "the", "..."])

    assert (numbers.tolist(), lengths.tolist()) == ([0, 1, 2, 0, 3], [1, 2, 1, 1])
    assert [fact >> facts.LENGTH_SHIFT for fact in found.tolist()] == [3, 3, 1, 3, 3]
    assert [bool(fact & facts.IS_WORD) for fact in found.tolist()] == [True, True, False, True, False]
    assert [bool(fact & facts.FIRST_STOP_WORD) for fact in found.tolist()] == [True, False, False, True, False]


def test_a_run_of_non_spaces_that_is_no_text_is_one_word_in_no_time() -> None:
    numbers, _, found = Words().encode(["!" * 50_000_000, "x"])

    assert len(numbers) == 2
    assert int(found[0]) >> facts.LENGTH_SHIFT == facts.MAX_CHUNK_CHARS


def test_memory_is_bounded_and_forgetting_changes_no_fact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "_MAX_KNOWN_CHUNKS", 100)
    words = Words()
    for number in range(50):
        chunks = [f"w{number}x{place}y" for place in range(10)] + ["the", "end."]
        numbers, _, found = words.encode(chunks)
        assert len(set(numbers.tolist())) == 13
        assert (found >> facts.LENGTH_SHIFT).tolist() == [len(chunk) for chunk in chunks[:-1]] + [3, 1]

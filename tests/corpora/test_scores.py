"""The fast scores against a plain second version of each, and by hand."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from powerhouse.corpora.scores import SCORES, SplitText, clean_lines, ngram_chars, score
from powerhouse.corpora.words import Words, split_chunk

TEXT = """# Gardens ...

The garden of roses lies behind a wall. It does! Nobody climbs it…
- A bullet [3] with the words

The garden of roses lies behind a wall. It does! Nobody climbs it…
short one
"""


def top_chars(words: list[str], length: int) -> int:
    grams = [" ".join(words[start : start + length]) for start in range(len(words) - length + 1)]
    counts = Counter(grams)
    return max((len(gram) * count for gram, count in [counts.most_common(1)[0]]), default=0) if grams else 0


def repeated_chars(words: list[str], length: int) -> int:
    seen: set[tuple[str, ...]] = set()
    total = place = 0
    while place <= len(words) - length:
        gram = tuple(words[place : place + length])
        if gram in seen:
            total += len("".join(gram))
            place += length
        else:
            seen.add(gram)
            place += 1
    return total


@given(st.lists(st.sampled_from(["a", "bb", "ccc", "dddd", "e", "ff"]), max_size=80) | st.text("ab", max_size=150).map(list))
def test_fast_ngram_counts_equal_the_plain_ones(words: list[str]) -> None:
    alphabet = sorted(set(words))
    numbers = np.array([alphabet.index(word) for word in words], dtype=np.int64)
    found = ngram_chars(numbers, np.array([len(word) for word in words], dtype=np.int32))

    assert {name: value for name, value in found.items() if name.startswith("top")} == {
        f"top_{length}gram_char_share": top_chars(words, length) for length in (2, 3, 4)
    }
    assert {name: value for name, value in found.items() if name.startswith("repeated")} == {
        f"repeated_{length}gram_char_share": repeated_chars(words, length) for length in range(5, 11)
    }


def test_every_score_of_a_small_text_is_as_counted_by_hand() -> None:
    found = score(TEXT, Words())
    words = [word for chunk in TEXT.split() for word in split_chunk(chunk)]
    line = "The garden of roses lies behind a wall. It does! Nobody climbs it…"

    assert list(found) == list(SCORES)
    assert found["num_words"] == 35
    assert found["symbols_per_word"] == 1 / len(words)
    assert found["ellipses_per_word"] == 3 / len(words)
    assert found["bullet_line_share"] == 1 / 7
    assert found["ellipsis_line_share"] == 3 / 7
    assert found["num_stop_words"] == 3  # of, with, the; "The" is none
    assert found["repeated_line_share"] == 1 / 5
    assert found["repeated_line_char_share"] == len(line) / len(TEXT)
    assert found["repeated_paragraph_share"] == 0
    # The lines with three words or more: heading, twice the garden, the bullet; the heading's mark is a run of its own.
    assert found["num_sentences"] == 1 + 3 + 1 + 3
    assert found["line_end_share"] == 1 / 4
    assert found["short_line_share"] == 2 / 4
    assert found["repeated_char_share"] == len(line) / sum(
        map(len, ["# Gardens ...", line, "- A bullet  with the words", line])
    )


@pytest.mark.parametrize("text", ["", "x", "\n\n", "a b", "!", "1 2 3\n" * 3])
def test_the_smallest_texts_have_scores(text: str) -> None:
    assert all(np.isfinite(value) for value in score(text, Words()).values())


LINES = {
    "one two three": True,
    "one two": False,
    "please switch on JavaScript now": False,
    "see our Privacy Policy for more": False,
    "this site Uses Cookies a lot": False,
    f"a {'x' * 1001} word here": False,
    f"a {'x' * 1000} word here": True,
}


@pytest.mark.parametrize("line", LINES)
def test_a_line_is_left_out_by_the_rule_made_for_it(line: str) -> None:
    split = SplitText.of(f"The first line stays.\n{line}", Words())

    assert clean_lines(split).lines == ["The first line stays.", *([line] if LINES[line] else [])]


def test_citations_go_and_do_not_hide_the_end_of_a_line() -> None:
    split = SplitText.of("It is so.[12][citation needed]", Words())

    assert clean_lines(split).lines == ["It is so."]
    assert score("It is so.[12][citation needed]", Words())["line_end_share"] == 1

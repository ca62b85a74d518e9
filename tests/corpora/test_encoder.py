from __future__ import annotations

import json
import unicodedata
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from fakes import TEXTS, tiny_tokenizer
from powerhouse.corpora.encoder import make_encoder, make_tiktoken
from powerhouse.corpora.vocabulary import train
from powerhouse.errors import InputError
from powerhouse.tokenizer import FILE, Tokenizer

TINY = tiny_tokenizer()
FAST = make_encoder(TINY)


def changed(directory: Path, change: dict[str, object], part: str | None = None) -> Tokenizer:
    """The tiny tokenizer with other values in its file."""
    description = json.loads(TINY.core.to_str())
    (description[part] if part else description).update(change)
    (directory / FILE).write_text(json.dumps(description))
    return Tokenizer.load(directory)


def boundary_texts() -> list[str]:
    """Every character whose class differs from the one before it, next to a letter, a digit, a mark, a blank and itself."""
    chars = [chr(code) for code in range(1, 0x110000) if not 0xD7FF < code < 0xE001]
    edges = [char for before, char in pairwise(chars) if unicodedata.category(before) != unicodedata.category(char)]
    return [f"a{char}b 1{char}2 !{char}? {char}{char} \n{char}\t {char} '{char}s" for char in edges]


@given(st.text())
def test_any_text_has_the_ids_that_tokenizers_gives(text: str) -> None:
    assert make_tiktoken(TINY) is not None
    assert FAST([text, text + " it was"]) == TINY.encode_batch([text, text + " it was"])


@pytest.mark.slow
def test_texts_are_split_at_the_same_places_wherever_the_class_of_a_character_changes() -> None:
    texts = boundary_texts()
    assert len(texts) > 3000
    tokenizer = Tokenizer.train(texts, 20_000)  # so many merges that a text that is split elsewhere has other tokens
    assert make_tiktoken(tokenizer) is not None
    assert make_encoder(tokenizer)(texts) == tokenizer.encode_batch(texts)


def test_long_words_and_long_blanks_have_the_same_ids() -> None:
    random = Random(0)
    texts = [
        "".join(random.choices("itwase", k=20_000)),
        "a" * 30_000,
        "x" + " " * 600_000 + "x",
        "\n" * 600_000,
        " " * 999 + "x",
    ]
    assert FAST(texts) == TINY.encode_batch(texts)


def test_a_text_that_spells_the_end_of_a_text_is_text() -> None:
    ids = FAST(["<|endoftext|>"])[0]
    assert len(ids) > 1
    assert TINY.decode(ids) == "<|endoftext|>"


def test_a_tokenizer_whose_merges_tiktoken_would_not_follow_is_used_itself(tmp_path: Path) -> None:
    """Here `ab` and `c` are no merge, though `abc` is a token."""
    letters = {letter: number for number, letter in enumerate(sorted(json.loads(TINY.core.to_str())["model"]["vocab"]))
               if len(letter) == 1}  # fmt: skip
    first = len(letters)
    vocabulary = letters | {"ab": first, "bc": first + 1, "abc": first + 2}
    merges = [["a", "b"], ["b", "c"], ["a", "bc"]]
    odd = changed(tmp_path, {"vocab": vocabulary | {"<|endoftext|>": first + 3}, "merges": merges}, "model")
    assert make_tiktoken(odd) is None
    assert [odd.core.id_to_token(number) for number in make_encoder(odd)(["abc"])[0]] == ["ab", "c"]


OTHERS = [
    ({"normalizer": {"type": "NFC"}}, None),
    ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}}, None),
    ({"pre_tokenizer": {"type": "Whitespace"}}, None),
    ({"ignore_merges": True}, "model"),
    ({"byte_fallback": True}, "model"),
]


@pytest.mark.parametrize(("change", "part"), OTHERS)
def test_a_tokenizer_that_does_more_than_byte_level_bpe_is_used_itself(
    tmp_path: Path, change: dict[str, object], part: str | None
) -> None:
    other = changed(tmp_path, change, part)
    assert make_tiktoken(other) is None
    assert make_encoder(other)(TEXTS) == other.encode_batch(TEXTS)


@pytest.mark.parametrize("method", ["bpe", "unigram"])
def test_a_learnt_vocabulary_encodes_every_string_and_decodes_it_to_itself(tmp_path: Path, method: str) -> None:
    tokenizer = train(method, TEXTS * 3, 280, tmp_path)  # type: ignore[arg-type]
    again = Tokenizer.load(tmp_path)
    kind = type(tokenizers.Tokenizer.from_file(str(tmp_path / FILE)).model).__name__
    assert (tokenizer.vocab_size, again.end_of_text_id, kind.lower()) == (280, 0, method)
    for text in [*TEXTS, "\x00 never seen: ÿ 龍\n\n", "<|endoftext|>"]:
        ids = make_encoder(again)([text])[0]
        assert again.decode(ids) == text
        assert 0 not in ids


@pytest.mark.parametrize(
    ("method", "message"), [("bpe", "larger than the text can give"), ("unigram", "cannot give a unigram")]
)
def test_a_vocabulary_larger_than_the_text_is_one_error(tmp_path: Path, method: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        train(method, ["a b"], 5000, tmp_path)  # type: ignore[arg-type]

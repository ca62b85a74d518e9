from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from fakes import TEXTS, tiny_tokenizer
from powerhouse.errors import InputError, ModelFormatError
from powerhouse.tokenizer import Tokenizer

TOKENIZER = tiny_tokenizer()


@given(st.text())
def test_every_text_decodes_to_itself(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_a_text_that_spells_the_end_of_text_token_stays_text() -> None:
    ids = TOKENIZER.encode("a<|endoftext|>b")

    assert TOKENIZER.end_of_text_id not in ids
    assert TOKENIZER.decode([*ids, TOKENIZER.end_of_text_id]) == "a<|endoftext|>b"


def test_training_is_deterministic_and_gives_the_size_asked_for() -> None:
    again = tiny_tokenizer()

    assert (again.vocab_size, again.end_of_text_id) == (300, 0)
    assert again.core.to_str() == TOKENIZER.core.to_str()


def test_transformers_loads_it_and_encodes_alike(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)

    assert theirs.eos_token_id == TOKENIZER.end_of_text_id
    for text in TEXTS:
        assert theirs(text, add_special_tokens=False)["input_ids"] == TOKENIZER.encode(text)
        assert Tokenizer.load(tmp_path).encode(text) == TOKENIZER.encode(text)


def test_a_vocabulary_larger_than_the_text_can_give_is_refused() -> None:
    with pytest.raises(InputError, match=r"larger than the text can give\n  got: vocab_size=5000\n  allowed: 257 to \d+"):
        Tokenizer.train(TEXTS, 5000)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nothing", "", "tokenizer.json: missing"),
        ("tokenizer.json", "{", "tokenizer.json: damaged"),
        ("tokenizer_config.json", '{"eos_token": "<nope>"}', "end-of-text token is not in the vocabulary\n  got: <nope>"),
    ],
)
def test_a_damaged_directory_is_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    if name != "nothing":
        TOKENIZER.save(tmp_path)
        (tmp_path / name).write_text(content)

    with pytest.raises(ModelFormatError) as caught:
        Tokenizer.load(tmp_path)
    assert message in str(caught.value)

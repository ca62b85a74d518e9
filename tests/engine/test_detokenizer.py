from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fakes import TEXTS, tiny_tokenizer
from powerhouse.engine.detokenizer import TextStream

TOKENIZER = tiny_tokenizer()
Ids = st.lists(st.integers(0, TOKENIZER.vocab_size - 1), max_size=40)
TextIds = st.sampled_from(TEXTS).map(TOKENIZER.encode)


def stream(ids: list[int], stop: tuple[str, ...] = ()) -> list[str]:
    """The pieces, one a token, up to the stop string."""
    text = TextStream(TOKENIZER, stop)
    pieces = []
    for token_id in ids:
        pieces.append(text.push([token_id]))
        if text.is_stopped:
            break
    return [*pieces, text.finish()]


@given(Ids | TextIds)
def test_the_pieces_are_the_whole_text_less_a_last_half_character(ids: list[int]) -> None:
    assert "".join(stream(ids)) == TOKENIZER.decode(ids).removesuffix("\ufffd")


def test_a_character_of_several_tokens_comes_in_one_piece() -> None:
    ids = TOKENIZER.encode("naïf 🐈!")
    pieces = stream(ids)
    assert len(ids) > len("naïf 🐈!"), "the text has characters of several tokens"
    assert "".join(pieces) == "naïf 🐈!"
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_that_lacks_its_last_byte_is_not_given_out() -> None:
    ids = TOKENIZER.encode("a🐈")
    assert "".join(stream(ids[:-1])) == "a"


@given(TextIds, st.data())
def test_the_text_ends_before_the_first_stop_string_wherever_tokens_end(ids: list[int], data: st.DataObject) -> None:
    whole = TOKENIZER.decode(ids)
    starts = data.draw(st.lists(st.integers(0, len(whole) - 1), min_size=1, max_size=3))
    stop = tuple(whole[start : start + data.draw(st.integers(1, 8))] for start in starts)
    text = "".join(stream(ids, stop))
    first = min(whole.index(item) for item in stop)
    # Of two stop strings, the one that is complete first decides: the other may begin earlier and never be seen whole.
    assert whole.startswith(text)
    assert not any(item in text for item in stop)
    assert len(text) >= first
    if len(stop) == 1:
        assert len(text) == first


def test_text_that_might_begin_a_stop_string_waits_and_comes_when_it_does_not() -> None:
    text = TextStream(TOKENIZER, ("the end",))
    pieces = [text.push(TOKENIZER.encode(part)) for part in ("in the", " e", "vening the", " en")]
    assert pieces == ["in ", "", "the evening ", ""]
    assert text.finish() == "the en"
    assert not text.is_stopped


def test_nothing_follows_a_stop_string() -> None:
    text = TextStream(TOKENIZER, ("stop",))
    assert text.push(TOKENIZER.encode("do stop now")) == "do "
    assert text.is_stopped
    assert text.push(TOKENIZER.encode(" more")) == text.finish() == ""

from __future__ import annotations

from pathlib import Path

import pytest

from fakes import TEXTS, tiny_tokenizer, write_tiny_model
from powerhouse.engine.offline import OfflineModel
from powerhouse.engine.settings import EngineConfig
from powerhouse.errors import RequestError
from powerhouse.evaluation.families import PlainDecoder
from powerhouse.models.hub import load_decoder

ROWS = [tiny_tokenizer().encode(text)[:length] for text, length in zip(TEXTS * 3, range(1, 40, 4), strict=False)]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


def test_the_engine_scores_and_writes_as_the_plain_model_does(path: Path) -> None:
    config = EngineConfig(device="cpu", num_threads=1, block_size=4, num_blocks=24, max_num_seqs=4, max_num_batched_tokens=8)
    engine, plain = OfflineModel(path, config), PlainDecoder(load_decoder(path), tiny_tokenizer())

    starts = [1] * len(ROWS)
    for fast, slow, row in zip(engine.score(ROWS, starts), plain.score(ROWS, starts), ROWS, strict=True):
        assert len(fast) == len(row) - 1
        assert [logprob for logprob, _ in fast] == pytest.approx([logprob for logprob, _ in slow], abs=1e-5)
        assert [is_likeliest for _, is_likeliest in fast] == [is_likeliest for _, is_likeliest in slow]
    fast_texts, slow_texts = (model.write(ROWS, max_tokens=8, temperature=0, stop=(), seed=0) for model in (engine, plain))
    assert len(set(fast_texts)) > 5
    for fast_text, slow_text in zip(fast_texts, slow_texts, strict=True):
        assert fast_text.rstrip("\ufffd") == slow_text.rstrip("\ufffd"), "a last character may lack bytes"
    assert engine.max_length == 128


def test_what_comes_before_the_start_is_not_told_and_is_computed_once_for_rows_that_begin_alike(path: Path) -> None:
    beginning, ends = tiny_tokenizer().encode(TEXTS[0])[:17], [[5], [6, 7], [8, 9, 10, 11, 12]]
    rows, starts = [[*beginning, *end] for end in ends], [17, 18, 20]
    config = EngineConfig(device="cpu", num_threads=1, block_size=4, num_blocks=24, max_num_seqs=1)
    fresh = OfflineModel(path, config.model_copy(update={"caches_prefixes": False}))
    engine = OfflineModel(path, config)

    found = engine.score(rows, starts)

    for told, whole, start in zip(found, fresh.score(rows, [1] * 3), starts, strict=True):
        assert [logprob for logprob, _ in told] == pytest.approx([logprob for logprob, _ in whole[start - 1 :]], abs=1e-5)
    assert engine._engine.stats()["prefix_cache_hits"] == 16 + 16  # the second and the third row, in whole blocks


def test_a_row_that_is_too_long_is_refused(path: Path) -> None:
    with pytest.raises(RequestError, match="longer than the context"):
        OfflineModel(path, EngineConfig(device="cpu")).score([[5] * 200], [1])

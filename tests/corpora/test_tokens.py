from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from fakes import write_tiny_model
from powerhouse import artifacts
from powerhouse.config import validate
from powerhouse.corpora.tokens import TokensConfig, make_report, make_tokens
from powerhouse.errors import ConfigError, ModelFormatError


def test_the_report_counts_tokens_fertility_and_documents_cut_without_need_by_source() -> None:
    documents = pa.table(
        {
            "source": ["a", "a", "b"],
            "num_tokens": [5, 3, 2],
            "num_bytes": [20, 4, 6],
            "num_words": [2, 1, 1],
        }
    )
    report = make_report(documents, np.array([0, 0, 1, 2, 2]), row_length=4)
    assert report["sources"]["a"] == {
        "num_documents": 2,
        "num_tokens": 8,
        "num_bytes": 24,
        "num_words": 3,
        "bytes_per_token": 4.0,  # 24 bytes by 6 tokens: two of the 8 are ends of texts
        "tokens_per_word": 2.0,
        "num_documents_cut": 0,  # five tokens do not fit in a row of four
    }
    assert (report["sources"]["b"]["num_documents_cut"], report["total"]["num_documents_cut"]) == (1, 1)
    assert report["total"]["num_tokens"] == 10
    assert make_report(documents, np.array([0, 0, 1, 2, 2]), 4, num_marks=2)["total"]["bytes_per_token"] == 30 / 4


@pytest.mark.parametrize(
    ("change", "names"), [({"vocab_size": 300}, "vocab_size"), ({"vocab_size": 300, "method": "bpe"}, "method and vocab_size")]
)
def test_a_models_own_tokenizer_leaves_nothing_to_learn(tmp_path: Path, change: dict[str, Any], names: str) -> None:
    values = {"corpus": "c", "output": "o", "tokenizer": write_tiny_model(tmp_path / "model"), **change}
    with pytest.raises(ConfigError, match=f"either `tokenizer`, a model's own, or {names}, to learn one"):
        validate(TokensConfig, values, "test")


def test_a_tokenizer_that_is_not_there_is_refused_before_any_work(tmp_path: Path) -> None:
    artifacts.produce(tmp_path / "corpus", "corpus", {}, {}, lambda folder: {})
    config = TokensConfig(corpus=tmp_path / "corpus", output=tmp_path / "tokens", tokenizer=tmp_path / "nothing")
    with pytest.raises(ModelFormatError, match=r"nothing/tokenizer\.json: missing"):
        make_tokens(config)
    assert not (tmp_path / "tokens").exists()

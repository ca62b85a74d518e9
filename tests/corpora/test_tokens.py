from __future__ import annotations

import numpy as np
import pyarrow as pa

from powerhouse.corpora.tokens import make_report


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

from __future__ import annotations

import pyarrow as pa
import pytest
from scipy.stats import binomtest

from powerhouse.corpora.bias import GROUPS, AuditBias, FindIdentities, wilson_interval
from powerhouse.corpora.document import Draft, RawDocument


def groups_of(text: str) -> list[str]:
    draft = Draft(RawDocument(0, "text", text), text)
    FindIdentities()(draft)
    return [name for number, name in enumerate(GROUPS) if draft.columns["identities"] >> number & 1]


def test_groups_are_found_by_whole_words() -> None:
    assert groups_of("The Jewish women spoke of romance and Germany's oldest menhir.") == ["women", "Jewish"]


def test_there_is_a_bit_for_every_group() -> None:
    assert len(GROUPS) <= 32
    assert groups_of(" ".join(terms.split()[0] for terms in GROUPS.values())) == list(GROUPS)


@pytest.mark.parametrize(("hits", "trials"), [(0, 1), (1, 1), (3, 10), (50, 1000), (999, 1000)])
def test_the_interval_is_wilsons(hits: int, trials: int) -> None:
    expected = binomtest(hits, trials).proportion_ci(method="wilson")

    assert wilson_interval(hits, trials) == pytest.approx((expected.low, expected.high), abs=1e-6)


def index_of(rows: list[tuple[int, str | None, float, str]]) -> pa.Table:
    identities, reasons, toxicity, sources = zip(*rows, strict=True)
    return pa.table(
        {
            "identities": pa.array(identities, type=pa.uint32()),
            "reason": pa.array(reasons, type=pa.string()),
            "toxic_word_share": pa.array(toxicity, type=pa.float32()),
            "source": sources,
        }
    )


def test_where_sentences_are_rated_their_rate_stands_beside_that_of_words() -> None:
    women = 1 << list(GROUPS).index("women")
    rows: list[tuple[int, str | None, float, str]] = [(women, None, 0.0, "a"), (women, None, 0.0, "a"), (0, None, 0.0, "a")]
    index = index_of(rows).append_column("toxic_sentence_share", pa.array([0.5, 0.0, 0.0], type=pa.float32()))

    assert AuditBias()(index).report["names women"]["toxic_sentences_per_1000"] == 250


def test_a_filter_that_removes_one_group_more_often_is_told() -> None:
    women = 1 << list(GROUPS).index("women")
    rows: list[tuple[int, str | None, float, str]] = [(women, "toxic_word_share", 0.01, "a")] * 60 + [
        (women, None, 0.0, "a")
    ] * 40
    rows += [(0, None, 0.0, "b")] * 380 + [(0, "language", 0.0, "b")] * 20
    report = AuditBias()(index_of(rows)).report

    assert list(report) == ["all documents", "names women", "names no group", "source a", "source b"]
    assert report["names women"] == {
        "documents": 100, "removed": 60, "removed_share": 0.6, "interval": "0.502 to 0.691", "beside_all": "more often",
        "toxic_words_per_1000": 6.0, "reason": "toxic_word_share",
    }  # fmt: skip
    assert report["names no group"]["beside_all"] == "less often"
    assert report["all documents"]["removed_share"] == 0.16


def test_few_documents_prove_nothing() -> None:
    report = AuditBias()(index_of([(1, "language", 0.0, "a"), (0, None, 0.0, "a"), (0, None, 0.0, "a")])).report

    assert {row["beside_all"] for row in report.values()} == {"as often"}


def test_an_empty_corpus_has_no_audit() -> None:
    assert AuditBias()(index_of([(0, None, 0.0, "a")]).slice(1)).report == {}

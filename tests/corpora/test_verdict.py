from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from powerhouse.corpora import dedup
from powerhouse.corpora.filters import RULES, QualityConfig
from powerhouse.corpora.redact import PERSONAL_COLUMNS
from powerhouse.corpora.report import make_report, sampled_rows
from powerhouse.corpora.sources import SourceConfig, identify, list_files
from powerhouse.corpora.steps import CorpusStepsConfig, make_corpus_steps
from powerhouse.corpora.verdict import decide, reject_bad_files
from powerhouse.errors import ArtifactError, InputError

STEPS = [step for step in make_corpus_steps(CorpusStepsConfig()) if step.name in ("personal_data", "duplicates")]
WEIGHTS = {"s": 1.0, "other": 1.0}


def index_of(*changes: Mapping[str, Any]) -> pa.Table:
    """One row for each change to a good document with words of its own."""
    rows = []
    for number, change in enumerate(changes):
        words = [f"w{value}" for value in np.random.default_rng(number).integers(0, 9999, 200)]
        row = {
            "order": number, "doc_id": number << 60, "source": "s", "path": f"{number}.txt", "reason": None, "detail": None,
            "num_chars": 1000, **{name: 0 for name, _ in PERSONAL_COLUMNS}, "num_emails": 1, "num_ips": 2,
            "url_key": None, "text_hash": dedup.text_hash(words), "signature": dedup.signature(words).tobytes(),
        } | {rule.score: np.float32(number) for rule in RULES} | dict(change)  # fmt: skip
        rows.append(row)
    strings = {
        "reason": pa.string(),
        "detail": pa.string(),
        "doc_id": pa.uint64(),
        "text_hash": pa.uint64(),
        "url_key": pa.uint64(),
    }
    return pa.table({name: pa.array([row[name] for row in rows], type=strings.get(name)) for name in rows[0]})


def test_the_split_is_by_the_hash_of_the_place_alone() -> None:
    index = index_of(*[{} for _ in range(8)])
    assert decide(index, STEPS, 0.25, WEIGHTS).index["split"].to_pylist() == ["heldout"] * 4 + ["train"] * 4
    assert decide(index.slice(3), STEPS, 0.25, WEIGHTS).index["split"].to_pylist() == ["heldout"] + ["train"] * 4


def test_a_duplicate_goes_and_tells_of_what_and_how_alike() -> None:
    index = index_of({}, {}, {})
    twin = {name: index[name][1].as_py() for name in ("text_hash", "signature")}
    verdicts = decide(index_of({}, {}, twin | {"num_chars": 10}), STEPS, 0, WEIGHTS)
    assert verdicts.index["reason"].to_pylist() == [None, None, "exact_duplicate"]
    assert verdicts.index["detail"][2].as_py() == f"1.00 like {1 << 60}"
    near = decide(index_of({}, {}, twin | {"num_chars": 10, "text_hash": 5}), STEPS, 0, WEIGHTS)
    assert near.index["reason"].to_pylist() == [None, None, "near_duplicate"]


def test_a_rejected_document_is_no_reason_to_remove_its_twin() -> None:
    index = index_of({}, {})
    twin = {name: index[name][0].as_py() for name in ("text_hash", "signature")}
    verdicts = decide(index_of({"reason": "language"}, twin), STEPS, 0, WEIGHTS)
    assert verdicts.index["reason"].to_pylist() == ["language", None]


def test_bad_files_above_the_share_fail_and_are_named() -> None:
    index = index_of({}, {"reason": "bad_file", "detail": "/in/1.txt: not UTF-8"}, {})
    with pytest.raises(
        InputError, match=r"1 of 3 input files cannot be read:\n  /in/1.txt: not UTF-8\n.*max_bad_file_share=0.3"
    ):
        reject_bad_files(index, 3, 0.3)


def test_a_file_damaged_in_two_pieces_is_one_bad_file() -> None:
    damaged = {"reason": "bad_file", "detail": "why", "path": "0.txt"}
    final = reject_bad_files(index_of(damaged, {"path": "0.txt"}, damaged, {}), 2, 0.5)
    assert final["reason"].to_pylist() == ["bad_file", "bad_file", "bad_file", None]
    with pytest.raises(InputError, match=r"1 of 2 input files cannot be read"):
        reject_bad_files(index_of(damaged, damaged, {}), 2, 0.4)


def test_bad_files_within_the_share_take_all_their_documents_with_them() -> None:
    index = index_of({}, {"reason": "language", "path": "0.txt"}, {"reason": "bad_file", "detail": "why", "path": "0.txt"}, {})
    final = reject_bad_files(index, 2, 0.5)
    assert final["reason"].to_pylist() == ["bad_file", "bad_file", "bad_file", None]
    assert final["detail"].to_pylist() == ["why", "why", "why", None]


EMPTY = [
    (
        [{"reason": "language"}, {"reason": "symbols"}, {"reason": "language"}],
        0.1,
        "empty after filtering.*language 2, symbols 1",
    ),
    ([{"doc_id": 5}], 0.5, "no document for train.*1 documents, heldout_share=0.5"),
    ([{"doc_id": 2**63}], 0.1, "no document for heldout"),
]


@pytest.mark.parametrize(("changes", "share", "message"), EMPTY)
def test_an_empty_corpus_or_split_is_one_error(changes: list[dict[str, Any]], share: float, message: str) -> None:
    with pytest.raises(InputError, match=f"(?s){message}"):
        decide(index_of(*changes), STEPS, share, WEIGHTS)


def test_the_report_adds_up_and_shows_pairs_rejects_and_bad_files() -> None:
    index = index_of({}, {}, {})
    twin = {name: index[name][1].as_py() for name in ("text_hash", "signature")}
    bad = {"reason": "bad_file", "detail": "why", "source": "other", "num_chars": 0}
    verdicts = decide(index_of({}, {}, twin | {"num_chars": 10}, {"reason": "symbols"}, bad), STEPS, 0, WEIGHTS)
    report = make_report(verdicts, {row: f"text {row}" for row in sampled_rows(verdicts)}, QualityConfig())
    for funnel in (report["total"], *report["sources"].values()):
        assert funnel["documents"] == sum(funnel["removed"].values()) + funnel["train"]["documents"]
    assert report["total"]["removed"] == {"bad_file": 1, "exact_duplicate": 1, "symbols": 1}
    assert {kind: count for kind, count in report["personal_data"].items() if count} == {"emails": 5, "ips": 10}
    assert (report["duplicates"]["exact"], report["duplicates"]["clusters_by_size"]) == (1, {"2": 1})
    pair = report["pairs"][0]
    assert (pair["kept"]["text"], pair["removed"]["text"]) == ("text 1", "text 2")
    assert report["rejects"]["symbols"][0]["text"] == "text 3"
    assert report["bad_files"] == [{"source": "other", "path": "4.txt", "detail": "why"}]


def test_files_are_listed_by_source_and_name(tmp_path: Path) -> None:
    for name in ("b/2.txt", "b/1.txt", "a/9.html"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    sources = [
        SourceConfig(name="one", kind="book", path=tmp_path / "b"),
        SourceConfig(name="two", kind="web", path=tmp_path / "a"),
    ]
    found = [(file.number, file.source, file.relative) for file in list_files(sources)]
    assert found == [(0, "one", "1.txt"), (1, "one", "2.txt"), (2, "two", "9.html")]


BAD_FOLDERS = [
    ("missing", "**/*", "inputs: s: no such folder"),
    ("empty", "**/*", "inputs: s: no file in .* matches"),
    ("full", "*.html", r"no file in .* matches\n  got: glob '\*.html'"),
    ("full", "*.pdf", "no reader for this kind of file"),
]


@pytest.mark.parametrize(("folder", "glob", "message"), BAD_FOLDERS)
def test_a_missing_empty_or_unreadable_folder_is_one_error(tmp_path: Path, folder: str, glob: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.pdf").write_text("x")
    with pytest.raises(InputError, match=message):
        list_files([SourceConfig(name="s", kind="book", path=tmp_path / folder, glob=glob)])


def test_a_folder_is_known_by_its_content_and_unfinished_texts_are_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("one")
    source = SourceConfig(name="s", kind="book", path=tmp_path / "in")
    before = identify(source)
    (tmp_path / "in" / "a.txt").write_text("two")
    assert identify(source) != before
    (tmp_path / "unfinished.json").write_text("{}")
    with pytest.raises(ArtifactError, match="unfinished"):
        identify(source)


def test_a_weight_keeps_a_share_of_the_training_documents_or_repeats_them() -> None:
    index = index_of(*[{"doc_id": number * (2**64 // 400)} for number in range(400)])
    for weight, lowest, highest in ((0.5, 0.4, 0.6), (1.0, 1, 1), (2.0, 2, 2), (2.5, 2.4, 2.6)):
        final = decide(index, [], 0.1, {"s": weight}).index
        train = final.filter(pc.equal(final["split"], "train"))
        is_train = final["doc_id"].to_numpy() >= 0.1 * 2.0**64
        assert lowest <= train["num_copies"].to_numpy().sum() / is_train.sum() <= highest
        assert final["split"].to_pylist().count("heldout") == 40
        rejects = final.filter(pc.equal(final["split"], "rejects"))
        assert set(rejects["reason"].to_pylist()) <= {"mixing_weight"}


def test_histograms_count_every_document_on_its_side_of_the_limit() -> None:
    index = index_of(
        *[
            {"doc_id": number, "num_words": np.float32(number), "reason": "few" if number < 50 else None}
            for number in range(100)
        ]
    )
    verdicts = decide(index, [], 0, WEIGHTS)
    histogram = make_report(verdicts, dict.fromkeys(sampled_rows(verdicts), ""), QualityConfig())["histograms"]["num_words"]

    assert (sum(histogram["kept"]), sum(histogram["removed"])) == (50, 50)
    assert histogram["limits"] == [50, 100_000]
    assert sum(histogram["kept"][:14]) == sum(histogram["removed"][16:]) == 0

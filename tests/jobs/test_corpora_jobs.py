"""The jobs from text to tokens, as a user runs them: a process each, on real small files."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import sys
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fakes import write_tiny_model
from powerhouse.corpora import scored
from powerhouse.corpora.pipeline import CurateConfig, curate
from powerhouse.corpora.session import WorkersConfig
from powerhouse.corpora.shards import TokenRows
from powerhouse.corpora.tokens import TokensConfig, make_tokens
from powerhouse.errors import ArtifactError, InputError
from powerhouse.tokenizer import Tokenizer
from powerhouse.training.config import check, read_shape
from tiny_corpus import LOOSE, ROOT, contents, curate_config, prose, read_split, start_job, write_inputs
from tiny_run import make_config

pytestmark = pytest.mark.slow

ONE = WorkersConfig(num=1, num_cpus=1)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("in"), [])


@pytest.fixture(scope="module")
def corpus(local_ray: str, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return curate(curate_config(inputs, tmp_path_factory.mktemp("out") / "corpus")).path


def test_the_corpus_holds_every_document_once_and_the_rejects_their_reason(corpus: Path) -> None:
    splits = {split: read_split(corpus, split) for split in ("train", "heldout", "rejects")}
    doc_ids = [doc_id for table in splits.values() for doc_id in table["doc_id"].to_pylist()]
    assert len(doc_ids) == len(set(doc_ids)) == json.loads((corpus / "report.json").read_text())["total"]["documents"]
    assert min(table.num_rows for table in splits.values()) > 0
    reasons = splits["rejects"]["reason"].to_pylist()
    assert {"exact_duplicate", "too_few_words"} <= set(reasons)
    assert None not in reasons
    kept = pa.concat_tables([splits["train"], splits["heldout"]])
    assert set(kept["source"].to_pylist()) == {"books", "web", "wikipedia"}
    web = [row["text"] for row in kept.to_pylist() if row["source"] == "web"]
    assert len(web) == 1
    assert web[0].endswith("Write to <EMAIL>.")


def test_the_second_edition_of_a_book_is_mostly_duplicates(corpus: Path) -> None:
    editions = [row["path"] for split in ("train", "heldout") for row in read_split(corpus, split).to_pylist()]
    assert editions.count("a.txt") + editions.count("b.txt.gz") < 1.3 * max(editions.count("a.txt"), editions.count("b.txt.gz"))


def test_neither_several_workers_in_place_of_one_nor_the_order_on_disk_change_a_byte(
    corpus: Path, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scored, "_BYTES_PER_TASK", 1)  # a task for each file, for all to share
    names = sorted((str(path.relative_to(inputs)) for path in inputs.rglob("*.*")), reverse=True)
    other = write_inputs(tmp_path / "in", names)
    again = curate(curate_config(other, tmp_path / "corpus", workers={"num": 4, "num_cpus": 0.25}))
    assert contents(again.path) == contents(corpus)


def test_other_limits_cut_the_stored_scores_and_read_no_text_again(corpus: Path, inputs: Path, tmp_path: Path) -> None:
    shutil.copytree(corpus.parent, tmp_path / "out")
    scored = tmp_path / "out" / "corpus_documents" / "manifest.json"
    written = scored.stat().st_mtime_ns
    again = curate(curate_config(inputs, tmp_path / "out" / "corpus", quality=LOOSE | {"max_words": 300}, heldout_share=0))
    report = json.loads((again.path / "report.json").read_text())
    assert report["total"]["removed"]["too_many_words"] > 0
    assert scored.stat().st_mtime_ns == written


def test_bad_files_fail_the_job_or_are_left_out_named_and_counted(local_ray: str, inputs: Path, tmp_path: Path) -> None:
    folder = write_inputs(tmp_path / "in", [])
    dump = folder / "wiki" / "w.xml.bz2"
    dump.write_bytes(dump.read_bytes()[:-200])
    (folder / "books" / "latin.txt").write_bytes("naïve".encode("latin-1"))
    with pytest.raises(InputError, match=r"(?s)2 of 6 input files cannot be read:.*latin.txt: not UTF-8.*w.xml.bz2: truncated"):
        curate(curate_config(folder, tmp_path / "corpus"))
    with pytest.raises(ArtifactError, match="unfinished"):
        make_tokens(TokensConfig(corpus=tmp_path / "corpus", output=tmp_path / "tokens"))
    artifact = curate(curate_config(folder, tmp_path / "corpus", max_bad_file_share=0.5))
    report = json.loads((artifact.path / "report.json").read_text())
    assert [item["path"] for item in report["bad_files"]] == ["latin.txt", "w.xml.bz2"]
    assert report["sources"]["wikipedia"]["removed"]["bad_file"] == report["sources"]["wikipedia"]["documents"]


def test_a_corpus_that_is_empty_after_filtering_tells_why(corpus: Path, inputs: Path, tmp_path: Path) -> None:
    shutil.copytree(corpus.with_name("corpus_documents"), tmp_path / "corpus_documents")
    config = curate_config(inputs, tmp_path / "corpus", quality=LOOSE | {"languages": ["fi"]})
    with pytest.raises(InputError, match=r"(?s)empty after filtering.*left out for: language \d+, too_few_words 1"):
        curate(config)
    assert not (tmp_path / "corpus" / "manifest.json").exists()


QUESTION = "Which of the two old towns on the river was the first to have a bridge of stone and of iron?"


def write_pages(folder: Path) -> CurateConfig:
    """Pages with a line of the site on each; one of an address seen before, one with a test item, one with an e-mail."""
    pages = [{"url": f"http://site.org/{number}", "text": prose(70 + number, 40)} for number in range(12)]
    pages[1]["url"] = "https://www.site.org/0/?utm_source=news"
    pages[1]["text"] = prose(71, 30)
    pages[2]["text"] += QUESTION
    pages[3]["text"] += "Write to ada@example.com or to Ada@Example.com."
    lines = [json.dumps(page | {"text": f"Share page {number} of 12\n{page['text']}"}) for number, page in enumerate(pages)]
    folder.mkdir()
    (folder / "pages.jsonl").write_text("\n".join(lines))
    (folder / "quiz.txt").write_text(QUESTION)
    (folder / "key").write_bytes(bytes(range(100, 132)))
    inputs = [{"name": "site", "kind": "web", "path": folder, "glob": "*.jsonl"}]
    return curate_config(
        folder, folder.parent / "corpus", inputs=inputs, evaluation_sets=[{"name": "quiz", "path": folder / "quiz.txt"}],
        pseudonym_key_file=folder / "key", max_documents_per_line=8,
    )  # fmt: skip


def test_test_items_second_pages_and_repeated_lines_go_and_people_get_pseudonyms(local_ray: str, tmp_path: Path) -> None:
    config = write_pages(tmp_path / "in")
    artifact = curate(config)
    report = json.loads((artifact.path / "report.json").read_text())
    assert report["total"]["removed"] == {"contaminated": 1, "same_url": 1}
    assert report["contamination"]["quiz"]["items found"] == 1
    assert report["repeated_lines"] == {"lines": 10, "different_lines": 1, "documents_of_nothing_else": 0}
    texts = [row["text"] for split in ("train", "heldout") for row in read_split(artifact.path, split).to_pylist()]
    assert not any("Share page" in text for text in texts)
    assert sum(map(len, texts)) == artifact.manifest.counts["train_chars"] + artifact.manifest.counts["heldout_chars"]
    (named,) = (text for text in texts if "Write to" in text)
    assert re.search(r"Write to (<EMAIL:[a-p]{10}>) or to \1\.$", named)
    (tmp_path / "in" / "quiz.txt").write_text(
        "Another question that has at least thirteen words in it, and one that nobody asks."
    )
    again = curate(config)
    assert "contaminated" not in json.loads((again.path / "report.json").read_text())["total"]["removed"]


def test_token_rows_decode_to_the_corpus_and_know_their_documents(corpus: Path, tmp_path: Path) -> None:
    values = {"corpus": corpus, "output": tmp_path / "tokens", "workers": {"num": 2}}
    config = TokensConfig.model_validate(values | {"vocab_size": 400, "row_length": 33, "rows_per_shard": 100})
    artifact = make_tokens(config)
    counts = artifact.manifest.counts
    rows = TokenRows(artifact.path / "rows")
    tokenizer = Tokenizer.load(artifact.path)
    assert (len(rows), rows.row_length, tokenizer.vocab_size) == (counts["num_rows"], 33, 400)
    train = read_split(corpus, "train")
    text_of = dict(zip(train["doc_id"].to_pylist(), train["text"].to_pylist(), strict=True))
    assert counts["num_bytes"] == sum(len(text.encode()) for text in text_of.values())
    doc_ids = pq.read_table(artifact.path / "provenance.parquet")["doc_ids"].to_pylist()
    assert len(doc_ids) == len(rows)
    documents = rows.take_documents(np.arange(len(rows)))
    for row, numbers, ids in zip(rows.take(np.arange(len(rows))), documents, doc_ids, strict=True):
        pieces = np.split(row, np.flatnonzero(np.diff(numbers)) + 1)
        assert all(tokenizer.decode(piece.tolist()) in text_of[doc_id] for doc_id, piece in zip(ids, pieces, strict=True))
    report = json.loads((artifact.path / "report.json").read_text())
    assert sum(source["num_tokens"] for source in report["sources"].values()) == counts["num_tokens"]
    assert counts["num_tokens"] - rows.row_length < len(rows) * rows.row_length <= counts["num_tokens"]
    again = make_tokens(config.model_copy(update={"output": tmp_path / "again", "workers": ONE}))
    assert contents(again.path) == contents(artifact.path)


def test_the_tokens_of_a_model_are_made_by_its_own_tokenizer_and_fit_it(corpus: Path, tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model")
    artifact = make_tokens(TokensConfig(corpus=corpus, output=tmp_path / "tokens", tokenizer=model, row_length=33, workers=ONE))
    tokenizer, rows = Tokenizer.load(artifact.path), TokenRows(artifact.path / "rows")
    assert tokenizer.digest == Tokenizer.load(model).digest == artifact.manifest.inputs["tokenizer"]
    assert not {"method", "vocab_size"} & artifact.manifest.settings.keys()
    texts = read_split(corpus, "train")["text"].to_pylist()
    documents = [[*tokenizer.encode(text), tokenizer.end_of_text_id] for text in texts]
    assert artifact.manifest.counts["num_tokens"] == sum(map(len, documents))
    in_rows, in_text = Counter(rows.take(np.arange(len(rows))).ravel().tolist()), Counter(chain(*documents))
    assert (in_text - in_rows).total() < rows.row_length, "less than a row is left out"
    assert not in_rows - in_text
    training = make_config(tmp_path, model=None, start_from=model)
    check(read_shape(training), artifact)


TOO_MUCH = [
    ({"vocab_size": 50_000}, "the vocabulary is larger than the text can give"),
    ({"vocab_size": 300, "row_length": 10_000_000}, "the corpus fills no row"),
]


@pytest.mark.parametrize(("change", "message"), TOO_MUCH)
def test_more_than_the_text_can_give_is_one_error(corpus: Path, tmp_path: Path, change: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_tokens(TokensConfig.model_validate({"corpus": corpus, "output": tmp_path / "tokens", "workers": ONE, **change}))


JOBS = [
    (
        "curate_corpus.py",
        ["output=x", 'inputs=[{"name": "b", "kind": "book", "path": "nowhere"}]'],
        "inputs: b: no such folder",
    ),
    ("curate_corpus.py", ["output=x", "inputs=[]"], "inputs: got []"),
    ("train_tokenizer.py", ["output=x", "corpus=nowhere"], "no such corpus folder"),
    ("train_tokenizer.py", ["output=x", "corpus=y", "vocab=3"], "vocab: unknown key; did you mean vocab_size?"),
    ("fetch_texts.py", ["output=x"], "packages: missing"),
]


@pytest.mark.parametrize(("script", "overrides", "message"), JOBS)
def test_a_job_asked_for_the_impossible_ends_with_one_error_and_exit_code_2(
    script: str, overrides: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [script, *overrides])
    with pytest.raises(SystemExit) as exit_of_job:
        runpy.run_path(str(ROOT / "jobs" / script), run_name="__main__")
    assert exit_of_job.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert message in err


def test_the_error_of_a_job_is_all_that_it_writes(tmp_path: Path) -> None:
    script, overrides, message = JOBS[0]
    job = start_job(script, *overrides, storage=tmp_path)
    out, err = job.communicate()
    assert (job.returncode, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err
    assert "Traceback" not in err

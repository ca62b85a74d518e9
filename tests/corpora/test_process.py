from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest

from powerhouse.corpora import process
from powerhouse.corpora.process import DocumentProcessor, read_files
from powerhouse.corpora.scored import plan_tasks
from powerhouse.corpora.scores import Score
from powerhouse.corpora.sources import InputFile, SourceConfig, list_files

PROSE = "It was the best of times, it was the worst of times, and it was so for all of us who had to live with it.\n"


def process_files(folder: Path, contents: dict[str, bytes]) -> pa.Table:
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    files = list_files([SourceConfig(name="s", kind="web", path=str(folder))])
    processor = DocumentProcessor([Score()], extract_timeout_s=0.5)
    return pa.concat_tables([processor(table) for table in read_files(files, 1000)])


def test_good_documents_of_a_file_stand_before_the_row_that_tells_of_its_damage(tmp_path: Path) -> None:
    table = process_files(tmp_path, {"a.txt": PROSE.encode() * 50 + b"\xff", "b.html": f"<p>{PROSE}</p>".encode()})

    reasons = table["reason"].to_pylist()
    assert reasons.count("bad_file") == 1
    assert "not UTF-8" in table["detail"][reasons.index("bad_file")].as_py()
    assert reasons[-1] is None
    assert len(set(table["doc_id"].to_pylist())) == table.num_rows
    assert table["order"].to_pylist() == sorted(table["order"].to_pylist())


def test_a_page_nested_too_deep_is_a_reject_that_keeps_its_markup(tmp_path: Path) -> None:
    page = f"<html>{'<div>' * 10_000}{PROSE}"
    table = process_files(tmp_path, {"a.html": page.encode()})

    assert table.select(["reason", "detail", "text"]).to_pylist() == [
        {"reason": "nested_too_deep", "detail": "10001 > 1000", "text": page}
    ]


def test_a_plain_text_may_speak_of_tags(tmp_path: Path) -> None:
    text = f"{PROSE} A Vec<T> holds values, a <div> holds others, and #include <stdio.h> holds none."
    table = process_files(tmp_path, {"a.jsonl": json.dumps({"text": text}).encode(), "b.txt": text.encode()})

    assert table.select(["reason", "text"]).to_pylist() == [{"reason": None, "text": text}] * 2


@pytest.mark.slow
def test_a_page_that_takes_too_long_is_a_reject_that_keeps_its_markup(tmp_path: Path) -> None:
    slow = f"<html><body><p {' '.join(f'a{number}=1' for number in range(200_000))}>x</p>"
    table = process_files(tmp_path, {"a.html": slow.encode(), "b.html": f"<p>{PROSE}</p>".encode()})

    assert table.select(["reason", "detail"]).to_pylist() == [
        {"reason": "extraction_timeout", "detail": "over 0.5 s"},
        {"reason": None, "detail": None},
    ]
    assert table["text"].to_pylist() == [slow, PROSE.strip()]


@pytest.mark.slow
def test_100000_empty_documents_are_as_many_rejects(tmp_path: Path) -> None:
    lines = [json.dumps({"text": " " * (number % 3)}) for number in range(100_000)]
    table = process_files(tmp_path, {"a.jsonl": "\n".join(lines).encode()})

    assert table["reason"].value_counts().to_pylist() == [{"values": "no_text", "counts": 100_000}]


def test_tasks_hold_files_that_follow_each_other() -> None:
    sizes = [100, 100, 3_000_000, 1_500_000, 400_000, 400_000] + [0] * 600
    files = [InputFile(number, "s", "web", str(number), str(number), size) for number, size in enumerate(sizes)]
    tasks = [[file.number for file in task] for task in plan_tasks(files)]

    assert tasks == [[0, 1], [2], [3, 4], list(range(5, 261)), list(range(261, 517)), list(range(517, 606))]


def test_a_large_corpus_has_no_more_than_some_thousand_tasks() -> None:
    files = [InputFile(number, "s", "web", str(number), str(number), 2**26) for number in range(20_000)]

    assert len(plan_tasks(files)) == 5_000


def test_tables_hold_some_characters_or_some_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": "x" * (number % 50)}) + "\n" for number in range(100)))
    files = list_files([SourceConfig(name="s", kind="web", path=str(tmp_path))])
    whole = list(read_files(files, 1000))
    monkeypatch.setattr(process, "_CHARS_PER_TABLE", 4_000)
    tables = list(read_files(files, 1000))

    assert (len(whole), len(tables)) == (1, 10)
    assert pa.concat_tables(tables).equals(whole[0])
    (tmp_path / "a.jsonl").write_text("\n")
    assert [table.num_rows for table in read_files(files, 1000)] == [0]

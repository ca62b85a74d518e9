from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest

from powerhouse.corpora.process import DocumentProcessor, read_files
from powerhouse.corpora.scored import plan_tasks
from powerhouse.corpora.scores import Score
from powerhouse.corpora.sources import InputFile, SourceConfig, list_files

PROSE = "It was the best of times, it was the worst of times, and it was so for all of us who had to live with it.\n"


def process(folder: Path, contents: dict[str, bytes]) -> pa.Table:
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    files = list_files([SourceConfig(name="s", kind="web", path=str(folder))])
    processor = DocumentProcessor([Score()])
    return pa.concat_tables([processor(table) for table in read_files(files, 1000)])


def test_good_documents_of_a_file_stand_before_the_row_that_tells_of_its_damage(tmp_path: Path) -> None:
    table = process(tmp_path, {"a.txt": PROSE.encode() * 50 + b"\xff", "b.html": f"<p>{PROSE}</p>".encode()})

    reasons = table["reason"].to_pylist()
    assert reasons.count("bad_file") == 1
    assert "not UTF-8" in table["detail"][reasons.index("bad_file")].as_py()
    assert reasons[-1] is None
    assert len(set(table["doc_id"].to_pylist())) == table.num_rows
    assert table["order"].to_pylist() == sorted(table["order"].to_pylist())


def test_a_page_nested_too_deep_is_a_reject_that_keeps_its_markup(tmp_path: Path) -> None:
    page = f"<html>{'<div>' * 10_000}{PROSE}"
    table = process(tmp_path, {"a.html": page.encode()})

    assert table.select(["reason", "detail", "text"]).to_pylist() == [
        {"reason": "nested_too_deep", "detail": "10001 > 1000", "text": page}
    ]


def test_a_plain_text_may_speak_of_tags(tmp_path: Path) -> None:
    text = f"{PROSE} A Vec<T> holds values, a <div> holds others, and #include <stdio.h> holds none."
    table = process(tmp_path, {"a.jsonl": json.dumps({"text": text}).encode(), "b.txt": text.encode()})

    assert table.select(["reason", "text"]).to_pylist() == [{"reason": None, "text": text}] * 2


@pytest.mark.slow
def test_100000_empty_documents_are_as_many_rejects(tmp_path: Path) -> None:
    lines = [json.dumps({"text": " " * (number % 3)}) for number in range(100_000)]
    table = process(tmp_path, {"a.jsonl": "\n".join(lines).encode()})

    assert table["reason"].value_counts().to_pylist() == [{"values": "no_text", "counts": 100_000}]


def test_tasks_hold_files_that_follow_each_other_and_the_largest_come_first() -> None:
    sizes = [100, 100, 3_000_000, 1_500_000, 400_000, 400_000] + [0] * 600
    files = [InputFile(number, "s", "web", str(number), str(number), size) for number, size in enumerate(sizes)]
    tasks = [[file.number for file in task] for task in plan_tasks(files)]

    assert tasks[:4] == [[2], [3, 4], list(range(5, 261)), [0, 1]]
    assert sorted(number for task in tasks for number in task) == list(range(606))

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

import powerhouse
from powerhouse.corpora import scored
from powerhouse.corpora.parts import Part, list_parts
from powerhouse.corpora.process import DOCUMENTS_PER_FILE
from powerhouse.corpora.scored import plan_tasks
from powerhouse.corpora.sources import InputFile

FILES = [InputFile(number, "s", "web", str(number), str(number), 2**20) for number in range(6)]
PARTS = [
    Part(0, 0, False),
    Part(DOCUMENTS_PER_FILE + 5, 1, True),
    Part(2 * DOCUMENTS_PER_FILE, 0, False),
]


def leave_parts(folder: Path) -> None:
    scored._keep_parts_of(plan_tasks(FILES), folder)
    for part in PARTS:
        part.write(folder, pa.table({"order": [part.first]}))


def test_parts_of_the_same_plan_are_kept_and_those_of_a_task_are_known(tmp_path: Path) -> None:
    leave_parts(tmp_path)
    tasks = plan_tasks(FILES)
    scored._keep_parts_of(tasks, tmp_path)
    kept = list_parts(tmp_path)

    assert [list(scored._parts_of(task, kept)) for task in tasks] == [PARTS[:2], PARTS[2:], []]


def test_parts_of_another_version_or_of_another_cut_of_the_files_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_parts(tmp_path)
    scored._keep_parts_of([[file] for file in FILES], tmp_path)
    assert list_parts(tmp_path) == []
    leave_parts(tmp_path)
    monkeypatch.setattr(powerhouse, "__version__", "another")
    scored._keep_parts_of(plan_tasks(FILES), tmp_path)
    assert list_parts(tmp_path) == []


def test_a_task_read_again_gives_the_same_parts_whatever_was_written_meanwhile(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("It was the best of times.\n")
    file = InputFile(0, "s", "web", "a.txt", str(tmp_path / "a.txt"), 26)
    task = pa.table({name: [value] for name, value in scored._Work([file], []).row().items()})
    (first,) = scored._read(task, 1000)
    Part.of(Path(first["part"][0].as_py())).write(tmp_path, pa.table({"order": [0]}))
    (again,) = scored._read(task, 1000)
    assert again.equals(first)

    kept = scored._Work([file], list_parts(tmp_path)).row()
    assert list(scored._read(pa.table({name: [value] for name, value in kept.items()}), 1000)) == []

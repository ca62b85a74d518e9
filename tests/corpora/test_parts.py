from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from powerhouse.corpora.parts import Part, count_documents, is_whole, list_parts, parts_between, parts_holding

FILE = 2**32
"""Room that the order leaves for the documents of one file."""
TASK = [Part(2 * FILE, 0, False), Part(2 * FILE + 40, 1, False), Part(3 * FILE + 7, 2, True)]


@pytest.mark.parametrize("part", [*TASK, Part((2**31 - 1) * FILE, 99_999, True)])
def test_a_name_tells_all_of_a_part(part: Part) -> None:
    assert Part.of(Path("folder") / part.name) == part


def test_names_have_the_order_of_the_corpus() -> None:
    names = [part.name for part in TASK]
    assert names == sorted(names)
    assert names[1] == "00000002_00000028-00001.parquet"


@pytest.mark.parametrize(
    ("parts", "expected"),
    [(TASK, True), (TASK[:1], False), (TASK[:2], False), (TASK[1:], False), (TASK[::2], False), ([], False)],
)
def test_a_task_is_whole_with_all_its_parts(parts: list[Part], expected: bool) -> None:
    assert is_whole(parts) == expected


HOLDING = {
    (2 * FILE, 2 * FILE + 39): [0],
    (2 * FILE + 39, 2 * FILE + 40): [0, 1],
    (3 * FILE, 3 * FILE): [1],
    (0, 4 * FILE): [0, 1, 2],
}


@pytest.mark.parametrize("bounds", HOLDING)
def test_the_parts_that_hold_a_range_are_found(bounds: tuple[int, int]) -> None:
    assert list(parts_holding(TASK, *bounds)) == [TASK[number] for number in HOLDING[bounds]]


def test_the_parts_of_a_task_are_those_that_begin_in_its_files() -> None:
    others = [Part(FILE, 0, True), *TASK, Part(4 * FILE, 0, False)]
    assert list(parts_between(others, 2 * FILE, 4 * FILE)) == TASK


def test_what_a_killed_writer_left_is_no_part_and_goes(tmp_path: Path) -> None:
    TASK[2].write(tmp_path, pa.table({"order": [1, 2, 3]}))
    TASK[0].write(tmp_path, pa.table({"order": [1]}))
    (tmp_path / f".{TASK[1].name}.17.tmp").write_bytes(b"half")
    (tmp_path / "plan.txt").write_text("plan")
    assert list_parts(tmp_path) == TASK[::2]
    assert count_documents(tmp_path, TASK[::2]) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == [TASK[0].name, TASK[2].name, "plan.txt"]

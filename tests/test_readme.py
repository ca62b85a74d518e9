"""What README.md says is so: paths exist, commands are real. The long commands themselves run in test_line.py."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return README.split(f"## {title}\n")[1].split("\n## ")[0]


def tree_paths() -> list[str]:
    """Paths of the printed tree: an indented name lies under the last folder that is not indented."""
    paths, parent = [], ""
    for line in section("The tree").strip().strip("`").splitlines():
        if match := re.match(r"( *)(\S+) {2,}", line):
            indent, name = match.groups()
            paths.append(parent + name if indent else name)
            parent = parent if indent else name
    return paths


def test_the_printed_tree_exists_and_leaves_out_no_folder_of_the_package() -> None:
    paths = tree_paths()
    package = "platform/powerhouse/"

    assert [path for path in paths if not (ROOT / path).exists()] == []
    there = {f"{package}{item.name}" for item in (ROOT / package).iterdir() if item.suffix == ".py"}
    there |= {f"{package}{item.parent.name}/" for item in (ROOT / package).glob("*/__init__.py")}
    assert there - {f"{package}__init__.py"} == {path for path in paths if path.startswith(package)} - {package}


def test_the_reading_tour_is_six_files_that_exist() -> None:
    tour = re.findall(r"^\d\. `(\S+)`", section("A reading tour"), flags=re.MULTILINE)

    assert len(tour) == 6
    assert [path for path in tour if not (ROOT / path).is_file()] == []


def test_every_job_and_file_that_the_prose_names_exists() -> None:
    named = re.findall(r"\b(?:jobs|serve_apps)/[\w/]+\.(?:py|yaml)", README)

    assert len(named) >= 8
    assert [name for name in named if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize("target", sorted(set(re.findall(r"make (\w+)", README)) - {"it"}))
def test_every_make_target_named_is_there(target: str) -> None:
    assert subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True).returncode == 0

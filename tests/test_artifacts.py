from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from powerhouse.artifacts import MANIFEST, UNFINISHED, Artifact, NotDoneError, checking, produce, replacing, write_atomically
from powerhouse.errors import ArtifactError


class Stage:
    """Counts how often it ran, and writes one file."""

    def __init__(self, text: str = "data") -> None:
        self.num_runs = 0
        self.text = text

    def __call__(self, path: Path) -> dict[str, int]:
        self.num_runs += 1
        self.found = sorted(item.name for item in path.iterdir() if item.name != UNFINISHED)
        (path / "part").mkdir(exist_ok=True)
        (path / "part" / "a.txt").write_text(self.text)
        return {"num_letters": len(self.text)}


def test_the_manifest_tells_settings_inputs_counts_and_files(tmp_path: Path) -> None:
    source = produce(tmp_path / "source", "texts", {}, {}, Stage())
    made = produce(tmp_path / "made", "corpus", {"x": Path("a")}, {"source": source, "raw": "123"}, Stage())

    assert made == Artifact.open(tmp_path / "made", "corpus")
    assert made.manifest.inputs == {"source": source.manifest.digest, "raw": "123"}
    assert made.manifest.settings == {"x": "a"}
    assert made.manifest.counts == {"num_letters": 4}
    assert made.manifest.files == {"part/a.txt": 4}


def test_same_inputs_and_settings_skip_the_work_and_others_redo_it_from_an_empty_folder(tmp_path: Path) -> None:
    stage, path = Stage(), tmp_path / "out"
    for _ in range(2):
        produce(path, "corpus", {"x": 1}, {"in": "1"}, stage)
    assert stage.num_runs == 1

    for settings, inputs in (({"x": 2}, {"in": "1"}), ({"x": 2}, {"in": "2"})):
        produce(path, "corpus", settings, inputs, stage)
        assert stage.found == []
    assert stage.num_runs == 3


def test_the_digest_does_not_depend_on_how_long_it_took(tmp_path: Path) -> None:
    first, second = (produce(tmp_path / name, "corpus", {}, {}, Stage()) for name in "ab")

    assert first.manifest.digest == second.manifest.digest
    assert first.manifest.digest != produce(tmp_path / "c", "corpus", {}, {}, Stage("other!")).manifest.digest


def test_a_damaged_file_is_told_and_the_stage_runs_again(tmp_path: Path) -> None:
    stage, path = Stage(), tmp_path / "out"
    produce(path, "corpus", {}, {}, stage)
    (path / "part" / "a.txt").write_text("cut")

    with pytest.raises(ArtifactError, match=r"part/a.txt has 3 bytes; its manifest says 4"):
        Artifact.open(path, "corpus")
    produce(path, "corpus", {}, {}, stage)
    assert stage.num_runs == 2
    assert Artifact.open(path, "corpus").manifest.files == {"part/a.txt": 4}


@pytest.mark.parametrize(("can_resume", "found"), [(True, ["half.txt"]), (False, [])])
def test_unfinished_work_is_resumed_where_it_can_be_and_else_redone(tmp_path: Path, can_resume: bool, found: list[str]) -> None:
    def die(path: Path) -> dict[str, int]:
        (path / "half.txt").write_text("half")
        with replacing(path / "other.txt") as other:
            other.write_text("not all of it")
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        produce(tmp_path / "out", "model", {"x": 1}, {}, die, can_resume=can_resume)
    assert len(list((tmp_path / "out").glob(".other.txt.*.tmp"))) == 1
    with pytest.raises(ArtifactError, match="unfinished"):
        Artifact.open(tmp_path / "out", "model")
    stage = Stage()
    produce(tmp_path / "out", "model", {"x": 1}, {}, stage, can_resume=can_resume)

    assert stage.found == found


def test_unfinished_work_of_other_settings_is_not_resumed(tmp_path: Path) -> None:
    def die(path: Path) -> dict[str, int]:
        (path / "half.txt").write_text("half")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        produce(tmp_path / "out", "model", {"x": 1}, {}, die, can_resume=True)
    stage = Stage()
    produce(tmp_path / "out", "model", {"x": 2}, {}, stage, can_resume=True)

    assert stage.found == []


def test_a_folder_that_powerhouse_did_not_write_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")

    with pytest.raises(ArtifactError, match="did not write"):
        produce(tmp_path, "corpus", {}, {}, Stage())
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda path: None, "no such corpus folder"),
        (lambda path: path.mkdir(), "corpus is unfinished"),
        (lambda path: produce(path, "texts", {}, {}, Stage()), "not a corpus folder\n  got: texts\n  allowed: corpus"),
        (lambda path: (produce(path, "corpus", {}, {}, Stage()), (path / MANIFEST).write_text("{")), "manifest.json: damaged"),
    ],
)
def test_what_is_not_a_finished_folder_of_the_kind_is_refused(tmp_path: Path, prepare: object, message: str) -> None:
    prepare(tmp_path / "out")  # type: ignore[operator]

    with pytest.raises(ArtifactError) as caught:
        Artifact.open(tmp_path / "out", "corpus")
    assert message in str(caught.value)


def test_a_process_killed_halfway_leaves_unfinished_work_that_the_next_one_finishes(tmp_path: Path) -> None:
    path = tmp_path / "out"
    code = (
        "import os, signal, pathlib; from powerhouse.artifacts import produce\n"
        f"produce(pathlib.Path({str(path)!r}), 'corpus', {{}}, {{}}, lambda p: os.kill(os.getpid(), signal.SIGKILL))"
    )
    killed = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": "platform"})
    assert killed.returncode == -signal.SIGKILL

    with pytest.raises(ArtifactError, match="unfinished"):
        Artifact.open(path, "corpus")
    stage = Stage()
    produce(path, "corpus", {}, {}, stage)
    assert (stage.num_runs, Artifact.open(path, "corpus").manifest.counts) == (1, {"num_letters": 4})


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_atomically(path, "one")
    write_atomically(path, "two")

    assert [item.name for item in tmp_path.iterdir()] == ["x"]
    assert path.read_text() == "two"


def test_checking_does_no_work_and_changes_nothing(tmp_path: Path) -> None:
    stage, path = Stage(), tmp_path / "out"
    with checking(), pytest.raises(NotDoneError, match="there is no corpus of these inputs and settings"):
        produce(path, "corpus", {"x": 1}, {}, stage)
    assert (stage.num_runs, path.exists()) == (0, False)

    done = produce(path, "corpus", {"x": 1}, {}, stage)
    with checking():
        assert produce(path, "corpus", {"x": 1}, {}, stage) == done
        with pytest.raises(NotDoneError):
            produce(path, "corpus", {"x": 2}, {}, stage)
    assert Artifact.open(path, "corpus") == done

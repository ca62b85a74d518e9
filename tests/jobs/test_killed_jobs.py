"""What is killed with -9 in the middle is finished by the next run, to the same bytes and without beginning anew."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil
import pyarrow as pa
import pytest
import ray

from powerhouse.corpora import session
from powerhouse.corpora.pipeline import CurateConfig, curate
from powerhouse.corpora.session import TABLES, WorkersConfig, connect, worker_failures
from powerhouse.errors import ClusterError
from powerhouse.telemetry import make_logger
from tiny_corpus import contents, curate_config, job_overrides, prose, start_job

pytestmark = pytest.mark.slow

NUM_FILES = 2560
"""Ten tasks of one document a file, each long enough to be killed in."""


def make_config(folder: Path, output: Path, **changes: object) -> CurateConfig:
    inputs = [{"name": "notes", "kind": "other", "path": folder}]
    return curate_config(folder, output, inputs=inputs, num_documents_per_file=500, **changes)


def parts_of(corpus: Path) -> dict[str, int]:
    """Give the parts written so far, and when each was."""
    folder = corpus.with_name("corpus_documents")
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.parquet")}


def wait_for_more_parts(corpus: Path, is_alive: Callable[[], bool]) -> None:
    before = len(parts_of(corpus))
    while len(parts_of(corpus)) == before:
        assert is_alive(), "it ended before it could be killed"
        time.sleep(0.01)
    assert not (corpus.with_name("corpus_documents") / "manifest.json").exists()


def siblings(name: str, files: Iterable[str]) -> set[str]:
    """Give the files of all splits that hold the same range of documents: it is cut again unless it has all of them."""
    return {other for other in files if Path(other).name == Path(name).name}


def files_of(corpus: Path) -> dict[str, int]:
    """Give the files cut out so far, and when each was written."""
    return {f"{path.parent.name}/{path.name}": path.stat().st_mtime_ns for path in corpus.glob("*/part-*.parquet")}


def kill_driver(config: CurateConfig, storage: Path, address: str, *, with_workers: bool) -> None:
    """Start a job on the cluster and kill it, alone or with all processes that work for it."""
    job = start_job("curate_corpus.py", *job_overrides(config), storage=storage, address=address)
    wait_for_more_parts(config.output, lambda: job.poll() is None)
    workers = workers_here() if with_workers else []
    job.kill()
    for worker in workers:
        with contextlib.suppress(psutil.NoSuchProcess):  # some end by themselves when the one that they work for is gone
            worker.kill()
    job.communicate()


def workers_here() -> list[psutil.Process]:
    """Give the processes of this process' Ray that run tasks and actors, and what they have started."""
    return [child for child in psutil.Process().children(recursive=True) if is_worker(child) or is_worker(child.parent())]


def is_worker(process: psutil.Process | None) -> bool:
    try:
        name = "".join(process.cmdline()) if process is not None else ""
        return name.startswith("ray::") and "Agent" not in name  # its node's agents take the node with them
    except psutil.Error:
        return False


def kill_worker(config: CurateConfig) -> None:
    """Kill one of the actors; the run that it worked for has to end well."""
    thread = threading.Thread(target=curate, args=(config,))
    thread.start()
    wait_for_more_parts(config.output, thread.is_alive)
    next(worker for worker in workers_here() if "_Processor" in "".join(worker.cmdline())).kill()
    thread.join()


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("in")
    for number in range(NUM_FILES):
        (folder / f"{number:04d}.txt").write_text(prose(number, 6))
    return folder


@pytest.fixture(scope="module")
def whole(local_ray: str, notes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus as a run makes it that nobody kills."""
    return curate(make_config(notes, tmp_path_factory.mktemp("whole") / "corpus")).path


def test_what_workers_cannot_do_is_one_error(local_ray: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: pa.Table) -> pa.Table:
        raise OSError(28, "No space left on device")

    class Deadly:
        def __call__(self, _: pa.Table) -> pa.Table:
            os.kill(os.getpid(), signal.SIGKILL)
            raise AssertionError("it is dead")

    monkeypatch.setattr(session, "_MAX_RETRIES", 0)
    workers = WorkersConfig(num=1)
    connect(workers)
    items = ray.data.range(1)
    with (
        pytest.raises(ClusterError, match=r"cannot do their part\n  got: OSError: \[Errno 28\] No space left on device"),
        worker_failures("documents"),
    ):
        items.map_batches(fail, **TABLES, **workers.options()).materialize()
    with (
        pytest.raises(ClusterError, match=r"documents: the workers cannot do their part\n  got: Actor\w+Error: The actor"),
        worker_failures("documents"),
    ):
        items.map_batches(Deadly, **TABLES, **workers.pool(1)).materialize()


def test_a_job_killed_whole_then_its_driver_then_a_worker_ends_with_the_same_bytes(
    local_ray: str, notes: Path, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_logger("corpora").addHandler(caplog.handler)
    config = make_config(notes, tmp_path / "corpus", workers={"num": 2})
    kill_driver(config, tmp_path, local_ray, with_workers=True)
    of_first_run = parts_of(config.output)
    kill_driver(config, tmp_path, local_ray, with_workers=False)
    of_second_run = parts_of(config.output)
    kill_worker(config)
    assert 0 < len(of_first_run) < len(of_second_run)
    assert of_first_run.items() < of_second_run.items() < parts_of(config.output).items()
    assert contents(config.output) == contents(whole)
    assert contents(tmp_path / "corpus_documents") == contents(whole.with_name("corpus_documents"))
    (told,) = (record.fields for record in caplog.records if record.message == "documents of an earlier run are kept")  # type: ignore[attr-defined]
    assert told["num_kept"] >= 256 * len(of_second_run), "a worker may end its part after its driver's death"
    assert told["num_kept"] + told["num_scored"] == NUM_FILES


def test_a_cut_out_of_stored_scores_that_is_killed_goes_on_from_the_files_that_are_written(
    local_ray: str, notes: Path, whole: Path, tmp_path: Path
) -> None:
    for name in ("expected", "killed"):
        shutil.copytree(whole.parent, tmp_path / name)  # scores, and another cut out of them
    config = make_config(notes, tmp_path / "killed" / "corpus")
    half = config.model_copy(update={"heldout_share": 0.5, "num_documents_per_file": 40})
    expected = contents(curate(half.model_copy(update={"output": tmp_path / "expected" / "corpus"})).path)
    job = start_job("curate_corpus.py", *job_overrides(half), storage=tmp_path, address=local_ray)
    while not (config.output / "plan.txt").exists() or len(files_of(config.output)) < 12:
        assert job.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
    job.kill()
    job.communicate()
    assert not (config.output / "manifest.json").exists()
    of_first_run = files_of(config.output)
    (config.output / "train" / ".part-00000.parquet.1.tmp").write_bytes(b"half")
    again = curate(half)
    ranges = {
        name: time_ns for name, time_ns in of_first_run.items() if siblings(name, files_of(config.output)) <= set(of_first_run)
    }
    assert ranges.items() < files_of(config.output).items()
    assert ranges
    assert contents(again.path) == expected

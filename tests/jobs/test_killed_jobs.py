"""What is killed with -9 in the middle is finished by the next run, to the same bytes and without beginning anew."""

from __future__ import annotations

import signal
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from powerhouse.corpora.pipeline import CurateConfig, curate
from powerhouse.telemetry import make_logger
from tiny_corpus import contents, curate_config, job_overrides, prose, start_job, tiny_cluster

pytestmark = pytest.mark.slow

NUM_FILES = 1792
"""Seven tasks of one document a file, each long enough to be killed in."""


def make_config(folder: Path, output: Path) -> CurateConfig:
    inputs = [{"name": "notes", "kind": "other", "path": folder}]
    return curate_config(folder, output, inputs=inputs, num_documents_per_file=500)


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


def kill_machine(config: CurateConfig, storage: Path) -> None:
    """Kill a job together with the Ray that it started, as when the machine goes down."""
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as temporary:
        job = start_job("curate_corpus.py", *job_overrides(config), storage=storage, temporary=temporary)
        wait_for_more_parts(config.output, lambda: job.poll() is None)
        children = psutil.Process(job.pid).children(recursive=True)
        for process in (job, *children):
            process.send_signal(signal.SIGKILL)
        psutil.wait_procs(children, timeout=60)
        job.communicate()


def kill_driver(config: CurateConfig, storage: Path, address: str) -> None:
    """Kill the job alone; the cluster that it ran on stays."""
    job = start_job("curate_corpus.py", *job_overrides(config), storage=storage, address=address)
    wait_for_more_parts(config.output, lambda: job.poll() is None)
    job.send_signal(signal.SIGKILL)
    job.communicate()


def kill_worker(config: CurateConfig) -> None:
    """Kill one of the actors; the run that it worked for has to end well."""
    thread = threading.Thread(target=curate, args=(config,))
    thread.start()
    wait_for_more_parts(config.output, thread.is_alive)
    actors = [process for process in psutil.process_iter(["cmdline"]) if "_Processor" in "".join(process.info["cmdline"] or [])]
    ours = set(psutil.Process().children(recursive=True))
    next(process for process in actors if process in ours).send_signal(signal.SIGKILL)
    thread.join()


def test_killed_as_machine_as_driver_and_as_worker_it_ends_with_the_same_bytes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_logger("corpora").addHandler(caplog.handler)
    (tmp_path / "in").mkdir()
    for number in range(NUM_FILES):
        (tmp_path / "in" / f"{number:04d}.txt").write_text(prose(number, 6))
    config = make_config(tmp_path / "in", tmp_path / "corpus")
    with tiny_cluster() as address:
        kill_machine(config, tmp_path)
        of_first_run = parts_of(config.output)
        kill_driver(config, tmp_path, address)
        of_second_run = parts_of(config.output)
        kill_worker(config)
        whole = curate(make_config(tmp_path / "in", tmp_path / "other" / "corpus"))
    assert 0 < len(of_first_run) < len(of_second_run)
    assert of_first_run.items() < of_second_run.items() < parts_of(config.output).items()
    assert contents(config.output) == contents(whole.path)
    assert contents(tmp_path / "corpus_documents") == contents(tmp_path / "other" / "corpus_documents")
    (told,) = (record.fields for record in caplog.records if record.message == "documents of an earlier run are kept")  # type: ignore[attr-defined]
    assert told["num_kept"] == 256 * len(of_second_run)
    assert told["num_kept"] + told["num_scored"] == NUM_FILES

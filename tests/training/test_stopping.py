"""A job that is sent SIGTERM, as far as one process can show; test_launch has the rest."""

from __future__ import annotations

import signal
import threading
from pathlib import Path

import pytest

from powerhouse.training.stopping import marking_sigterm


class EndedError(Exception):
    pass


def end(number: int, frame: object) -> None:
    raise EndedError


def test_the_first_sigterm_leaves_a_mark_and_the_second_does_what_it_did_before(tmp_path: Path) -> None:
    mark, before = tmp_path / "stop", signal.signal(signal.SIGTERM, end)
    try:
        mark.touch()  # of a run that was killed before it could stop
        with marking_sigterm(mark):
            assert not mark.exists()
            signal.raise_signal(signal.SIGTERM)
            assert mark.exists()
            with pytest.raises(EndedError):
                signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is end
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not mark.exists()


def test_a_run_in_a_thread_leaves_signals_alone(tmp_path: Path) -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []

    def run() -> None:
        with marking_sigterm(tmp_path / "stop"):
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()

    assert seen == [before]

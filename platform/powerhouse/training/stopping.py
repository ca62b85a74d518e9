"""How a worker learns that it is to stop: SIGTERM to it or to the job, or Ray's notice that a node will be taken away. [Ray]

Ray's controller loads this module, and with it nothing that only the workers need.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ray.train.v2._internal.execution.callback import WorkerCallback
from ray.train.v2._internal.execution.context import get_train_context


class StopSignal(WorkerCallback):  # type: ignore[misc]  # Ray Train is not typed
    """SIGTERM's handler in a worker: a batch system or Kubernetes sends it some time before it kills."""

    was_sent = False

    def after_init_train_context(self) -> None:
        signal.signal(signal.SIGTERM, self)  # in the main thread, as it must be; Ray's own handler would end the process

    def __call__(self, number: int, frame: Any) -> None:
        self.was_sent = True


def mark_of_stop(output: Path) -> Path:
    """In the folder that every node sees."""
    return output / "stop"


@contextlib.contextmanager
def marking_sigterm(mark: Path) -> Iterator[None]:
    """Inside, the first SIGTERM to the job (`ray job stop`, a batch system) makes a file that its workers see, and no more.

    A second one does what it did outside.
    """
    mark.unlink(missing_ok=True)
    if threading.current_thread() is not threading.main_thread():  # where signals cannot be handled, nor are
        yield
        return

    def handle(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, outside)
        mark.touch()

    outside = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, outside)
        mark.unlink(missing_ok=True)


def is_asked_to_stop(mark: Path) -> bool:
    """Whether this process or the job was sent SIGTERM, or Ray told that a node of the run will be taken away."""
    handler = signal.getsignal(signal.SIGTERM)
    # What ray.train.get_preemption_info broadcasts, read here without its round through another process at every step.
    is_noticed = get_train_context().preemption_context.preemption_info is not None
    return is_noticed or (isinstance(handler, StopSignal) and handler.was_sent) or mark.exists()

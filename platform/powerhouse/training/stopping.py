"""How a worker learns that it is to stop: by SIGTERM, or by Ray's notice that a node will be taken away. [Ray]

Ray's controller loads this module, and with it nothing that only the workers need.
"""

from __future__ import annotations

import signal
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


def is_asked_to_stop() -> bool:
    """Whether this process was sent SIGTERM, or Ray told that a node of the run will be taken away (`ray drain-node`)."""
    handler = signal.getsignal(signal.SIGTERM)
    # What ray.train.get_preemption_info broadcasts, read here without its round through another process at every step.
    is_noticed = get_train_context().preemption_context.preemption_info is not None
    return is_noticed or (isinstance(handler, StopSignal) and handler.was_sent)

"""Where the numbers of a run go besides its own log: TensorBoard, MLflow.

A tracker has a thread of its own: the loop never waits for it, and what it cannot take is counted as lost.
"""

from __future__ import annotations

import importlib.util
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from powerhouse.errors import ConfigError
from powerhouse.telemetry import make_logger
from powerhouse.training.settings import MlflowConfig

Texts = Mapping[str, str]
_MOST_WAITING = 1000
_CLOSING_S = 20


class Tracker(Protocol):
    def log(self, step: int, values: Mapping[str, float], texts: Texts) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files that `tensorboard --logdir` reads; a resumed run purges what it writes again."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first_step)

    def log(self, step: int, values: Mapping[str, float], texts: Texts) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        for name, text in texts.items():
            self._writer.add_text(name, text, step)

    def close(self) -> None:
        self._writer.close()


class Mlflow:
    """One MLflow run for a folder, however often the training is resumed; a step is sent once."""

    def __init__(self, config: MlflowConfig, folder: Path, settings: Mapping[str, Any]) -> None:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # a server that is gone is not waited for
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self._client, self._metric = MlflowClient(tracking_uri=config.tracking_uri), Metric
        place = folder / "mlflow_run.txt"
        if not place.exists():
            known = self._client.get_experiment_by_name(config.experiment)
            experiment = known.experiment_id if known else self._client.create_experiment(config.experiment)
            run = self._client.create_run(experiment, run_name=config.run_name or folder.name)
            parameters = [Param(name, str(value)[:500]) for name, value in _flatten(settings).items()]
            self._client.log_batch(run.info.run_id, params=parameters[:100])
            place.write_text(run.info.run_id, encoding="utf-8")
        self._run_id = place.read_text(encoding="utf-8")
        self._client.update_run(self._run_id, status="RUNNING")  # again, where an earlier start of it was cut off
        self._last_step = max((point.step for point in self._client.get_metric_history(self._run_id, "loss")), default=-1)

    def log(self, step: int, values: Mapping[str, float], texts: Texts) -> None:
        if step <= self._last_step:
            return
        now_ms = int(time.time() * 1000)
        metrics = [self._metric(name, value, now_ms, step) for name, value in values.items()]
        self._client.log_batch(self._run_id, metrics=metrics)
        for name, text in texts.items():
            self._client.set_tag(self._run_id, f"{name} at step {step}", text)

    def close(self) -> None:
        self._client.set_terminated(self._run_id)


def check_mlflow(config: MlflowConfig | None) -> None:
    """Hold that the client is installed.

    Raises:
        ConfigError: it is not.
    """
    if config and importlib.util.find_spec("mlflow") is None:
        raise ConfigError("watch.mlflow: no MLflow client here", do="pip install 'powerhouse[mlflow]' on every node")


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


class Guarded:
    """A tracker behind a queue: what it throws is told of once, and counted."""

    def __init__(self, name: str, open_tracker: Callable[[], Tracker]) -> None:
        self.name, self.num_lost = name, 0
        self._open = open_tracker
        self._waiting: queue.Queue[tuple[int, Mapping[str, float], Texts] | None] = queue.Queue(_MOST_WAITING)
        self._thread = threading.Thread(target=self._work, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def log(self, step: int, values: Mapping[str, float], texts: Texts) -> None:
        try:
            self._waiting.put_nowait((step, values, texts))
        except queue.Full:
            self._lose("it takes the lines too slowly")

    def close(self) -> None:
        """Send what waits, but do not wait for ever."""
        try:
            self._waiting.put(None, timeout=_CLOSING_S)
        except queue.Full:
            return self._lose("it takes the lines too slowly", self._waiting.qsize())
        self._thread.join(_CLOSING_S)
        if self._thread.is_alive():
            self._lose("it does not end", self._waiting.qsize())
        return None

    def _work(self) -> None:
        tracker: Tracker | None = None
        while (line := self._waiting.get()) is not None:
            try:
                tracker = tracker or self._open()
                tracker.log(*line)
            except Exception as error:  # whatever a tracker meets, the training goes on
                self._lose(error)
        try:
            if tracker:
                tracker.close()
        except Exception as error:
            self._lose(error, 0)

    def _lose(self, reason: object, num_lines: int = 1) -> None:
        if not self.num_lost:
            fields = {"tracker": self.name, "reason": str(reason)[:300]}
            make_logger("training").warning("a tracker loses lines; the training goes on", extra={"fields": fields})
        self.num_lost += num_lines

"""What is seen of a run while it goes on. Every rank has a `Watch`; what it shows and writes is the first rank's."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch.distributed as dist

from powerhouse.telemetry import Gauge, MetricsLog, progress

METRICS = "metrics.jsonl"


class Watch:
    """A progress bar and `folder`/metrics.jsonl; the loop tells it of every step and knows nothing else of it."""

    def __init__(self, folder: Path, start_step: int, num_steps: int, gauge: Gauge | None = None) -> None:
        is_main = dist.get_rank() == 0
        self._log = MetricsLog(folder / METRICS, start_step, gauge) if is_main else None
        self._bar = progress("training", num_steps, "step") if is_main else None
        if self._bar:
            self._bar.update(start_step)
        self._start_s = time.perf_counter()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._log and self._bar:
            self._log.close()
            self._bar.close()

    def begin(self) -> None:
        """A step begins: its time runs."""
        self._start_s = time.perf_counter()

    def record(self, step: int, values: Mapping[str, float], num_tokens: int) -> None:
        """A step is done: `values` by name, of the global batch, and the tokens that it predicted. A collective."""
        if not (self._log and self._bar):
            return
        speed = num_tokens / (time.perf_counter() - self._start_s)
        self._log.write(step, {**values, "tokens_per_s": speed})
        self._bar.set_postfix_str(f"loss {values['loss']:.3f}, {speed:,.0f} tokens/s", refresh=False)
        self._bar.update()

"""What is seen of a run while it goes on. Every rank has a `Watch`; what it shows and writes is the first rank's.

The folder gets metrics.jsonl (a line of numbers every `log_every` steps), samples.jsonl, starts.jsonl (a line each time the
run was started), tensorboard/. A resumed run leaves the lines that an uninterrupted one would have left.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import nn

from powerhouse.artifacts import Artifact
from powerhouse.telemetry import Gauge, MetricsLog, progress, read_metrics
from powerhouse.training.config import TrainingConfig
from powerhouse.training.energy import Meter, find_meter
from powerhouse.training.flops import Peak, peak_of, row_flops
from powerhouse.training.look import Look, Seen
from powerhouse.training.plan import dtype_of, empty_batch
from powerhouse.training.settings import METRICS, SAMPLES, STARTS, TENSORBOARD
from powerhouse.training.trackers import Guarded, Mlflow, TensorBoard

_SECONDS_AN_HOUR = 3600


class Watch:
    """The loop tells it of every step and knows nothing else of it."""

    def __init__(self, config: TrainingConfig, model: nn.Module, start_step: int, gauge: Gauge | None = None) -> None:
        self._config, self._watch = config, config.watch
        self._device = next(model.parameters()).device
        row_length = int(Artifact.open(config.tokens, "tokens").manifest.counts["row_length"])
        self._look = Look(config, model, row_length, self._device)
        self._energy = _Energy(config, self._device)
        self._board: _Board | None = None
        if dist.get_rank() == 0:
            lengths = {name: tensor.shape[1] for name, tensor in empty_batch(config, row_length).items()}
            step_flops = config.global_batch_rows * row_flops(model, lengths).total
            peak = peak_of(self._device, dtype_of(config))
            self._board = _Board(config, self._device, start_step, step_flops, peak, self._energy.source, gauge)
        self._interval = _Interval()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._board:
            self._board.close()

    def begin(self) -> None:
        """A step begins: its time runs."""
        self._interval.begin()

    def record(self, step: int, values: Mapping[str, float], num_tokens: int) -> None:
        """A step is done: `values` by name, of the global batch, and the tokens that it predicted. A collective."""
        self._interval.end(num_tokens, values.get("skipped", 0.0))
        num_done, is_last = step + 1, step + 1 == self._config.num_steps
        looks = self._look.is_wanted and (is_last or num_done % self._watch.look_every == 0)
        seen = self._look() if looks else Seen()
        if looks or is_last or num_done % self._watch.log_every == 0:
            joules = self._energy.joules()
            if self._board:
                self._board.write(step, values, self._interval, joules, seen)
            self._interval = _Interval()
        if self._board:
            self._board.advance(values)


class _Interval:
    """Steps since the last line: their seconds, without what is between them, their tokens, and how many were skipped."""

    def __init__(self) -> None:
        self.num_steps = self.num_tokens = 0
        self.seconds = self.num_skipped = 0.0
        self._start_s = time.perf_counter()

    def begin(self) -> None:
        self._start_s = time.perf_counter()

    def end(self, num_tokens: int, is_skipped: float) -> None:
        self.seconds += time.perf_counter() - self._start_s
        self.num_skipped += is_skipped
        self.num_steps += 1
        self.num_tokens += num_tokens


class _Energy:
    """Of all ranks, where each has a meter."""

    def __init__(self, config: TrainingConfig, device: torch.device) -> None:
        self._device = device
        self._meter: Meter | None = find_meter(device, config.watch.declared_watts)
        self._has_all = self._sum(float(self._meter is not None)) == dist.get_world_size()
        self.source = self._meter.source if self._meter and self._has_all else None

    def joules(self) -> float | None:
        """Since the start; None without meters. A collective."""
        return self._sum(self._meter.joules()) if self._meter and self._has_all else None

    def _sum(self, number: float) -> float:
        total = torch.tensor([number], dtype=torch.float64, device=self._device)
        dist.all_reduce(total)
        return float(total)


class _Board:
    """The first rank's: bar, logs, trackers, gauges."""

    def __init__(
        self,
        config: TrainingConfig,
        device: torch.device,
        start_step: int,
        step_flops: int,
        peak: Peak | None,
        energy_source: str | None,
        gauge: Gauge | None,
    ) -> None:
        self._config, self._device, self._step_flops, self._peak = config, device, step_flops, peak
        folder, watch = config.output, config.watch
        before = read_metrics(folder / METRICS)
        self._energy_before_wh = float(before[-1].get("energy_wh", 0.0)) if before else 0.0
        self._log = MetricsLog(folder / METRICS, start_step, gauge)
        self._samples = MetricsLog(folder / SAMPLES, start_step)
        start = {
            "step": start_step,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "workers": dist.get_world_size(),
        }
        facts = {"peak_source": peak.source if peak else None, "energy_source": energy_source}
        self._starts = folder / STARTS
        _append(self._starts, start | {"peak_flops_per_s": peak.flops_per_s if peak else None} | facts)
        self._trackers = (
            [Guarded("TensorBoard", partial(TensorBoard, folder / TENSORBOARD, start_step))] if watch.tensorboard else []
        )
        if watch.mlflow:
            settings = config.model_dump(mode="json", exclude={"watch"})
            self._trackers.append(Guarded("MLflow", partial(Mlflow, watch.mlflow, folder, settings)))
        self._bar = progress("training", config.num_steps, "step")
        self._bar.update(start_step)
        self._speed = ""

    def write(self, step: int, values: Mapping[str, float], interval: _Interval, joules: float | None, seen: Seen) -> None:
        skipped = {"skipped": interval.num_skipped} if "skipped" in values else {}
        line = {**values, **skipped, **self._rates(interval), **self._energy(joules), **seen.values}
        self._log.write(step, line)
        for number, (prompt, text) in enumerate(seen.samples.items()):
            self._samples.write(step, {"number": number, "prompt": prompt, "text": text})
        for tracker in self._trackers:
            tracker.log(step, line, {f"sample {i}": f"{p} **{t}**" for i, (p, t) in enumerate(seen.samples.items())})
        mfu = f", MFU {line['mfu']:.0%}" if "mfu" in line else ""
        self._speed = f", {line['tokens_per_s']:,.0f} tokens/s{mfu}, {line['memory_bytes'] / 1e9:.1f} GB"

    def _rates(self, interval: _Interval) -> dict[str, float]:
        rates = {"tokens_per_s": interval.num_tokens / interval.seconds, "step_s": interval.seconds / interval.num_steps}
        if self._peak:
            achieved = self._step_flops * interval.num_steps / interval.seconds
            rates["mfu"] = achieved / (self._peak.flops_per_s * dist.get_world_size())
        return rates | {"memory_bytes": _memory_bytes(self._device)}

    def _energy(self, joules: float | None) -> dict[str, float]:
        if joules is None:
            return {}
        energy_wh, grid = self._energy_before_wh + joules / _SECONDS_AN_HOUR, self._config.watch.grid_g_per_kwh
        return {"energy_wh": energy_wh} | ({} if grid is None else {"co2e_g": energy_wh / 1000 * grid})

    def advance(self, values: Mapping[str, float]) -> None:
        norm = f", norm {values['grad_norm']:.2f}" if "grad_norm" in values else ""
        self._bar.set_postfix_str(f"loss {values['loss']:.3f}{norm}{self._speed}", refresh=False)
        self._bar.update()

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()
        if lost := {tracker.name: tracker.num_lost for tracker in self._trackers if tracker.num_lost}:
            _append(self._starts, {"lines_lost": lost})
        self._log.close()
        self._samples.close()
        self._bar.close()


def _memory_bytes(device: torch.device) -> int:
    """Most that this process has had: of the GPU where there is one, else of the machine's memory now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


def _append(path: Path, line: Mapping[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")

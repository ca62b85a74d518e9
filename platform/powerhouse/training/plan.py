"""A training run before it is started: what it takes of memory, work and time, and whether it fits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import psutil
import torch
from pydantic import Field

from powerhouse.artifacts import MANIFEST, Artifact
from powerhouse.config import Config
from powerhouse.device import computes_bfloat16
from powerhouse.errors import ConfigError
from powerhouse.training.batches import Noise
from powerhouse.training.config import TrainingConfig, check, read_shape
from powerhouse.training.empty import compute_dtype, empty_model
from powerhouse.training.flops import DEVICES, Peak, RowFlops, count_parameters, peak_of, row_flops
from powerhouse.training.memory import Memory, plan_memory
from powerhouse.training.methods import method_of
from powerhouse.training.noise import SpanLengths
from powerhouse.training.objectives import Batch

_CHUNK_LOGIT_BYTES = 16
"""A logit of a chunk of the loss: itself, its logarithm of a probability and their two gradients, in float32."""


class PlanSettings(Config):
    """What a plan supposes, beside the run's own settings."""

    device: str | None = None
    """GPU of each worker: one of the table in training/flops.py. With `run.use_gpu` there is no default."""
    mfu: float = Field(default=0.4, gt=0, le=1)
    """Share of the peak that the run will reach; only the time depends on it."""
    row_length: int | None = Field(default=None, gt=1)
    """Tokens in a row, where the tokens are not there yet to tell it."""
    reserve: float = Field(default=0.08, ge=0, lt=1)
    """Share of the memory left to CUDA, nccl and what the allocator cannot use."""


class PlanConfig(TrainingConfig):
    """A training config, and what its plan supposes."""

    plan: PlanSettings = PlanSettings()
    """What the plan supposes."""


@dataclass(frozen=True)
class Plan:
    """The figures of a run; bytes and FLOP/s of one worker."""

    parameters: int
    trained_parameters: int
    flops: RowFlops
    num_positions: int
    memory: Memory
    room: float
    """Bytes that a worker may use."""
    where: str
    """The worker's device, for people."""
    peak: Peak

    def seconds(self, num_rows: int, num_workers: int, mfu: float) -> float:
        return num_rows * self.flops.total / (self.peak.flops_per_s * num_workers * mfu)


def plan_training(config: PlanConfig) -> str:
    """The plan as text.

    Raises:
        ConfigError: the settings do not fit each other or the tokens, or the run does not fit into memory.
    """
    config = config.model_copy(update={"model": read_shape(config).model})
    tokens = Artifact.open(config.tokens, "tokens") if (config.tokens / MANIFEST).exists() else None
    if tokens:
        check(config, tokens)
    plan = make_plan(config, _row_length(config, tokens))
    if plan.memory.total > plan.room:
        raise _does_not_fit(config, plan)
    return describe(config, plan, int(tokens.manifest.counts["num_rows"]) if tokens else None)


def _row_length(config: PlanConfig, tokens: Artifact | None) -> int:
    if tokens:
        return int(tokens.manifest.counts["row_length"])
    if config.plan.row_length is None:
        raise ConfigError(f"tokens: {config.tokens} is not there", do="make them first, or give plan.row_length=NUMBER")
    return config.plan.row_length


def make_plan(config: PlanConfig, row_length: int) -> Plan:
    method, model, batch = method_of(config.shape), empty_model(config), empty_batch(config, row_length)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    flops = row_flops(model, {name: tensor.shape[1] for name, tensor in batch.items()})
    dtype, (where, room, peak) = dtype_of(config), _worker(config)
    parameters = count_parameters(model)
    memory = plan_memory(
        model,
        list(model.blocks().values()),
        partial(method.objective, chunk_tokens=config.run.loss_chunk_tokens),
        batch,
        num_workers=config.run.workers_per_copy or config.run.num_workers,
        dtype=dtype,
        recompute=config.run.recompute,
    )
    if config.run.accumulate == "deferred":
        memory = replace(memory, gradients=trained * torch.float32.itemsize)
    if chunk := config.run.loss_chunk_tokens:
        memory = replace(memory, activations=memory.activations + chunk * config.shape.vocab_size * _CHUNK_LOGIT_BYTES)
    return Plan(parameters, trained, flops, method.num_positions(row_length), memory, room, where, peak)


def dtype_of(config: TrainingConfig) -> torch.dtype:
    if config.precision != "auto":
        return compute_dtype(config)
    return torch.bfloat16 if computes_bfloat16("cuda" if config.run.use_gpu else "cpu") else torch.float32


def empty_batch(config: TrainingConfig, row_length: int) -> Batch:
    """A micro-batch as the run's method makes it, on the meta device."""
    method, noise = method_of(config.shape), config.noise
    num_spans = SpanLengths.of(row_length, noise.share, noise.mean_span).num_spans
    nothing = Noise(0, noise.share, noise.mean_span, config.shape.vocab_size, 0, 0, (), (0,) * num_spans)
    num_rows = config.run.micro_batch_rows
    rows_BR = np.zeros((num_rows, row_length), dtype=np.int32)
    batch = method.batch(rows_BR, np.arange(num_rows), nothing, torch.device("cpu"))
    return {name: tensor.to("meta") for name, tensor in batch.items()}


def _worker(config: PlanConfig) -> tuple[str, float, Peak]:
    """Name, bytes and peak of a worker's device."""
    name, share = config.plan.device, 1 - config.plan.reserve
    if not config.run.use_gpu:
        if name is not None:
            raise ConfigError("plan.device: a GPU, but run.use_gpu is off", got=name, do="run.use_gpu=true")
        peak = peak_of(torch.device("cpu"), dtype_of(config))
        assert peak is not None, "a CPU's peak is measured"
        return "its share of this machine", psutil.virtual_memory().total / config.run.num_workers * share, peak
    if name is None or name not in DEVICES:
        raise ConfigError("plan.device: the GPU of each worker", got=name, allowed=", ".join(DEVICES))
    device = DEVICES[name]
    peak = Peak(device.peak_tflops * 1e12, "dense bfloat16, by the data sheet")
    return f"{name} of {device.memory_gb:g} GB", device.memory_gb * 1e9 * share, peak


def _does_not_fit(config: PlanConfig, plan: Plan) -> ConfigError:
    parts = ", ".join(f"{name} {_gb(size)}" for name, size in asdict(plan.memory).items())
    fits = (f"{change} ({_gb(need)})" for change, need in _changes(config, plan) if need <= plan.room)
    return ConfigError(
        f"the run does not fit into the memory of a worker ({plan.where})",
        got=f"{_gb(plan.memory.total)}: {parts}",
        allowed=f"{_gb(plan.room)}, which is less {config.plan.reserve:.0%} for what torch does not count",
        do=next(fits, "a smaller model, shorter rows, or GPUs with more memory"),
    )


def _changes(config: PlanConfig, plan: Plan) -> Iterator[tuple[str, int]]:
    """Settings that take less memory, the mildest first, with the bytes that a worker needs then."""
    row_length = plan.num_positions + method_of(config.shape).predicts_next
    least: dict[str, Any] = {"micro_batch_rows": 1, "recompute": "full"}
    memory = plan.memory
    for change in ({"recompute": "selective"}, {"micro_batch_rows": 1}, {"recompute": "full"}, least):
        changed = config.model_copy(update={"run": config.run.model_copy(update=change)})
        memory = make_plan(changed, row_length).memory
        yield _as_overrides(change), memory.total
    for factor in (2, 4, 8, 16):
        slices = memory.weights + memory.gradients + memory.optimizer
        num_workers = config.run.num_workers * factor
        yield _as_overrides(least | {"num_workers": num_workers}), memory.total - slices + slices // factor


def _as_overrides(change: Mapping[str, Any]) -> str:
    return " ".join(f"run.{name}={str(value).lower()}" for name, value in change.items())


def describe(config: PlanConfig, plan: Plan, num_rows: int | None) -> str:
    """The plan in lines of a name and what is to be said of it."""
    workers, rows = config.run.num_workers, config.num_steps * config.global_batch_rows
    tokens, flops = rows * plan.num_positions, rows * plan.flops.total
    epochs = f", {rows / num_rows:.2f} times the {num_rows:,} rows there are" if num_rows else ""
    micro = config.global_batch_rows // (workers * config.run.micro_batch_rows)
    seconds = plan.seconds(rows, workers, config.plan.mfu)
    attention = plan.flops.attention / plan.flops.total
    lines = {
        "parameters": f"{plan.parameters:,}, of which {plan.trained_parameters:,} are trained",
        "tokens": f"{tokens:,} in rows of {plan.num_positions:,}{epochs}",
        "steps": f"{config.num_steps:,} of {config.global_batch_rows} rows: {workers} workers x {micro} micro-batches x "
        f"{config.run.micro_batch_rows} rows",
        "FLOPs": f"{flops:.3g} in all, {plan.flops.total / plan.num_positions:.3g} a token, {attention:.0%} of it attention "
        "(6 N + 12 L H D T, PaLM appendix B)",
        "memory": f"{_gb(plan.memory.total)} a worker, of {_gb(plan.room)} ({plan.where}, less {config.plan.reserve:.0%})",
        **{f"  {name}": _gb(size) for name, size in asdict(plan.memory).items()},
        "peak": f"{plan.peak.flops_per_s / 1e12:,.3g} TFLOP/s a worker ({plan.peak.source})",
        "time": f"{_duration(seconds)}, {workers * seconds / 3600:,.3g} worker-hours, {tokens / seconds:,.0f} tokens/s, "
        f"if it reaches an MFU of {config.plan.mfu:.0%} (plan.mfu)",
    }
    return "\n".join(f"{name:<14}{text}" for name, text in lines.items())


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    if hours >= 48:
        return f"{hours / 24:.1f} days"
    if hours >= 2:
        return f"{hours:.1f} hours"
    return f"{minutes:.1f} minutes" if minutes >= 2 else f"{seconds:.2g} seconds"

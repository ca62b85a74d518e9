"""The settings of a training run, and what they must agree on."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from powerhouse.artifacts import Artifact
from powerhouse.config import Config, StoragePath
from powerhouse.errors import ConfigError
from powerhouse.models.decoder import DecoderConfig


class OptimConfig(Config):
    """AdamW (Loshchilov and Hutter 2019) under a cosine schedule with warm-up (Loshchilov and Hutter 2017)."""

    lr: float = Field(gt=0)
    """Highest learning rate."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the rate rises linearly to `lr`."""
    final_lr_fraction: float = Field(default=0.1, ge=0, le=1)
    """The rate falls to this fraction of `lr` at the last step."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decay of matrices; norms are not decayed."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the gradient's running mean."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the squared gradient's running mean."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the squared gradient's mean."""
    clip_norm: float = Field(default=1.0, gt=0)
    """Longest gradient, in the 2-norm over all parameters."""


class RunConfig(Config):
    """How the work is spread and saved: it changes the speed, not the result, so a resumed run may change it."""

    num_workers: int = Field(default=1, gt=0)
    """Training processes; the model is sharded over them."""
    micro_batch_rows: int = Field(gt=0)
    """Rows in one forward pass of one worker; the rest of the global batch is accumulated."""
    cpus_per_worker: float = Field(default=1, gt=0)
    """CPUs asked of Ray for a worker; also its number of torch threads, at least one."""
    use_gpu: bool = False
    """A GPU for each worker, and nccl instead of gloo."""
    checkpoint_every: int = Field(default=100, gt=0)
    """Steps between two checkpoints; the last step is always saved."""
    keep_checkpoints: int = Field(default=1, gt=0)
    """Newest checkpoints that are kept."""
    max_failures: int = Field(default=2, ge=0)
    """How often lost workers are replaced before the run gives up."""


class TrainingConfig(Config):
    """Train a decoder from scratch on packed rows."""

    tokens: StoragePath
    """Artifact of packed rows."""
    output: StoragePath
    """Where the model directory goes."""
    model: DecoderConfig
    """Shape of the model."""
    optim: OptimConfig
    """Optimiser and schedule."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the computation; master weights, gradient sums and the optimiser's state are always float32. `auto` is
    bfloat16 where the processor has instructions for it, else float32; the model's manifest names the one that was used."""
    global_batch_rows: int = Field(gt=0)
    """Rows that one step learns from, over all workers."""
    num_steps: int = Field(gt=0)
    """Optimiser steps."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Of the fresh weights and of the order of the rows."""
    run: RunConfig
    """How the work is spread and saved."""

    @property
    def rows_per_worker(self) -> int:
        """Rows of one step that one worker sees."""
        return self.global_batch_rows // self.run.num_workers


def check(config: TrainingConfig, tokens: Artifact) -> None:
    """Hold the settings against each other and against the tokens.

    Raises:
        ConfigError: the global batch does not divide, or the model cannot take these tokens.
    """
    _check_batch(config)
    counts = tokens.manifest.counts
    if config.model.vocab_size < counts["vocab_size"]:
        raise ConfigError(
            f"model.vocab_size: smaller than the vocabulary of {tokens.path}",
            got=config.model.vocab_size,
            allowed=f"{counts['vocab_size']} or more",
        )
    if config.model.max_position_embeddings < counts["row_length"] - 1:
        raise ConfigError(
            f"model.max_position_embeddings: shorter than the rows of {tokens.path}",
            got=config.model.max_position_embeddings,
            allowed=f"{counts['row_length'] - 1} or more",
        )


def _check_batch(config: TrainingConfig) -> None:
    rows, micro = config.global_batch_rows, config.run.micro_batch_rows
    if rows % (config.run.num_workers * micro) == 0:
        return
    if rows % micro:
        raise ConfigError(
            "run.micro_batch_rows: does not divide the global batch",
            got=f"{micro} with global_batch_rows={rows}",
            allowed=_divisors(rows),
        )
    raise ConfigError(
        "run.num_workers: does not divide the global batch",
        got=f"{config.run.num_workers} with global_batch_rows={rows} and micro_batch_rows={micro}",
        allowed=_divisors(rows // micro),
    )


def _divisors(number: int) -> str:
    return ", ".join(str(i) for i in range(1, number + 1) if number % i == 0)

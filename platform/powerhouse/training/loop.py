"""The one training loop: plain torch on a process group that is there already. A collective from end to end.

Shapes: B rows. The gradient of a step is that of loss_sum / num_valid_tokens, both summed over ranks and micro-batches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from powerhouse.errors import TrainingError
from powerhouse.training.checkpoint import Checkpoints
from powerhouse.training.config import TrainingConfig
from powerhouse.training.objectives import Batch, Objective
from powerhouse.training.optim import learning_rate, set_learning_rate
from powerhouse.training.settings import OptimConfig, RunConfig
from powerhouse.training.sharding import announce_backward
from powerhouse.training.watch import Watch


@dataclass(frozen=True)
class StepResult:
    """Of the global batch, before the update."""

    loss: float
    """Nats per token."""
    grad_norm: float
    """2-norm over all parameters, before clipping."""
    num_tokens: int
    """Tokens that were predicted."""


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    batches: Iterator[Batch],
    config: TrainingConfig,
    start_step: int,
    watch: Watch,
    checkpoints: Checkpoints,
) -> None:
    """Run steps `start_step` .. `num_steps` - 1; `batches` yields this rank's rows of each of them.

    `watch` is told of every step, `checkpoints` keep the state.

    Raises:
        TrainingError: the loss or the gradient is not a number, on every rank at the same step, or a checkpoint failed.
        StopRequest: the run was asked to stop, and has saved its state.
    """
    for step in range(start_step, config.num_steps):
        watch.begin()
        rate = learning_rate(step, config.num_steps, config.optim)
        set_learning_rate(optimizer, rate)
        result = train_step(model, optimizer, objective, next(batches), config.run, config.optim)
        _check_is_finite(step, result)
        watch.record(step, {"loss": result.loss, "lr": rate, "grad_norm": result.grad_norm}, result.num_tokens)
        num_done = step + 1
        is_due = num_done % config.run.checkpoint_every == 0 or num_done == config.num_steps
        checkpoints.after_step(num_done, is_due, model, optimizer)


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    batch: Batch,
    run: RunConfig,
    config: OptimConfig,
) -> StepResult:
    """Accumulate the sum's gradient over the micro-batches, divide by the global count, clip, update."""
    totals = accumulate(model, objective, batch, run)
    loss, num_tokens = (totals[0] / totals[1]).item(), int(totals[1].item())
    grad_norm = clip_gradients(model, config.clip_norm)
    optimizer.step()
    optimizer.zero_grad()
    return StepResult(loss, grad_norm, num_tokens)


def accumulate(model: nn.Module, objective: Objective, batch: Batch, run: RunConfig) -> Tensor:
    """Leave the gradient of the global mean in the parameters; return (loss_sum, num_valid_tokens) over all ranks."""
    totals = torch.zeros(2, dtype=torch.float64, device=next(model.parameters()).device)
    micro_batches = split(batch, run.micro_batch_rows)
    for number, micro_batch in enumerate(micro_batches, start=1):
        announce_backward(model, is_last=number == len(micro_batches), is_deferred=run.accumulate == "deferred")
        loss_sum, num_valid = objective(model, micro_batch)
        torch.autograd.backward(loss_sum)
        totals += torch.stack([loss_sum.detach().double(), num_valid.double()])
    dist.all_reduce(totals)
    torch._foreach_div_(gradients(model), totals[1].item())
    return totals


def split(batch: Batch, num_rows: int) -> list[Batch]:
    """Cut every tensor of the batch into pieces of `num_rows` rows."""
    names, pieces = list(batch), zip(*(torch.split(tensor, num_rows) for tensor in batch.values()), strict=True)
    return [dict(zip(names, piece, strict=True)) for piece in pieces]


def gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def clip_gradients(model: nn.Module, max_norm: float) -> float:
    """Scale the gradients down to `max_norm`; the norm is over the whole model, not this rank's shard of it."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    whole: Tensor = norm.full_tensor() if isinstance(norm, DTensor) else norm
    return float(whole.item())


def _check_is_finite(step: int, result: StepResult) -> None:
    if math.isfinite(result.loss) and math.isfinite(result.grad_norm):
        return
    raise TrainingError(
        f"step {step}: the loss or its gradient is not a number",
        got=f"loss {result.loss}, gradient norm {result.grad_norm}",
        do="lower optim.lr or optim.clip_norm, or lengthen optim.warmup_steps",
    )

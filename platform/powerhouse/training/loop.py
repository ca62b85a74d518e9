"""The one training loop: plain torch on a process group that is there already. A collective from end to end.

Shapes: B rows. The gradient of a step is that of loss_sum / num_valid_tokens, both summed over ranks and micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from powerhouse.training.checkpoint import Checkpoints
from powerhouse.training.config import TrainingConfig
from powerhouse.training.guard import Guard, Verdict
from powerhouse.training.objectives import Batch, Objective
from powerhouse.training.optim import learning_rate, set_learning_rate
from powerhouse.training.settings import RunConfig
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
    verdict: Verdict
    """Whether the update was made."""
    scale: float
    """What the loss was multiplied by."""

    def values(self) -> dict[str, float]:
        """What is logged; an overflow has no norm."""
        norm = {} if self.verdict == "overflow" else {"grad_norm": self.grad_norm}
        skipped = float(self.verdict != "taken")
        return {"loss": self.loss, **norm, "skipped": skipped, **({"loss_scale": self.scale} if self.scale != 1 else {})}


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    guard: Guard,
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
        result = train_step(step, model, optimizer, guard, objective, next(batches), config.run)
        watch.record(step, {"lr": rate, **result.values()}, result.num_tokens)
        num_done = step + 1
        is_due = num_done % config.run.checkpoint_every == 0 or num_done == config.num_steps
        checkpoints.after_step(num_done, is_due, model, optimizer, guard)


def train_step(
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    guard: Guard,
    objective: Objective,
    batch: Batch,
    run: RunConfig,
) -> StepResult:
    """Accumulate the sum's gradient over the micro-batches, divide by the global count, clip, update.

    Raises:
        TrainingError: the loss or the gradient is not a number, on every rank at the same step.
    """
    scale = guard.scale
    totals = accumulate(model, objective, batch, run, scale)
    loss, num_tokens = (totals[0] / totals[1]).item(), int(totals[1].item())
    grad_norm = clip_gradients(model, guard.config.clip_norm)
    verdict = guard.judge(step, loss, grad_norm)
    if verdict == "taken":
        optimizer.step()
    optimizer.zero_grad()
    return StepResult(loss, grad_norm, num_tokens, verdict, scale)


def accumulate(model: nn.Module, objective: Objective, batch: Batch, run: RunConfig, scale: float = 1.0) -> Tensor:
    """Leave the gradient of the global mean in the parameters; return (loss_sum, num_valid_tokens) over all ranks."""
    totals = torch.zeros(2, dtype=torch.float64, device=next(model.parameters()).device)
    micro_batches = split(batch, run.micro_batch_rows)
    for number, micro_batch in enumerate(micro_batches, start=1):
        announce_backward(model, is_last=number == len(micro_batches), is_deferred=run.accumulate == "deferred")
        loss_sum, num_valid = objective(model, micro_batch)
        torch.autograd.backward(loss_sum * scale)
        totals += torch.stack([loss_sum.detach().double(), num_valid.double()])
    dist.all_reduce(totals)
    torch._foreach_div_(gradients(model), totals[1].item() * scale)
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

"""The optimiser and its learning rate."""

from __future__ import annotations

import math

import torch
from torch import nn

from powerhouse.models.model import Model
from powerhouse.training.muon import Muon
from powerhouse.training.settings import OptimConfig

OPTIMIZERS: dict[str, type[torch.optim.AdamW]] = {"adamw": torch.optim.AdamW, "muon": Muon}


def make_optimizer(model: Model, config: OptimConfig) -> torch.optim.AdamW:
    """Decay matrices only: a norm's weight has no reason to be small. Muon's are those inside the blocks."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    in_blocks = {parameter for block in model.blocks().values() for parameter in block.parameters()}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups.setdefault((parameter.dim() == 2 and parameter in in_blocks, parameter.dim() >= 2), []).append(parameter)
    settings = [
        {"params": parameters, "is_matrix": is_matrix, "weight_decay": config.weight_decay if is_decayed else 0.0}
        for (is_matrix, is_decayed), parameters in groups.items()
    ]
    optimizer_class = OPTIMIZERS[config.optimizer]
    return optimizer_class(settings, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def learning_rate(step: int, num_steps: int, config: OptimConfig) -> float:
    """Rate of step 0 .. num_steps - 1: linear up over the warm-up, then down to the final fraction at the last step."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    num_left = max(num_steps - 1 - config.warmup_steps, 1)
    done = min((step - config.warmup_steps) / num_left, 1.0)
    if config.schedule == "cosine":
        height = 0.5 * (1 + math.cos(math.pi * done))
    else:
        num_decay = max(min(config.decay_fraction * num_steps, num_left), 1)
        height = min(1.0, (1 - done) * num_left / num_decay)
    return config.lr * (config.final_lr_fraction + (1 - config.final_lr_fraction) * height)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate

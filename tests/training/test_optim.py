from __future__ import annotations

import math
from typing import Literal

import pytest
import torch

from fakes import tiny_decoder
from powerhouse.training.optim import learning_rate, make_optimizer, set_learning_rate
from powerhouse.training.settings import OptimConfig


def test_the_rate_rises_linearly_then_falls_by_half_a_cosine_to_its_fraction() -> None:
    config = OptimConfig(lr=1.0, warmup_steps=4, final_lr_fraction=0.2)
    rates = [learning_rate(step, 15, config) for step in range(15)]

    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[9] == pytest.approx(0.6)
    assert rates[14] == pytest.approx(0.2)
    assert rates[6] == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi * 0.2)) / 2)
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_wsd_is_stable_and_falls_by_a_straight_line_over_its_share_of_the_steps() -> None:
    config = OptimConfig(lr=1.0, warmup_steps=4, final_lr_fraction=0.2, schedule="wsd", decay_fraction=0.25)
    rates = [learning_rate(step, 20, config) for step in range(20)]

    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4:15] == [1.0] * 11
    assert rates[14:] == pytest.approx([1.0, 0.84, 0.68, 0.52, 0.36, 0.2])


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
@pytest.mark.parametrize(("num_steps", "warmup_steps"), [(1, 0), (1, 1), (3, 5), (2, 2), (5, 0)])
def test_short_runs_have_a_rate_too(num_steps: int, warmup_steps: int, schedule: Literal["cosine", "wsd"]) -> None:
    config = OptimConfig(lr=1.0, warmup_steps=warmup_steps, schedule=schedule)

    assert all(0 < learning_rate(step, num_steps, config) <= 1 for step in range(num_steps))


def test_norms_are_not_decayed_and_matrices_are() -> None:
    model = tiny_decoder()
    optimizer = make_optimizer(model, OptimConfig(lr=0.1, weight_decay=0.5))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)

    optimizer.step()

    for name, parameter in model.named_parameters():
        factor = 1.0 if parameter.dim() == 1 else 1 - 0.1 * 0.5
        torch.testing.assert_close(parameter.detach(), before[name] * factor, msg=name)


def test_a_new_rate_reaches_every_group() -> None:
    optimizer = make_optimizer(tiny_decoder(), OptimConfig(lr=0.1))

    set_learning_rate(optimizer, 0.03)

    assert [group["lr"] for group in optimizer.param_groups] == [0.03] * 3

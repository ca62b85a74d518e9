"""Which steps are taken, on plain numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest

from powerhouse.errors import TrainingError
from powerhouse.training.guard import Guard
from powerhouse.training.settings import OptimConfig

QUIET = [(2.0 + 0.01 * (i % 3), 1.0 + 0.1 * (i % 2)) for i in range(10)]


def make_guard(is_scaled: bool = False, **changes: Any) -> Guard:
    return Guard(OptimConfig(lr=1.0, **{"spike_window_steps": 8, **changes}), is_scaled=is_scaled)


def verdicts(guard: Guard, steps: list[tuple[float, float]]) -> list[str]:
    return [guard.judge(i, loss, norm) for i, (loss, norm) in enumerate(steps)]


@pytest.mark.parametrize(
    ("step", "verdict"), [((9.0, 1.0), "spike"), ((2.0, 9.0), "spike"), ((0.1, 0.1), "taken"), ((2.02, 1.1), "taken")]
)
def test_a_loss_or_a_norm_far_above_the_newest_ones_is_a_spike(step: tuple[float, float], verdict: str) -> None:
    assert verdicts(make_guard(skip_spikes_sigma=6), [*QUIET, step, QUIET[0]]) == ["taken"] * 10 + [verdict, "taken"]


def test_no_spike_is_seen_where_none_is_asked_for_or_too_little_is_known() -> None:
    assert verdicts(make_guard(), [*QUIET, (9.0, 9.0)])[-1] == "taken"
    assert verdicts(make_guard(skip_spikes_sigma=6), [*QUIET[:3], (9.0, 9.0)])[-1] == "taken"


def test_a_run_that_has_changed_is_not_skipped_for_ever() -> None:
    assert verdicts(make_guard(skip_spikes_sigma=3), [*QUIET, *[(9.0, 1.0)] * 8])[-1] == "taken"


def test_an_overflow_halves_the_scale_and_enough_good_steps_double_it() -> None:
    guard, scales = make_guard(is_scaled=True, loss_scale=8.0, loss_scale_growth_steps=2), []
    steps = [(2.0, math.inf), (2.0, math.nan), (2.0, 1.0), (2.0, math.inf), (2.0, 1.0), (2.0, 1.0), (2.0, 1.0)]
    for loss, norm in steps:
        guard.judge(0, loss, norm)
        scales.append(guard.scale)

    assert scales == [4, 2, 2, 1, 1, 2, 2]


def test_what_is_saved_and_loaded_judges_as_before() -> None:
    settings = {"is_scaled": True, "loss_scale_growth_steps": 3, "skip_spikes_sigma": 3.0}
    first, second = make_guard(**settings), make_guard(**settings)
    verdicts(first, [*QUIET[:7], (2.0, math.inf), QUIET[7]])

    second.load_state_dict(first.state_dict())

    rest = [*QUIET, (5.0, 1.0), *QUIET[:5]]
    assert verdicts(second, rest) == verdicts(first, rest)
    assert second.scale == first.scale


@pytest.mark.parametrize(
    ("is_scaled", "loss", "norm"),
    [(False, math.nan, 1.0), (False, 2.0, math.inf), (False, 2.0, math.nan), (True, math.nan, 1.0), (True, math.inf, math.inf)],
)
def test_a_loss_or_a_gradient_that_is_no_number_is_an_error(is_scaled: bool, loss: float, norm: float) -> None:
    with pytest.raises(TrainingError, match=r"step 7: the loss or its gradient is not a number\n  got: loss .*\n  do: lower"):
        make_guard(is_scaled=is_scaled).judge(7, loss, norm)


def test_a_gradient_that_overflows_at_every_scale_is_an_error() -> None:
    with pytest.raises(TrainingError, match="not a number"):
        verdicts(make_guard(is_scaled=True), [(2.0, math.inf)] * 40)

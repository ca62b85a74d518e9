"""Which steps are taken: loss scaling for float16, and the skipping of spikes.

Both judge by two numbers of the whole global batch, its loss and its gradient's norm, which every rank has: so all skip the
same steps, without a word between them. The data and the schedule go on where a step is skipped.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Literal

import torch
from torch import Tensor

from powerhouse.errors import TrainingError
from powerhouse.training.settings import OptimConfig

Verdict = Literal["taken", "overflow", "spike"]
_SMALLEST_SCALE = 2.0**-24
"""The smallest float16: below it a gradient is no number for another reason than its scale."""


class Guard:
    """The loss scale (Micikevicius et al. 2018, section 3.2) and the newest losses and norms, which a checkpoint keeps."""

    def __init__(self, config: OptimConfig, *, is_scaled: bool = False) -> None:
        self.config = config
        self.is_scaled = is_scaled
        self.scale = config.loss_scale if is_scaled else 1.0
        """The loss is multiplied by it before the backward pass, and the gradient divided after."""
        self._num_good = 0
        self._recent: deque[tuple[float, float]] = deque(maxlen=config.spike_window_steps)

    def judge(self, step: int, loss: float, grad_norm: float) -> Verdict:
        """Say whether to take a step of this loss and of this norm of the unscaled gradient.

        Raises:
            TrainingError: one of them is not a number, and in float16 no loss scale would help.
        """
        is_number = math.isfinite(grad_norm)
        if not math.isfinite(loss) or not (is_number or self.is_scaled):
            raise _not_a_number(step, loss, grad_norm)
        if self.is_scaled:
            self._rescale(is_number)
        if self.scale < _SMALLEST_SCALE:
            raise _not_a_number(step, loss, grad_norm)
        if not is_number:
            return "overflow"
        is_spike = self._is_spike(loss, grad_norm)
        self._recent.append((loss, grad_norm))
        return "spike" if is_spike else "taken"

    def _rescale(self, is_number: bool) -> None:
        self._num_good = self._num_good + 1 if is_number else 0
        if not is_number:
            self.scale /= 2
        elif self._num_good == self.config.loss_scale_growth_steps:
            self.scale, self._num_good = 2 * self.scale, 0

    def _is_spike(self, loss: float, grad_norm: float) -> bool:
        """Far above the mean of the newest steps; never before half a window of them is known.

        A skipped step counts among them, so that a run which has really changed is not skipped for ever.
        """
        sigma = self.config.skip_spikes_sigma
        if sigma is None or len(self._recent) < max(self.config.spike_window_steps // 2, 2):
            return False
        std, mean = torch.std_mean(torch.tensor(self._recent, dtype=torch.float64), dim=0)
        return bool((torch.tensor([loss, grad_norm], dtype=torch.float64) > mean + sigma * std).any())

    def state_dict(self) -> dict[str, Tensor]:
        recent = torch.full((self.config.spike_window_steps, 2), math.nan, dtype=torch.float64)
        if self._recent:
            recent[: len(self._recent)] = torch.tensor(self._recent, dtype=torch.float64)
        return {"scale": torch.tensor([self.scale, self._num_good], dtype=torch.float64), "recent": recent}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        scale, num_good = state["scale"].tolist()
        if self.is_scaled:
            self.scale, self._num_good = scale, int(num_good)
        self._recent.clear()
        self._recent.extend((loss, norm) for loss, norm in state["recent"].tolist() if not math.isnan(loss))


def _not_a_number(step: int, loss: float, grad_norm: float) -> TrainingError:
    return TrainingError(
        f"step {step}: the loss or its gradient is not a number",
        got=f"loss {loss}, gradient norm {grad_norm}",
        do="lower optim.lr or optim.clip_norm, or lengthen optim.warmup_steps",
    )

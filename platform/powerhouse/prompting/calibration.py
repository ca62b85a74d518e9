"""Contextual calibration (Zhao et al. 2021, section 5): what a prompt answers to an item without content is taken out.

Shapes: M inputs without content, Y labels.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

CONTENT_FREE = ("N/A", "", "[MASK]")
"""Stand in every field of the item, one after the other (section 5.1, where the three are averaged)."""


def calibrate(probabilities_Y: Floats, content_free_MY: Floats) -> Floats:
    """diag(p_cf)^-1 p, normalised; p_cf is the mean over the inputs without content. An answer like p_cf becomes uniform."""
    bias_Y = content_free_MY.mean(axis=0)
    # A label that no content can bring about has p = p_cf = 0 in float64: it stays at 0.
    scaled_Y: Floats = np.divide(probabilities_Y, bias_Y, out=np.zeros_like(probabilities_Y), where=bias_Y > 0)
    scaled_Y /= scaled_Y.sum()
    return scaled_Y

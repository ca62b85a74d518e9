"""The model of a run without its weights, which is what its driver and its plan want of it."""

from __future__ import annotations

import torch

from powerhouse.device import to_dtype
from powerhouse.models.adapters import add_adapter
from powerhouse.models.model import Model
from powerhouse.training.config import TrainingConfig
from powerhouse.training.methods import method_of


def empty_model(config: TrainingConfig) -> Model:
    """The shape alone, on the meta device."""
    with torch.device("meta"):
        model = method_of(config.shape).model_class(config.shape)
    if config.adapter:
        add_adapter(model, config.adapter)
    return model


def compute_dtype(config: TrainingConfig) -> torch.dtype:
    assert config.precision != "auto", "train_model decides which it is"
    return torch.bfloat16 if config.precision == "float8" else to_dtype(config.precision)

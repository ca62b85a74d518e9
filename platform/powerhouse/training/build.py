"""The model of a run, before its first step: the empty shape, its blocks prepared, then filled and sharded."""

from __future__ import annotations

import torch

from powerhouse.models.hub import open_checkpoint
from powerhouse.models.model import Model
from powerhouse.training.adapting import first_tensors
from powerhouse.training.blocks import compile_blocks, recompute_blocks
from powerhouse.training.config import TrainingConfig
from powerhouse.training.empty import compute_dtype, empty_model
from powerhouse.training.float8 import use_float8
from powerhouse.training.sharding import Read, make_mesh, shard


def weights_of(config: TrainingConfig, model: Model) -> Read:
    """Where the first weights come from: the directory to start from, the adapter's own beginning, or the seed."""
    if config.start_from:
        checkpoint = open_checkpoint(config.start_from)
        names = checkpoint.names()
        fresh = first_tensors(config, model)
        return lambda name: fresh[name] if name in fresh else checkpoint.weights.read(names[name], torch.float32)
    return lambda name: model.fresh_parameter(name, config.seed)


def build_model(config: TrainingConfig, device: torch.device) -> Model:
    """This rank's slices of the model, float32, ready to train; the same weights for any number of ranks. A collective."""
    model, run = empty_model(config).train(), config.run
    read = weights_of(config, model)
    if config.precision == "float8":
        use_float8(model, device)
    if run.recompute != "none":
        recompute_blocks(model, run.recompute)
    if run.compiles_blocks:
        compile_blocks(model)
    shard(model, read, make_mesh(device, run.workers_per_copy), compute_dtype(config))
    return model

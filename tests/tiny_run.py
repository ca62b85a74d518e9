"""A run small enough for a test: its settings, its tokens, and its batches without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from fakes import TEXTS, tiny_config, tiny_tokenizer
from powerhouse import artifacts
from powerhouse.artifacts import Artifact, Counts
from powerhouse.corpora.shards import write_shard
from powerhouse.models.model import Model
from powerhouse.training.config import TrainingConfig
from powerhouse.training.methods import method_of
from powerhouse.training.optim import make_optimizer
from powerhouse.training.sharding import recompute_blocks, shard

ROW_LENGTH = 17


def write_tokens(folder: Path, num_rows: int = 40) -> Artifact:
    def make(path: Path) -> Counts:
        tokenizer = tiny_tokenizer()
        tokenizer.save(path)
        ids = np.array(tokenizer.encode(" ".join(TEXTS)), dtype=np.int32)
        (path / "rows").mkdir()
        write_shard(path / "rows" / "rows-00000.arrow", np.resize(ids, (num_rows, ROW_LENGTH)))
        return {"vocab_size": tokenizer.vocab_size, "row_length": ROW_LENGTH, "num_rows": num_rows}

    return artifacts.produce(folder, "tokens", {}, {"text": "tiny"}, make)


def make_config(folder: Path, **changes: Any) -> TrainingConfig:
    run = {"num_workers": 2, "micro_batch_rows": 2, "checkpoint_every": 2, "cpus_per_worker": 0.5}
    values: dict[str, Any] = {
        "tokens": folder / "tokens",
        "output": folder / "model",
        "model": tiny_config(num_hidden_layers=2).model_dump(),
        "optim": {"lr": 0.01, "warmup_steps": 2},
        "precision": "float32",
        "global_batch_rows": 8,
        "num_steps": 6,
        "run": run | changes.pop("run", {}),
    }
    return TrainingConfig.model_validate(values | changes)


def sharded_model(config: TrainingConfig) -> tuple[Model, torch.optim.Optimizer]:
    model = method_of(config.model).model_class(config.model)
    model.initialise(config.seed)
    if config.run.recomputes_blocks:
        recompute_blocks(model)
    shard(model, torch.device("cpu"), {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.precision])
    return model, make_optimizer(model, config.optim)


def random_batch(num_rows: int = 8, num_ignored: int = 0) -> dict[str, torch.Tensor]:
    """The global batch's rows that are this rank's; `num_ignored` labels in total, all in the first rows, do not count."""
    ids = torch.randint(0, 300, (num_rows, ROW_LENGTH), generator=torch.Generator().manual_seed(5))
    labels = ids[:, 1:].clone()
    labels.view(-1)[:num_ignored] = -100
    num_here = num_rows // dist.get_world_size()
    here = slice(dist.get_rank() * num_here, (dist.get_rank() + 1) * num_here)
    return {"inputs": ids[here, :-1], "labels": labels[here]}

"""A run small enough for a test: its settings, its tokens, and its batches without Ray."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist

from fakes import TEXTS, tiny_config, tiny_tokenizer
from families import DECODER, ENCODER, T5_SHAPE
from powerhouse import artifacts
from powerhouse.artifacts import Artifact, Counts
from powerhouse.corpora.conversations import ConversationsConfig, encode_conversations
from powerhouse.corpora.shards import write_shard
from powerhouse.errors import PowerhouseError
from powerhouse.models.model import Model
from powerhouse.telemetry import read_metrics
from powerhouse.training.adapting import repeatable, save_trained
from powerhouse.training.build import build_model
from powerhouse.training.checkpoint import Checkpoints, StopRequest
from powerhouse.training.config import TrainingConfig
from powerhouse.training.data import read_batches
from powerhouse.training.guard import Guard
from powerhouse.training.loop import train
from powerhouse.training.methods import method_of
from powerhouse.training.objectives import Batch
from powerhouse.training.optim import make_optimizer
from powerhouse.training.sharding import WholeState
from powerhouse.training.watch import METRICS, Watch

ROW_LENGTH = 17
SHAPES: dict[str, dict[str, Any]] = {
    "decoder": DECODER | {"vocab_size": 300},
    "encoder": ENCODER | {"vocab_size": 301, "family": "encoder"},
    "t5": T5_SHAPE | {"vocab_size": 302, "family": "t5", "start_token_id": 0, "end_token_id": 0},
}
"""Of each family that is trained, one shape."""


def write_tokens(folder: Path, num_rows: int = 40) -> Artifact:
    def make(path: Path) -> Counts:
        tokenizer = tiny_tokenizer()
        tokenizer.save(path)
        ids = np.array(tokenizer.encode(" ".join(TEXTS)), dtype=np.int32)
        (path / "rows").mkdir()
        write_shard(path / "rows" / "rows-00000.arrow", np.resize(ids, (num_rows, ROW_LENGTH)))
        return {"vocab_size": tokenizer.vocab_size, "row_length": ROW_LENGTH, "num_rows": num_rows}

    return artifacts.produce(folder, "tokens", {}, {"text": "tiny"}, make)


def write_pairs(folder: Path, **changes: Any) -> Artifact:
    """Tokens of some pairs, or of conversations, without Ray."""
    tiny_tokenizer().save(folder / "start")
    words = " ".join(TEXTS).split()
    records = [
        {"prompt": " ".join(words[i % 20 : i % 20 + 1 + i % 3]), "completion": " ".join(words[i % 30 : i % 30 + 1 + i % 2])}
        for i in range(60)
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, records)))
    values = {"inputs": [folder / "pairs.jsonl"], "tokenizer": folder / "start", "output": folder / "tokens", "row_length": 41}
    return encode_conversations(ConversationsConfig.model_validate(values | changes))


HELDOUT_TEXTS = [*TEXTS, "One more document, and the last."]


def write_heldout(folder: Path) -> Path:
    """What of a corpus is kept aside."""
    (folder / "corpus" / "heldout").mkdir(parents=True)
    pq.write_table(pa.table({"text": HELDOUT_TEXTS}), folder / "corpus" / "heldout" / "part.parquet")
    return folder / "corpus"


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
        "watch": {"tensorboard": False} | changes.pop("watch", {}),
    }
    return TrainingConfig.model_validate(values | changes)


def sharded_model(config: TrainingConfig) -> tuple[Model, torch.optim.Optimizer]:
    model = build_model(config, torch.device("cpu"))
    return model, make_optimizer(model, config.optim_of_trained)


def random_batch(num_rows: int = 8, num_ignored: int = 0) -> dict[str, torch.Tensor]:
    """The global batch's rows that are this rank's; `num_ignored` labels in total, all in the first rows, do not count."""
    ids = torch.randint(0, 300, (num_rows, ROW_LENGTH), generator=torch.Generator().manual_seed(5))
    labels = ids[:, 1:].clone()
    labels.view(-1)[:num_ignored] = -100
    num_here = num_rows // dist.get_world_size()
    here = slice(dist.get_rank() * num_here, (dist.get_rank() + 1) * num_here)
    return {"inputs": ids[here, :-1], "labels": labels[here]}


def method_batch(config: TrainingConfig, num_rows: int = 8) -> Batch:
    """This rank's part of a batch of the model's own method, of random rows."""
    rows = np.random.default_rng(0).integers(1, 300, (num_rows, ROW_LENGTH)).astype(np.int32)
    num_here = num_rows // dist.get_world_size()
    here = np.arange(num_rows)[dist.get_rank() * num_here :][:num_here]
    noise = config.make_noise(tiny_tokenizer(), ROW_LENGTH)
    return method_of(config.shape).batch(rows[here], here, noise, torch.device("cpu"))


def run_loop(config: TrainingConfig, stop_after: int | None = None, events: Any = None) -> str | None:
    """Train on this rank, resuming where a checkpoint is; `stop_after` batches the data ends, as if the run was killed.

    `events(step, batch)` is called before each step; it may return True to ask the run to stop.
    """
    config.output.mkdir(parents=True, exist_ok=True)
    asked: list[bool] = []
    try:
        model, optimizer = sharded_model(config)
        objective = repeatable(config, method_of(config.shape).objective)
        guard = Guard(config.optim, is_scaled=config.precision == "float16")
        with Checkpoints(config.checkpoints, "this run", config.run.keep_checkpoints, lambda: any(asked)) as checkpoints:
            start = checkpoints.resume(model, optimizer, guard)
            end = config.num_steps if stop_after is None else start + stop_after
            batches = read_batches(config, start, dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
            batches = telling(
                batches, range(start, end), lambda step, batch: asked.append(bool(events and events(step, batch)))
            )
            with Watch(config, model, start) as watch:
                train(model, optimizer, guard, objective, batches, config, start, watch, checkpoints)
    except (StopIteration, StopRequest, PowerhouseError) as error:
        return f"{type(error).__name__}: {error}"
    save_trained(config.output, config, WholeState(model), writes=dist.get_rank() == 0)
    return None


def telling(batches: Iterator[Batch], steps: range, tell: Callable[[int, Batch], None]) -> Iterator[Batch]:
    for step in steps:
        batch = next(batches)
        tell(step, batch)
        yield batch


def losses(config: TrainingConfig) -> list[float]:
    rows = read_metrics(config.output / METRICS)
    assert [row["step"] for row in rows] == list(range(config.num_steps))
    return [row["loss"] for row in rows]


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What of the lines of metrics.jsonl is the same in every run."""
    timed = {"tokens_per_s", "step_s", "mfu", "memory_bytes", "energy_wh", "co2e_g"}
    return [{name: value for name, value in row.items() if name not in timed} for row in rows]

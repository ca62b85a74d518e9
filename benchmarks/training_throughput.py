"""Training on the CPU: Ray Train with a sharded model, beside a bare torch loop and transformers' Trainer, on the same cores.

    python benchmarks/training_throughput.py [--rounds 3] [--threads 2]

The same fresh llama of 11 M parameters, the same rows of 512 tokens in the same order, the same batch, AdamW, clipping, fp32
and number of threads. The first steps are left out, of every case as many: while the job makes its first ones, Ray still
starts processes of its own on the same cores. Every case runs in a process of its own, in turn, and the median of the
rounds is told; `--cases` chooses them, those with torch.compile too, whose first step waits for its code. Ours is the real
job: artifact, Ray, data from the shards, logs, and the time of a step is that at which its line is in the log. It alone
asks glibc to keep freed memory, as every run of the job on a CPU does. `loss` is that of the last step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from measuring import in_own_process, report
from powerhouse import artifacts
from powerhouse.artifacts import Counts
from powerhouse.corpora.shards import TokenRows, write_shard
from powerhouse.models.decoder import Decoder
from powerhouse.models.hub import save_model
from powerhouse.models.model import token_loss
from powerhouse.tokenizer import Tokenizer
from powerhouse.training.config import TrainingConfig
from powerhouse.training.data import RowOrder, places_of
from powerhouse.training.launch import train_model
from powerhouse.training.watch import METRICS

VOCABULARY, LENGTH, ROWS = 4096, 512, 4
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 320,
    "intermediate_size": 896,
    "num_hidden_layers": 8,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "head_dim": 64,
    "max_position_embeddings": LENGTH,
}
WARM_UP, MEASURED = 8, 12
NUM_STEPS = WARM_UP + MEASURED
RATE = 3e-4
NAMES = (
    "powerhouse, 1 worker",
    "bare torch loop",
    "transformers Trainer",
    "powerhouse, a worker a core",
    "powerhouse, compiled",
    "transformers Trainer, compiled",
)


def make_config(folder: Path, num_workers: int, threads: int, compiles: bool = False) -> TrainingConfig:
    return TrainingConfig.model_validate(
        {
            "tokens": folder / "tokens",
            "output": folder / f"model-{num_workers}",
            "model": SHAPE,
            "optim": {"lr": RATE, "final_lr_fraction": 1.0, "weight_decay": 0.0, "beta2": 0.999},
            "precision": "float32",
            "global_batch_rows": ROWS,
            "num_steps": NUM_STEPS,
            "run": {
                "num_workers": num_workers,
                "micro_batch_rows": ROWS // num_workers,
                "cpus_per_worker": threads // num_workers,
                "compiles_blocks": compiles,
                "checkpoint_every": NUM_STEPS,
            },
        }
    )


def write_tokens(folder: Path) -> None:
    def make(path: Path) -> Counts:
        Tokenizer.train(["some words to have a tokenizer at all"] * 9, 260).save(path)
        (path / "rows").mkdir()
        rows_NR = np.random.default_rng(0).integers(0, VOCABULARY, (64, LENGTH + 1)).astype(np.int32)
        write_shard(path / "rows" / "rows-00000.arrow", rows_NR)
        return {"vocab_size": 260, "row_length": LENGTH + 1, "num_rows": len(rows_NR)}

    artifacts.produce(folder / "tokens", "tokens", {}, {"text": "random"}, make)


def batches(folder: Path) -> Iterator[Tensor]:
    """The rows that ours sees, in its order."""
    rows = TokenRows(folder / "tokens" / "rows")
    order = RowOrder(len(rows), 0)
    for step in range(NUM_STEPS):
        yield torch.from_numpy(rows.take(order.rows_at(places_of(step, 0, 1, ROWS))).astype(np.int64))


def fresh_model(folder: Path) -> Decoder:
    model = Decoder(make_config(folder, 1, 1).shape)
    model.initialise(0)
    return model


def run_bare(folder: Path, threads: int) -> dict[str, float]:
    torch.set_num_threads(threads)
    model, positions_T = fresh_model(folder), torch.arange(LENGTH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0, fused=True)
    times = []
    for ids_BR in batches(folder):
        loss = token_loss(model(ids_BR[:, :-1], positions_T), ids_BR[:, 1:]) / (ROWS * LENGTH)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter())
    return result(times, loss.item())


def run_trainer(folder: Path, threads: int, compiles: bool = False) -> dict[str, float]:
    import transformers

    torch.set_num_threads(threads)
    ours = fresh_model(folder)
    save_model(folder / "fresh", ours.config, ours.state_dict())
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "fresh", dtype=torch.float32)
    times: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *arguments: Any, **options: Any) -> None:
            times.append(time.perf_counter())

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    # It shifts the labels itself, so the last of its `LENGTH` + 1 tokens is the last label.
    data = [{"input_ids": row, "labels": row} for ids_BR in batches(folder) for row in ids_BR]
    settings = transformers.TrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=ROWS,
        max_steps=NUM_STEPS,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        logging_steps=1,
        torch_compile=compiles,
    )
    trainer = InOrder(model=model, args=settings, train_dataset=data, callbacks=[Clock()])
    trainer.train()
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    return result(times, losses[-1])


def run_ours(folder: Path, threads: int, num_workers: int, compiles: bool = False) -> dict[str, float]:
    """The time of a step is that at which its line is in the log."""
    os.environ["RAY_ADDRESS"] = "local"
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    # Ray's workers stand 15 below other processes, which shows wherever the machine does more than this: the peers do not.
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - Ray's own spelling
    config = make_config(folder, num_workers, threads, compiles)
    times: list[float] = []
    done = threading.Event()

    def watch_log() -> None:
        while not done.wait(0.05):
            path = config.output / METRICS
            num_lines = path.read_text().count("\n") if path.exists() else 0
            times.extend([time.perf_counter()] * (num_lines - len(times)))

    watcher = threading.Thread(target=watch_log)
    watcher.start()
    try:
        train_model(config)
    finally:
        done.set()
        watcher.join()
    last = json.loads((config.output / METRICS).read_text().splitlines()[-1])
    return result(times, last["loss"])


def result(times: list[float], loss: float) -> dict[str, float]:
    assert len(times) == NUM_STEPS, f"{len(times)} steps seen"
    return {"tokens_per_s": MEASURED * ROWS * LENGTH / (times[-1] - times[WARM_UP - 1]), "loss": loss}


def run_case(name: str, threads: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory(dir="/tmp") as temporary:
        folder = Path(temporary)
        write_tokens(folder)
        cases: dict[str, Callable[[], dict[str, float]]] = {
            "powerhouse, 1 worker": lambda: run_ours(folder, threads, 1),
            "powerhouse, a worker a core": lambda: run_ours(folder, threads, threads),
            "bare torch loop": lambda: run_bare(folder, threads),
            "powerhouse, compiled": lambda: run_ours(folder, threads, 1, compiles=True),
            "transformers Trainer": lambda: run_trainer(folder, threads),
            "transformers Trainer, compiled": lambda: run_trainer(folder, threads, compiles=True),
        }
        return cases[name]()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", nargs="+", choices=NAMES, default=NAMES[:3])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--case", type=json.loads)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(run_case(**arguments.case)))
        return
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in arguments.cases}
    for _ in range(arguments.rounds):
        for name in arguments.cases:
            found[name].append(in_own_process(__file__, {"name": name, "threads": arguments.threads}))
            print(f"{name}: {found[name][-1]['tokens_per_s']:,.0f} tokens/s", flush=True)
    speed = {name: statistics.median(run["tokens_per_s"] for run in runs) for name, runs in found.items()}
    rows = [
        (
            name,
            speed[name],
            min(run["tokens_per_s"] for run in runs),
            max(run["tokens_per_s"] for run in runs),
            speed[name] / speed[NAMES[1]] if NAMES[1] in speed else "-",
            speed[name] / speed[NAMES[2]] if NAMES[2] in speed else "-",
            round(runs[-1]["loss"], 4),
        )
        for name, runs in found.items()
    ]
    header = ("case", "tokens/s", "least", "most", "x bare", "x Trainer", "loss")
    notes = {
        "model": SHAPE,
        "batch": f"{ROWS} rows of {LENGTH} tokens",
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "steps": f"{MEASURED} after {WARM_UP} to warm up",
    }
    report("training_throughput", header, rows, notes)


if __name__ == "__main__":
    main()

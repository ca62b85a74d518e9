"""SmolLM2-135M as a rater of film reviews by prompts alone: 0, 2, 4 and 8 examples in 5 orders, calibrated and not.

    python benchmarks/prompting_smollm2.py [--num-heldout 200 --num-orders 5]

The sentences and their human ratings (Hutto and Gilbert 2014) are those of benchmarks/adapting_smollm2.py. Every row is a task
of the job that users have; examples are balanced, drawn from sentences that are not rated. Two examples have two orders only.
The accuracy over orders has its interval over sentences; the spread is the worst and the best order.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import ray
from adapting_smollm2 import read_items

from measuring import report
from powerhouse.config import storage_root
from powerhouse.engine import EngineConfig
from powerhouse.engine.offline import OfflineModel
from powerhouse.evaluation.launch import evaluate_model
from powerhouse.evaluation.settings import EvaluationConfig
from powerhouse.models.fetch import FetchModelConfig, fetch_model

LABELS = {"positive": ["positive"], "negative": ["negative"]}
TEMPLATE = "Review: {text}\nSentiment: [MASK]"
CHAT = {
    "user": "Is the sentiment of this film review positive or negative? Answer with one word.\n\n{text}",
    "template": "The sentiment is [MASK]",
}
NUM_EXAMPLES = (0, 2, 4, 8)


def write_data(folder: Path, num_heldout: int, seed: int) -> None:
    items = read_items(seed)
    for name, part in (("heldout", items[:num_heldout]), ("pool", items[num_heldout:][:500])):
        lines = [json.dumps({"text": text, "label": ("negative", "positive")[label]}) for text, label in part]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def make_tasks(folder: Path, num_orders: int, seed: int) -> dict[str, Any]:
    base = {"kind": "label", "data": folder / "heldout.jsonl", "labels": LABELS, "target": "label"}
    tasks: dict[str, Any] = {}
    for calibrated in (False, True):
        suffix = ", calibrated" if calibrated else ""
        common = base | {"calibrated": calibrated, "metrics": [{"metric": "accuracy"}]}
        tasks[f"0 examples, chat{suffix}"] = common | CHAT
        for num in NUM_EXAMPLES:
            orders = {"num_orders": min(num_orders, 2) if num == 2 else num_orders}
            examples = {"data": folder / "pool.jsonl", "num": num, "seed": seed, **orders} if num else None
            tasks[f"{num} examples{suffix}"] = common | {"template": TEMPLATE, "examples": examples}
    return tasks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-heldout", type=int, default=200)
    parser.add_argument("--num-orders", type=int, default=5)
    parser.add_argument("--num-actors", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder = storage_root() / "prompting_smollm2"
    model = fetch_model(FetchModelConfig(name="smollm2-135m-instruct", output=folder / "model")).path
    write_data(folder, arguments.num_heldout, arguments.seed)
    tasks = make_tasks(folder, arguments.num_orders, arguments.seed)
    values = {"model": model, "output": folder / "evaluation", "tasks": tasks, "num_actors": arguments.num_actors}
    started = time.monotonic()
    evaluation = evaluate_model(
        EvaluationConfig.model_validate(values), partial(OfflineModel, config=EngineConfig(num_threads=1))
    )
    ray.shutdown()
    scores = json.loads((evaluation.path / "scores.json").read_text(encoding="utf-8"))
    rows = [row(name, scores) for name in tasks]
    header = ("prompt", "orders", "accuracy", "low", "high", "worst order", "best order")
    notes = {"sentences": arguments.num_heldout, "seconds": round(time.monotonic() - started),
             "signatures": [scores[f"{name}.accuracy"]["signature"] for name in tasks]}  # fmt: skip
    report("prompting_smollm2", header, rows, notes)


def row(name: str, scores: dict[str, Any]) -> tuple[Any, ...]:
    score = scores[f"{name}.accuracy"]
    orders = [item["value"] for key, item in scores.items() if key.startswith(f"{name}.accuracy, order")] or [score["value"]]
    low, high = score["interval"]
    return (name, len(orders), *(round(value, 4) for value in (score["value"], low, high, min(orders), max(orders))))


if __name__ == "__main__":
    main()

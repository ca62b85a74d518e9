"""lm-evaluation-harness 0.4.13 judges SmolLM2 behind our endpoint; our own job judges the directory on the same items.

    python3 -m venv /tmp/lm-eval && /tmp/lm-eval/bin/pip install 'lm-eval[api]==0.4.13'
    python benchmarks/lm_eval_agreement.py --lm-eval /tmp/lm-eval/bin/lm_eval

Two programs that share no code, one over HTTP from the Serve app with the endpoint's tokenizer, one in the engine with ours:
multiple choice, texts written by completions and by chat, and texts read, on film reviews (see benchmarks/adapting_smollm2.py).
A written rating must be the very word; a review that is written on is held against how it went on, by BLEU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import ray
import yaml
from adapting_smollm2 import read_items
from ray import serve

from measuring import report
from powerhouse.cluster.processes import find_free_port
from powerhouse.config import storage_root
from powerhouse.engine import EngineConfig
from powerhouse.engine.offline import OfflineModel
from powerhouse.evaluation.launch import evaluate_model
from powerhouse.evaluation.settings import EvaluationConfig
from powerhouse.models.fetch import FetchModelConfig, fetch_model
from powerhouse.serving.app import build

LABELS = ("negative", "positive")
ASKED = "Review: {text}\nSentiment:"
SHOWN = (
    "Review: A joy from start to end.\nSentiment: positive\n\nReview: I was bored to tears.\nSentiment: negative\n\n" + ASKED
)
CHAT = "Write this film review to its end. Say only what is missing.\n\n{beginning}"
ENGINE = EngineConfig(num_threads=1)
STRIPPED = [{"name": "stripped", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}]


def make_item(text: str, label: int) -> dict[str, Any]:
    """A review, its rating, and its two halves."""
    words = text.split()
    halves = {"beginning": " ".join(words[: len(words) // 2]), "rest": " ".join(words[len(words) // 2 :])}
    return {"text": text, "label": label, "answer": LABELS[label], "choices": list(LABELS)} | halves


def our_tasks(data: Path) -> dict[str, Any]:
    choice = {"kind": "choice", "data": data, "template": f"{ASKED} [MASK]", "choices": "choices", "target": "label"}
    write = {"kind": "write", "data": data, "references": ["answer"], "writing": {"max_tokens": 6, "stop": ["\n"]},
             "metrics": [{"metric": "exact_match", "normalise": "none"}]}  # fmt: skip
    on = {"references": ["rest"], "writing": {"max_tokens": 24, "stop": ["\n"]}, "metrics": [{"metric": "bleu"}]}
    return {
        "choice": choice,
        "choice_per_character": choice | {"per": "character"},
        "write": write | {"template": f"{SHOWN} [MASK]"},
        "write_on": write | on | {"template": "{beginning} [MASK]"},
        "chat": write | on | {"template": "[MASK]", "user": CHAT},
        "read": {"kind": "read", "data": data},
    }


def their_tasks(data: Path) -> dict[str, dict[str, Any]]:
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "num_fewshot": 0,
    }
    plain = ASKED.replace("{text}", "{{text}}")
    how = {"until": ["\n"], "max_gen_toks": 6, "temperature": 0.0, "do_sample": False}
    written = {"output_type": "generate_until", "doc_to_target": "{{answer}}", "filter_list": STRIPPED,
               "generation_kwargs": how, "metric_list":
               [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]}  # fmt: skip
    on = {"doc_to_text": "{{beginning}}", "doc_to_target": "{{rest}}", "generation_kwargs": how | {"max_gen_toks": 24},
          "metric_list": [{"metric": "bleu", "aggregation": "bleu", "higher_is_better": True}]}  # fmt: skip
    return {
        "choice": common | {"output_type": "multiple_choice", "doc_to_text": plain, "doc_to_choice": "choices",
                            "doc_to_target": "label", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]},
        "write": common | written | {"doc_to_text": SHOWN.replace("{text}", "{{text}}")},
        "write_on": common | written | on,
        "chat": common | written | on | {"doc_to_text": CHAT.replace("{beginning}", "{{beginning}}")},
        "read": common | {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}", "metric_list":
                          [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")]},
    }  # fmt: skip


PAIRS = [
    ("choice", "acc,none", "choice.accuracy"),
    ("choice", "acc_norm,none", "choice_per_character.accuracy"),
    ("write", "exact_match,stripped", "write.exact_match"),
    ("write_on", "bleu,stripped", "write_on.bleu"),
    ("chat", "bleu,stripped", "chat.bleu"),
    ("read", "word_perplexity,none", "read.word_perplexity"),
    ("read", "byte_perplexity,none", "read.byte_perplexity"),
    ("read", "bits_per_byte,none", "read.bits_per_byte"),
]


def judge(arguments: argparse.Namespace, folder: Path, url: str) -> dict[str, dict[str, float]]:
    """Run lm-eval over its tasks: chats by /v1/chat/completions, all else by /v1/completions."""
    (folder / "tasks").mkdir(exist_ok=True)
    for name, task in their_tasks(folder / "items.jsonl").items():
        (folder / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **task}), encoding="utf-8")
    found: dict[str, dict[str, float]] = {}
    runs = (("local-completions", "completions", "choice,write,write_on,read", ["--batch_size", "4"]),
            ("local-chat-completions", "chat/completions", "chat", ["--apply_chat_template"]))  # fmt: skip
    for kind, route, names, options in runs:
        told = f"model=demo,base_url={url}/v1/{route},num_concurrent=1,max_retries=2,max_length={arguments.max_length}"
        command = [arguments.lm_eval, "run", "--model", kind, "--model_args", told, "--include_path", str(folder / "tasks"),
                   "--tasks", *names.split(","), "--output_path", str(folder / kind), *options]  # fmt: skip
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "PYTHONPATH": ""}
        subprocess.run(command, check=True, env=environment)
        newest = max((folder / kind).rglob("results*.json"), key=lambda path: path.stat().st_mtime)
        found |= json.loads(newest.read_text(encoding="utf-8"))["results"]
    return found


@contextmanager
def serving(model: Path) -> Iterator[str]:
    """The Serve app as users deploy it, in a Ray of its own."""
    groups = {"data": 1000.0, "train": 1000.0, "serve": 1000.0}
    ray.init(address="local", num_cpus=4, resources=groups, include_dashboard=False, log_to_driver=False)
    try:
        port = find_free_port()
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(build({"model": str(model), "model_name": "demo", "engine": ENGINE.model_dump(mode="json")}))
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lm-eval", default="lm_eval", help="lm-eval's program")
    parser.add_argument("--num-items", type=int, default=50)
    parser.add_argument("--max-length", type=int, default=8192, help="context that lm-eval is told of")
    arguments = parser.parse_args()
    folder = storage_root() / "lm_eval_agreement"
    model = fetch_model(FetchModelConfig(name="smollm2-135m-instruct", output=folder / "model")).path
    items = [make_item(text, label) for text, label in read_items(0) if len(text.split()) > 5]
    lines = [json.dumps(item) for item in items[: arguments.num_items]]
    (folder / "items.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    with serving(model) as url:
        theirs = judge(arguments, folder, url)
    values = {"model": model, "output": folder / "evaluation", "tasks": our_tasks(folder / "items.jsonl")}
    evaluation = evaluate_model(EvaluationConfig.model_validate(values), partial(OfflineModel, config=ENGINE))
    ray.shutdown()
    ours = json.loads((evaluation.path / "scores.json").read_text(encoding="utf-8"))
    rows = [
        (key, theirs[task][name], ours[key]["value"], abs(theirs[task][name] - ours[key]["value"])) for task, name, key in PAIRS
    ]
    report("lm_eval_agreement", ("score", "lm-eval", "ours", "difference"), rows, {"items": arguments.num_items})


if __name__ == "__main__":
    main()

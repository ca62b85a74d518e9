"""lm-evaluation-harness 0.4.13 judges SmolLM2 behind our endpoint; our own job judges the directory on the same items.

    python3 -m venv /tmp/lm-eval && /tmp/lm-eval/bin/pip install 'lm-eval[api]==0.4.13'
    python benchmarks/lm_eval_agreement.py --lm-eval /tmp/lm-eval/bin/lm_eval

Two programs that share no code, over HTTP with the endpoint's tokenizer and in the engine with ours: multiple choice, texts
written by completions and by chat, and texts read, on film reviews (see benchmarks/adapting_smollm2.py).
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import ray
import uvicorn
import yaml
from adapting_smollm2 import read_items

from measuring import report
from powerhouse.config import storage_root
from powerhouse.engine import Engine, EngineConfig
from powerhouse.engine.offline import OfflineModel
from powerhouse.evaluation.launch import evaluate_model
from powerhouse.evaluation.settings import EvaluationConfig
from powerhouse.models.fetch import FetchModelConfig, fetch_model
from powerhouse.serving.api import make_api
from powerhouse.serving.engine_loop import EngineLoop

LABELS = ("negative", "positive")
ASKED = "Review: {text}\nSentiment:"
CHAT = "Is the sentiment of this film review positive or negative? Answer with one word.\n\n{text}"
ENGINE = EngineConfig(num_threads=1)
STRIPPED = [{"name": "stripped", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}]


def our_tasks(data: Path) -> dict[str, Any]:
    choice = {"kind": "choice", "data": data, "template": f"{ASKED} [MASK]", "choices": "choices", "target": "label"}
    write = {"kind": "write", "data": data, "references": ["answer"], "writing": {"max_tokens": 6, "stop": ["\n"]},
             "metrics": [{"metric": "exact_match", "normalise": "none"}]}  # fmt: skip
    return {
        "choice": choice,
        "choice_per_character": choice | {"per": "character"},
        "write": write | {"template": f"{ASKED} [MASK]"},
        "chat": write | {"template": "[MASK]", "user": CHAT},
        "read": {"kind": "read", "data": data},
    }


def their_tasks(data: Path) -> dict[str, dict[str, Any]]:
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "num_fewshot": 0,
    }
    plain, chat = ASKED.replace("{text}", "{{text}}"), CHAT.replace("{text}", "{{text}}")
    written = {"output_type": "generate_until", "doc_to_target": "{{answer}}", "filter_list": STRIPPED,
               "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6, "temperature": 0.0, "do_sample": False},
               "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]}  # fmt: skip
    return {
        "choice": common | {"output_type": "multiple_choice", "doc_to_text": plain, "doc_to_choice": "choices",
                            "doc_to_target": "label", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]},
        "write": common | written | {"doc_to_text": plain},
        "chat": common | written | {"doc_to_text": chat},
        "read": common | {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}", "metric_list":
                          [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")]},
    }  # fmt: skip


PAIRS = [
    ("choice", "acc,none", "choice.accuracy"),
    ("choice", "acc_norm,none", "choice_per_character.accuracy"),
    ("write", "exact_match,stripped", "write.exact_match"),
    ("chat", "exact_match,stripped", "chat.exact_match"),
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
    runs = (("local-completions", "completions", "choice,write,read", ["--batch_size", "4"]),
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


def serve(model: str, port: str) -> None:
    loop = EngineLoop(Engine.from_directory(model, ENGINE), lambda name, value: None)
    uvicorn.run(make_api(loop, "demo"), host="127.0.0.1", port=int(port), log_level="warning")


def start_server(model: Path) -> tuple[subprocess.Popen[bytes], str]:
    with socket.socket() as channel:
        channel.bind(("127.0.0.1", 0))
        port = channel.getsockname()[1]
    process = subprocess.Popen([sys.executable, __file__, "--serve", str(model), str(port)])
    url = f"http://127.0.0.1:{port}"
    while True:
        try:
            httpx.get(f"{url}/health").raise_for_status()
        except httpx.TransportError:
            if process.poll() is not None:
                raise SystemExit("the endpoint did not start") from None
            time.sleep(0.2)
        else:
            return process, url


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lm-eval", default="lm_eval", help="lm-eval's program")
    parser.add_argument("--num-items", type=int, default=50)
    parser.add_argument("--max-length", type=int, default=8192, help="context that lm-eval is told of")
    parser.add_argument("--serve", nargs=2, metavar=("MODEL", "PORT"), help="only be the endpoint")
    arguments = parser.parse_args()
    if arguments.serve:
        return serve(*arguments.serve)
    folder = storage_root() / "lm_eval_agreement"
    model = fetch_model(FetchModelConfig(name="smollm2-135m-instruct", output=folder / "model")).path
    items = [{"text": text, "label": label, "answer": LABELS[label], "choices": list(LABELS)} for text, label in read_items(0)]
    lines = [json.dumps(item) for item in items[: arguments.num_items]]
    (folder / "items.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    process, url = start_server(model)
    try:
        theirs = judge(arguments, folder, url)
    finally:
        process.kill()
    values = {"model": model, "output": folder / "evaluation", "tasks": our_tasks(folder / "items.jsonl")}
    evaluation = evaluate_model(EvaluationConfig.model_validate(values), partial(OfflineModel, config=ENGINE))
    ray.shutdown()
    ours = json.loads((evaluation.path / "scores.json").read_text(encoding="utf-8"))
    rows = [
        (key, theirs[task][name], ours[key]["value"], abs(theirs[task][name] - ours[key]["value"])) for task, name, key in PAIRS
    ]
    report("lm_eval_agreement", ("score", "lm-eval", "ours", "difference"), rows, {"items": arguments.num_items})
    return None


if __name__ == "__main__":
    main()

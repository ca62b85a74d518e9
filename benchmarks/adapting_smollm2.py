"""SmolLM2-135M told to rate sentences of film reviews: as it is, and after prompt tuning, LoRA and full fine-tuning.

    python benchmarks/adapting_smollm2.py [--num-train 256 --num-heldout 200]

The sentences and their human ratings (Hutto and Gilbert 2014) come from vaderSentiment's source distribution; those that
people rate within 1 of neutral are left out, as is a text that is there twice. Every method is trained by the job that users
have, on the same tokens in the same order, once over. Accuracy: of the two label words after the prompt the likelier one.
"""

from __future__ import annotations

import argparse
import json
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from measuring import report
from powerhouse.config import storage_root
from powerhouse.corpora.conversations import ConversationsConfig, encode_conversations
from powerhouse.evaluation.asking import Question
from powerhouse.evaluation.families import PlainDecoder
from powerhouse.evaluation.labels import Accuracy
from powerhouse.evaluation.metric import make_pairs
from powerhouse.evaluation.reading import DecoderRespondent
from powerhouse.evaluation.score import Score
from powerhouse.models.decoder import Decoder
from powerhouse.models.fetch import FetchModelConfig, fetch_model
from powerhouse.models.hub import load_model
from powerhouse.models.model import Model
from powerhouse.packages import Package, cache_folder, download, unpack
from powerhouse.prompting import Template, Verbalizer
from powerhouse.tokenizer import Tokenizer
from powerhouse.training.config import TrainingConfig
from powerhouse.training.launch import train_model

RATINGS = Package(
    name="vaderSentiment",
    version="3.3.2",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    licence="MIT",
    pip_options=["--no-binary=:all:", "--no-build-isolation"],
    members=["*/additional_resources/hutto_ICWSM_2014.tar.gz"],
)
FILE = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
CLEAR = 1.0  # of ratings from -4 to 4
LABELS = ("negative", "positive")
PLAIN = Template("Review: {text}\nSentiment: [MASK]")
CHAT = Template(
    "The sentiment is [MASK]",
    user="Is the sentiment of this film review positive or negative? Answer with one word.\n\n{text}",
)
METHODS: dict[str, dict[str, Any]] = {
    "prompt tuning": {
        "adapter": {"kind": "prompt", "num_tokens": 10, "text": "Is the review positive or negative?"},
        "lr": 2e-2,
    },
    "LoRA": {"adapter": {"kind": "lora", "rank": 8, "alpha": 16}, "lr": 1e-3},
    "full fine-tuning": {"lr": 5e-5},
}
ROW_LENGTH, BATCH_ROWS = 257, 1
Item = tuple[str, int]


def read_items(seed: int) -> list[Item]:
    """(sentence, index of its label), shuffled; no sentence twice."""
    with tempfile.TemporaryDirectory() as folder:
        unpack(download(RATINGS, cache_folder()), RATINGS, Path(folder))
        [archive] = Path(folder).rglob("*.tar.gz")
        with tarfile.open(archive) as inner:
            file = inner.extractfile(FILE)
            assert file is not None, "the checksum says that it is there"
            lines = file.read().decode().splitlines()
    found: dict[str, Item] = {}
    for line in lines:
        _, rating, text = line.split("\t")
        if abs(float(rating)) >= CLEAR:
            found.setdefault(" ".join(text.lower().split()), (text.strip(), int(float(rating) > 0)))
    items = list(found.values())
    return [items[index] for index in np.random.default_rng(seed).permutation(len(items))]


def pair_of(text: str, label: int) -> dict[str, str]:
    """What is trained on: the same template, the blank before the word on the word's side."""
    prompt = PLAIN.fill({"text": text}).before
    return {"prompt": prompt.rstrip(), "completion": f" {LABELS[label]}"}


def rate(model: Model, tokenizer: Tokenizer, template: Template, items: Sequence[Item]) -> Score:
    """Share of the sentences whose true label word is the likelier one in the template's slot."""
    assert isinstance(model, Decoder), "SmolLM2 is one"
    verbalizer = Verbalizer({word: [word] for word in LABELS})
    questions = [Question("answers", template.fill({"text": text}), verbalizer.words) for text, _ in items]
    replies = DecoderRespondent(PlainDecoder(model, tokenizer))(questions)
    said = [LABELS[int(verbalizer.probabilities(reply["logprobs"]).argmax())] for reply in replies]
    metric = Accuracy()
    return metric.score(metric.statistics(make_pairs(said, [LABELS[label] for _, label in items])))["accuracy"]


def train(folder: Path, name: str, num_steps: int, arguments: argparse.Namespace) -> tuple[Path, dict[str, Any]]:
    options = METHODS[name]
    config = TrainingConfig.model_validate(
        {
            "tokens": folder / "tokens",
            "output": folder / name.replace(" ", "-"),
            "start_from": folder / "base",
            "adapter": options.get("adapter"),
            "optim": {"lr": options["lr"], "warmup_steps": num_steps // 10, "weight_decay": 0.0},
            "precision": "float32",
            "global_batch_rows": BATCH_ROWS,
            "num_steps": num_steps,
            "seed": arguments.seed,
            "run": {"micro_batch_rows": BATCH_ROWS, "checkpoint_every": num_steps},
        }
    )
    artifact = train_model(config)
    return artifact.path, dict(artifact.manifest.counts) | {"seconds": artifact.manifest.seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-train", type=int, default=256)
    parser.add_argument("--num-heldout", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = storage_root() / "adapting_smollm2"
    fetch_model(FetchModelConfig(name="smollm2-135m-instruct", output=folder / "base"))
    items = read_items(arguments.seed)
    heldout, chosen = items[: arguments.num_heldout], items[arguments.num_heldout :][: arguments.num_train]
    records = [json.dumps(pair_of(text, label)) for text, label in chosen]
    (folder / "train.jsonl").write_text("\n".join(records) + "\n", encoding="utf-8")
    tokens = encode_conversations(
        ConversationsConfig(
            inputs=[folder / "train.jsonl"], tokenizer=folder / "base", output=folder / "tokens", row_length=ROW_LENGTH
        )
    )
    num_steps = int(tokens.manifest.counts["num_rows"]) // BATCH_ROWS

    tokenizer = Tokenizer.load(folder / "base")
    base = load_model(folder / "base")
    rows = [row("zero-shot", 0, 0.0, rate(base, tokenizer, PLAIN, heldout))]
    rows.append(row("zero-shot, asked in chat", 0, 0.0, rate(base, tokenizer, CHAT, heldout)))
    for name in METHODS:
        path, counts = train(folder, name, num_steps, arguments)
        is_adapter = "adapter" in METHODS[name]
        model = load_model(folder / "base", adapter=path) if is_adapter else load_model(path)
        score = rate(model, tokenizer, PLAIN, heldout)
        rows.append(row(name, counts.get("trained_parameters", counts["parameters"]), counts["seconds"], score))
    ray.shutdown()
    header = ("method", "trained parameters", "seconds", "accuracy", "low", "high")
    num_positive = sum(label for _, label in heldout)
    notes = {"train": len(chosen), "heldout": score.n, "positive heldout": num_positive, "steps": num_steps,
             "rows a step": BATCH_ROWS, "signature": score.signature, "settings": METHODS}  # fmt: skip
    report("adapting_smollm2", header, rows, notes)


def row(name: str, num_parameters: float, seconds: float, score: Score) -> tuple[str, int, float, float, float, float]:
    assert score.interval is not None, "there is more than one sentence"
    print(f"{name}: {score.value:.3f} of {score.n}, {score.interval[0]:.3f} to {score.interval[1]:.3f}", flush=True)
    return (name, int(num_parameters), round(seconds, 1), round(score.value, 4), *(round(end, 4) for end in score.interval))


if __name__ == "__main__":
    main()

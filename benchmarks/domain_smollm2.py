"""SmolLM2-135M trained on for a few minutes on one documentation site: bits per byte of pages it has not seen.

    python benchmarks/domain_smollm2.py [--num-steps 20]

The pages are SQLAlchemy's, fetched and cleaned by the jobs that users have, and split by the curation. Scored is the start
of each held-out page, the same bytes every time; the difference has an interval of its own, from each page's two figures.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import numpy.typing as npt
import ray
import torch

from measuring import report
from powerhouse.config import load, storage_root
from powerhouse.corpora.fetch import FetchConfig, fetch
from powerhouse.corpora.pipeline import CurateConfig, curate
from powerhouse.corpora.tokens import TokensConfig, make_tokens
from powerhouse.evaluation.perplexity import finalise_bits_per_byte, nats_of_documents
from powerhouse.evaluation.score import Score, make_score, make_signature
from powerhouse.heldout import HELDOUT, read_heldout
from powerhouse.models.decoder import Decoder
from powerhouse.models.fetch import FetchModelConfig, fetch_model
from powerhouse.models.hub import load_model
from powerhouse.tokenizer import Tokenizer
from powerhouse.training.config import TrainingConfig
from powerhouse.training.launch import train_model

CONFIGS = Path(__file__).parents[1] / "jobs" / "configs"
CONTEXT, BATCH_ROWS, NUM_CHARACTERS = 256, 2, 800
METHODS: dict[str, tuple[dict[str, object] | None, float]] = {"trained on": (None, 5e-5)}


def prepare(folder: Path) -> int:
    """Make base/, corpus/ and tokens/ with the jobs' own functions; give the rows of tokens."""
    fetch_model(FetchModelConfig(name="smollm2-135m-instruct", output=folder / "base"))
    texts = load(FetchConfig, CONFIGS / "texts.yaml", [f"output={folder / 'texts'}"])
    fetch(texts.model_copy(update={"packages": [package for package in texts.packages if package.source == "web"]}))
    corpus = load(CurateConfig, CONFIGS / "corpus.yaml", [f"output={folder / 'corpus'}", "heldout_share=0.15"])
    [web] = [item for item in corpus.inputs if item.name == "web"]
    curate(corpus.model_copy(update={"inputs": [web.model_copy(update={"path": str(folder / "texts" / "web")})]}))
    tokens = TokensConfig(
        corpus=folder / "corpus",
        output=folder / "tokens",
        tokenizer=folder / "base",
        row_length=CONTEXT + 1,
        workers=corpus.workers,
    )
    return int(make_tokens(tokens).manifest.counts["num_rows"])


Sums = npt.NDArray[np.float64]


def nats_of(model: Decoder, tokenizer: Tokenizer, texts: list[str]) -> Sums:
    """Nats of each text."""
    model.config = model.config.model_copy(update={"max_position_embeddings": CONTEXT})  # the windows are as long
    return np.array(nats_of_documents(model, tokenizer.encode_batch(texts), tokenizer.end_of_text_id, batch_windows=4))


def score(nats_N: Sums, bytes_N: Sums, **facts: str) -> Score:
    signature = make_signature(metric="bits_per_byte", context=CONTEXT, windows="disjoint", start="end_of_text", **facts)
    return make_score(np.stack([nats_N, bytes_N], axis=1), finalise_bits_per_byte, signature)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-steps", type=int, default=20)
    num_steps = parser.parse_args().num_steps
    torch.set_num_threads(1)
    folder = storage_root() / "domain_smollm2"
    num_rows = prepare(folder)
    texts = [text[:NUM_CHARACTERS] for text in read_heldout(folder / "corpus" / HELDOUT)]
    tokenizer = Tokenizer.load(folder / "base")
    bytes_N = np.array([len(text.encode()) for text in texts], dtype=np.float64)
    before_N = nats_of(load_model(folder / "base"), tokenizer, texts)
    rows = [row("before", 0, 0, 0.0, score(before_N, bytes_N))]
    for name, (adapter, rate) in METHODS.items():
        values = {
            "tokens": folder / "tokens",
            "output": folder / name.replace(" ", "-"),
            "start_from": folder / "base",
            "adapter": adapter,
            "optim": {"lr": rate, "warmup_steps": num_steps // 10, "weight_decay": 0.0},
            "precision": "float32",
            "global_batch_rows": BATCH_ROWS,
            "num_steps": num_steps,
            "run": {"micro_batch_rows": BATCH_ROWS, "checkpoint_every": num_steps},
        }
        artifact = train_model(TrainingConfig.model_validate(values))
        model = load_model(folder / "base", adapter=artifact.path) if adapter else load_model(artifact.path)
        after_N, counts = nats_of(model, tokenizer, texts), artifact.manifest.counts
        num_trained = int(counts.get("trained_parameters", counts["parameters"]))
        rows.append(row(name, num_trained, int(counts["tokens_seen"]), artifact.manifest.seconds, score(after_N, bytes_N)))
        difference = score(after_N - before_N, bytes_N, difference="page by page")
        rows.append(row("difference", 0, 0, 0.0, difference))
    ray.shutdown()
    header = ("model", "trained parameters", "tokens seen", "seconds", "bits per byte", "low", "high")
    better = int((after_N < before_N).sum())
    notes = {"pages": difference.n, "pages with fewer bits": better, "bytes": int(bytes_N.sum()), "steps": num_steps,
             "rows a step": BATCH_ROWS,
             "rows there are": num_rows, "signature": difference.signature, "settings": METHODS}  # fmt: skip
    report("domain_smollm2", header, rows, notes)


def row(name: str, num_trained: int, num_tokens: int, seconds: float, value: Score) -> tuple[str | float, ...]:
    assert value.interval is not None, "there is more than one page"
    print(f"{name}: {value.value:.4f}, {value.interval[0]:.4f} to {value.interval[1]:.4f}", flush=True)
    return (name, num_trained, num_tokens, round(seconds, 1), *(round(item, 4) for item in (value.value, *value.interval)))


if __name__ == "__main__":
    main()

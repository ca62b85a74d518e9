"""What a weight format costs in accuracy: SmolLM2-135M on real text, beside float32.

    python benchmarks/engine_formats.py --model runs/models/smollm2-135m-instruct [--num-windows 8]

The text is Shakespeare's, from jobs/configs/texts.yaml, in windows of 256 tokens. `KL` is that of a format's next-token
distribution from float32's, in nats, and `same` the share of tokens after which both find the same one likeliest.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from measuring import report
from powerhouse.config import load
from powerhouse.corpora.fetch import FetchConfig, fetch
from powerhouse.engine import EngineConfig
from powerhouse.engine.batch import ForwardBatch
from powerhouse.engine.stage import Stage
from powerhouse.tokenizer import Tokenizer

TEXTS = Path(__file__).parents[1] / "jobs" / "configs" / "texts.yaml"
WINDOW = 256
FORMATS: dict[str, dict[str, Any]] = {
    "float32": {},
    "float16": {"dtype": "float16"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"quantization": "int8"},
    "int8_dynamic": {"quantization": "int8_dynamic"},
    "int4": {"quantization": "int4"},
    "bfloat16 compiled": {"dtype": "bfloat16", "compiles": True},
    "int8_dynamic compiled": {"dtype": "bfloat16", "quantization": "int8_dynamic", "compiles": True},
}


def read_windows(model: Path, num_windows: int) -> list[list[int]]:
    with tempfile.TemporaryDirectory() as folder:
        texts = load(FetchConfig, TEXTS, [f"output={folder}/texts"])
        books = [package for package in texts.packages if package.kind == "book"][:1]
        fetch(texts.model_copy(update={"packages": books}))
        files = sorted(path for path in Path(folder).rglob("*.txt") if path.stat().st_size > 100_000)
        text = files[0].read_text(encoding="utf-8", errors="replace")[20_000 : 20_000 + 8 * num_windows * WINDOW]
    ids = Tokenizer.load(model).encode(text)
    return [ids[i * WINDOW : (i + 1) * WINDOW] for i in range(num_windows)]


@torch.inference_mode()
def logprobs(model: Path, settings: dict[str, Any], windows: list[list[int]]) -> list[Tensor]:
    """Log-probabilities [T, V] of every window's next tokens."""
    num_blocks = WINDOW // 16
    stage = Stage.load(model, EngineConfig.model_validate({**settings, "num_blocks": num_blocks, "max_model_len": WINDOW}))
    places = tuple(range(WINDOW))
    found = []
    for window in windows:
        batch = ForwardBatch(tuple(window), places, places, (WINDOW,), (tuple(range(num_blocks)),), (), ())
        found.append(stage.project(stage.forward(batch)).log_softmax(-1))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--num-windows", type=int, default=8)
    arguments = parser.parse_args()
    windows = read_windows(arguments.model, arguments.num_windows)
    rows: list[tuple[Any, ...]] = []
    exact: list[Tensor] = []
    for name, settings in FORMATS.items():
        found = logprobs(arguments.model, settings, windows)
        exact = exact or found
        nats = [-ours[range(WINDOW - 1), window[1:]] for ours, window in zip(found, windows, strict=True)]
        kl = [(theirs.exp() * (theirs - ours)).sum(-1) for ours, theirs in zip(found, exact, strict=True)]
        same = [ours.argmax(-1) == theirs.argmax(-1) for ours, theirs in zip(found, exact, strict=True)]
        perplexity = torch.cat(nats).mean().exp().item()
        rows.append((name, perplexity, torch.cat(kl).mean().item(), torch.cat(same).double().mean().item()))
    notes = {"num_tokens": len(windows) * (WINDOW - 1)}
    report("engine_formats", ("format", "perplexity", "KL", "same"), rows, notes)


if __name__ == "__main__":
    main()

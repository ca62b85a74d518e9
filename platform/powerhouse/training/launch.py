"""Training as a job: what is asked for is checked, the workers train, and what they leave becomes an artifact.

All that a run needs to go on lies in its own folder; nothing is left to Ray's records.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from powerhouse import artifacts
from powerhouse.artifacts import Artifact, Counts
from powerhouse.device import computes_bfloat16
from powerhouse.telemetry import read_metrics
from powerhouse.tokenizer import Tokenizer
from powerhouse.training.checks import check_watch
from powerhouse.training.config import TrainingConfig, check, read_shape
from powerhouse.training.data import masks_documents
from powerhouse.training.empty import empty_model
from powerhouse.training.methods import method_of
from powerhouse.training.rows import check_rows
from powerhouse.training.settings import METRICS
from powerhouse.training.summary import write_summary


def train_model(config: TrainingConfig) -> Artifact:
    """Train, or go on from the last checkpoint of the same run; leave a Hugging Face model directory.

    Raises:
        ConfigError: the settings do not fit each other or the tokens.
        TrainingError: the loss is not a number, the job was told to end, or workers were lost more often than
            `run.max_failures`.
    """
    tokens = Artifact.open(config.tokens, "tokens")
    config = read_shape(config)
    check(config, tokens)
    check_rows(config, tokens)
    check_watch(config)
    if config.precision == "auto":
        is_fast = computes_bfloat16("cuda" if config.run.use_gpu else "cpu")
        config = config.model_copy(update={"precision": "bfloat16" if is_fast else "float32"})
    tells_learned = "num_learned_tokens" in tokens.manifest.counts
    config = config.model_copy(update={"masks_documents": masks_documents(config, tells_learned=tells_learned)})
    settings = config.model_dump(mode="json", exclude={"tokens", "output", "run", "watch", "start_from"})
    inputs: dict[str, Artifact | str] = {"tokens": tokens}
    if config.start_from:
        inputs["start_from"] = artifacts.identify(config.start_from, "model")
    make = partial(_make, config=config, row_length=int(tokens.manifest.counts["row_length"]))
    kind = "adapter" if config.adapter else "model"
    return artifacts.produce(config.output, kind, settings, inputs, make, can_resume=True)


def _make(folder: Path, config: TrainingConfig, row_length: int) -> Counts:
    from powerhouse.training.group import run_workers  # here: a run that is done or only asked about starts no Ray

    run_workers(config)
    method, tokenizer = method_of(config.shape), Tokenizer.load(config.tokens)
    tokenizer.add_special_tokens(config.make_noise(tokenizer, row_length).special_tokens)
    tokenizer.save(folder)
    model = empty_model(config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    write_summary(folder, config, Artifact.open(config.tokens, "tokens"), parameters)
    rows = read_metrics(folder / METRICS)
    last = [row["loss"] for row in rows[-max(len(rows) // 10, 1) :]]
    return {
        "parameters": parameters,
        **({"trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad)} if config.adapter else {}),
        "steps": config.num_steps,
        "tokens_seen": config.num_steps * config.global_batch_rows * method.num_positions(row_length),
        "skipped_steps": int(sum(row["skipped"] for row in rows)),
        **({"final_loss": round(sum(last) / len(last), 4)} if last else {}),  # unless the log was lost, and not the checkpoint
    }

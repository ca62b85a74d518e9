"""Evaluation as a job: held-out documents and tasks, one artifact of scores."""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

from powerhouse import artifacts
from powerhouse.artifacts import Artifact, Counts
from powerhouse.evaluation.families import open_plain_decoder
from powerhouse.evaluation.heldout_scores import score_heldout
from powerhouse.evaluation.records import digest_of
from powerhouse.evaluation.results import Result
from powerhouse.evaluation.score import Score
from powerhouse.evaluation.settings import EvaluationConfig
from powerhouse.evaluation.task_scores import OpenDecoder, make_plans, score_tasks
from powerhouse.models.hub import open_checkpoint

SCORES = "scores.json"


def evaluate_model(config: EvaluationConfig, open_decoder: OpenDecoder = open_plain_decoder) -> Artifact:
    """Write scores.json, and for tasks report.html, rows/ and samples/. What is killed goes on where it was.

    Raises:
        InputError: the model directory is damaged, there is no held-out document, or a task does not fit its data.
        ClusterError: an endpoint or actors have stopped to answer.
    """
    settings: dict[str, Any] = {"precision": config.precision}
    if config.tasks:
        unnamed: Any = {"data": True, "examples": {"data"}}  # it is an input, known by its content
        settings["tasks"] = {name: task.model_dump(mode="json", exclude=unnamed) for name, task in config.tasks.items()}
    inputs = _identify(config)
    return artifacts.produce(
        config.output, "evaluation", settings, inputs, partial(_make, config=config, open_decoder=open_decoder), can_resume=True
    )


def _identify(config: EvaluationConfig) -> dict[str, Artifact | str]:
    """What is evaluated and on what, each by the hash of its content."""
    inputs: dict[str, Artifact | str] = {}
    if config.model:
        open_checkpoint(config.model)
        inputs["model"] = artifacts.identify(config.model, "model")
    if config.adapter:
        inputs["adapter"] = artifacts.identify(config.adapter, "model")
    if config.endpoint:
        inputs["endpoint"] = hashlib.sha256(f"{config.endpoint.url} {config.endpoint.model}".encode()).hexdigest()
    if config.corpus and config.tokens:
        inputs |= {"corpus": Artifact.open(config.corpus, "corpus"), "tokens": Artifact.open(config.tokens, "tokens")}
    make_plans(config)
    files = {f"{name}.{place}": path for name, task in config.tasks.items() for place, path in task.files().items()}
    return inputs | {name: digest_of(path) for name, path in files.items()}


def _make(folder: Path, config: EvaluationConfig, open_decoder: OpenDecoder) -> Counts:
    heldout: dict[str, Score] = {}
    results: dict[str, Result] = {}
    counts: dict[str, int | float] = {}
    if config.corpus and config.tokens:
        heldout, sizes = score_heldout(config, config.corpus, config.tokens)
        counts |= sizes
    if config.tasks:
        results = score_tasks(folder, config, open_decoder)
        counts["items"] = sum(len(result.samples) for result in results.values())
        from powerhouse.evaluation.report import write_evaluation  # only tasks are drawn, and plotting is slow to load

        write_evaluation(folder, f"Evaluation of {config.model.name if config.model else config.endpoint}", heldout, results)
    scores = heldout | {f"{task}.{name}": score for task, result in results.items() for name, score in result.scores.items()}
    plain = {name: score.model_dump(mode="json") for name, score in scores.items()}
    artifacts.write_atomically(folder / SCORES, json.dumps(plain, indent=2) + "\n")
    return counts | {name: round(score.value, 4) for name, score in scores.items()}

"""Two evaluations, item by item: do the models differ?"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from powerhouse import artifacts
from powerhouse.artifacts import Artifact, Counts
from powerhouse.config import Config, StoragePath
from powerhouse.errors import InputError
from powerhouse.evaluation.likelihood import Likelihood
from powerhouse.evaluation.metric import Metric
from powerhouse.evaluation.metrics import AnyMetric
from powerhouse.evaluation.report import write_comparison
from powerhouse.evaluation.results import ROWS, SAMPLES
from powerhouse.evaluation.significance import Comparison, Test, compare

_NUM_APART = 10
_METRIC: TypeAdapter[Metric] = TypeAdapter(AnyMetric | Likelihood)


class ComparisonConfig(Config):
    """Compare two evaluations of the same tasks, paired by item."""

    baseline: StoragePath
    """Evaluation that the other one is held against."""
    other: StoragePath
    """Evaluation whose differences are told."""
    output: StoragePath
    """Where comparison.json and report.html go."""
    test: Test = "randomisation"
    """Approximate randomisation (two-sided), or the paired bootstrap."""
    seed: int = 0
    """Of the resamples."""


def compare_models(config: ComparisonConfig) -> Artifact:
    """Test every score of every task that both evaluations have.

    Raises:
        ArtifactError: an evaluation is missing or unfinished.
        InputError: they have no task in common, or one of them is of other items.
    """
    inputs = {name: Artifact.open(getattr(config, name), "evaluation") for name in ("baseline", "other")}
    settings = {"test": config.test, "seed": config.seed}
    return artifacts.produce(config.output, "comparison", settings, inputs, partial(_make, config=config))


def _make(folder: Path, config: ComparisonConfig) -> Counts:
    names = [sorted(path.stem for path in (side / ROWS).glob("*.json")) for side in (config.baseline, config.other)]
    common = [name for name in names[0] if name in names[1]]
    if not common:
        raise InputError("the evaluations have no task in common", got=f"{names[0]} and {names[1]}")
    found = {name: _compare_task(name, config) for name in common}
    plain = {name: {key: item.model_dump(mode="json") for key, item in table.items()} for name, table in found.items()}
    artifacts.write_atomically(folder / "comparison.json", json.dumps(plain, indent=2) + "\n")
    title = f"{config.other.name} against {config.baseline.name}"
    write_comparison(folder, title, found, {name: _apart(name, config) for name in common})
    return {f"{name}.{key}.p": round(item.p_value, 4) for name, table in found.items() for key, item in table.items()}


def _compare_task(name: str, config: ComparisonConfig) -> dict[str, Comparison]:
    baseline, other = (_read(side / ROWS / f"{name}.json") for side in (config.baseline, config.other))
    if baseline["items"] != other["items"]:
        num_common = len(set(baseline["items"]) & set(other["items"]))
        got = f"{len(baseline['items'])} and {len(other['items'])} items, {num_common} in common"
        raise InputError(f"task {name}: the evaluations are not of the same items in the same order", got=got)
    settings = [metric["settings"] for metric in other["metrics"]]
    compared: dict[str, Comparison] = {}
    for metric in baseline["metrics"]:
        if metric["settings"] in settings:
            rows = other["metrics"][settings.index(metric["settings"])]["rows"]
            made: Metric = _METRIC.validate_python(metric["settings"])
            compared |= compare(made, np.array(metric["rows"]), np.array(rows), test=config.test, seed=config.seed)
    if not compared:
        raise InputError(f"task {name}: the evaluations have no metric in common", got=settings)
    return compared


def _apart(name: str, config: ComparisonConfig) -> dict[str, list[dict[str, Any]]]:
    """The items on which the other did best and worst against the baseline."""
    sides = [_read_lines(side / SAMPLES / f"{name}.jsonl") for side in (config.baseline, config.other)]
    pairs = sorted(zip(*sides, strict=True), key=lambda pair: _gain(*pair))
    wins = [_join(*pair) for pair in reversed(pairs[-_NUM_APART:]) if _gain(*pair) > 0]
    losses = [_join(*pair) for pair in pairs[:_NUM_APART] if _gain(*pair) < 0]
    return {"where the other gained most": wins, "where it lost most": losses}


def _gain(baseline: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    return float(other["good"] - baseline["good"])


def _join(baseline: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    if "said" not in other:
        return dict(other)
    return dict(other) | {"said": [f"baseline: {baseline['said'][0]}", f"other: {other['said'][0]}"]}


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

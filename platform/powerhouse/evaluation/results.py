"""From replies to scores: what a task's items add up to, and each item for people to read.

Shapes: N items, S sums of an item. An item that was asked in several variants has the sum of their rows, so that the interval
is over items: two orders of examples before one item are not two items.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from powerhouse.evaluation.likelihood import Likelihood
from powerhouse.evaluation.metric import Metric, make_pairs
from powerhouse.evaluation.plans import Plan, ReadingPlan, Replies
from powerhouse.evaluation.score import Score, Sums

Sample = dict[str, Any]

ROWS, SAMPLES = "rows", "samples"
"""Folders of an evaluation: for each task what its items add up to, and its items."""


@dataclass(frozen=True)
class Result:
    """What came of one task."""

    scores: dict[str, Score]
    rows: list[tuple[Metric, Sums]]
    """Of each metric, the rows [N, S] of all items, for paired tests."""
    samples: list[Sample]
    """Of each item: its number, what was asked and said, what was right, its own values; `good` orders them."""


def judge(plan: Plan, metrics: Sequence[Metric], facts: Mapping[str, Any], replies: Replies) -> Result:
    """Score all items; `facts` go into every signature.

    Raises:
        InputError: a metric cannot be used on these items.
    """
    if isinstance(plan, ReadingPlan):
        return _judge_reading(plan, facts, replies)
    scores: dict[str, Score] = {}
    rows = []
    said = [[plan.said(number, way, replies) for number in range(len(plan.rows))] for way in range(plan.num_variants)]
    for metric in metrics:
        pairs = [make_pairs([item.hypothesis for item in way], [item.references for item in way]) for way in said]
        metric = metric.prepare(pairs[0])  # by the references, which all variants share
        parts = [metric.statistics(of_way) for of_way in pairs]
        rows.append((metric, np.sum(parts, axis=0)))
        scores |= _scores(metric, rows[-1][1], facts)
        if len(parts) > 1:
            for order, part in enumerate(parts, 1):
                named = _scores(metric, part, {**facts, "order": order})
                scores |= {f"{name}, order {order}": score for name, score in named.items()}
    samples = [
        _sample(plan, number, rows)
        | {"said": [way[number].hypothesis for way in said], "right": list(said[0][number].references)}
        | {"details": [dict(way[number].details) for way in said]}
        for number in range(len(plan.rows))
    ]
    return Result(scores, rows, samples)


def _judge_reading(plan: ReadingPlan, facts: Mapping[str, Any], replies: Replies) -> Result:
    metric, found = Likelihood(), plan.read(replies)
    rows = metric.rows(plan.texts, [nats for nats, _ in found], [num for _, num in found])
    samples = [_sample(plan, number, [(metric, rows)]) for number in range(len(plan.rows))]
    return Result(_scores(metric, rows, facts), [(metric, rows)], samples)


def _scores(metric: Metric, rows_NS: Sums, facts: Mapping[str, Any]) -> dict[str, Score]:
    more = "".join(f"|{name}:{value}" for name, value in facts.items())
    found = metric.score(rows_NS)
    return {name: score.model_copy(update={"signature": score.signature + more}) for name, score in found.items()}


def _sample(plan: Plan, number: int, rows: Sequence[tuple[Metric, Sums]]) -> Sample:
    values = {name: float(value) for metric, rows_NS in rows for name, value in metric.values(rows_NS[number]).items()}
    first = next(iter(values.values()))
    good = -first if isinstance(plan, ReadingPlan) else first
    return {"item": number, "asked": str(plan.shown[number]), "values": values, "good": good}


def item_key(row: Mapping[str, Any]) -> str:
    """Identity of an item by its content: two evaluations compare on the same items only."""
    return hashlib.sha256(json.dumps(row, sort_keys=True, default=str).encode()).hexdigest()[:16]

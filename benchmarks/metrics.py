"""BLEU and ROUGE of 100,000 real pairs beside sacrebleu and rouge-score, on one core and on two.

PYTHONPATH=platform:tests python benchmarks/metrics.py [number of pairs, for the speed alone]

The pairs are outputs of the 16 systems of WMT 2017 English-German against the reference, and against each other. "two" are two
processes with half of the pairs each and the rows merged: what workers do, without the start of a cluster. Libraries and we
take turns in one run, each in a fresh process, so that no cache is warm. Times are of the processor, so that other work on the
machine is left out; for two processes that of the busier one and of what joins them. Then the 15 systems against the first one:
scores by sacrebleu, p-values by MultEval and Moses (as listed in sacrebleu's own tests, which this reads).
"""

from __future__ import annotations

import ast
import bz2
import json
import multiprocessing
import pickle
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle, islice
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import rouge_score.rouge_scorer
import sacrebleu.metrics

from measuring import report
from powerhouse.evaluation.bleu import Bleu
from powerhouse.evaluation.metric import Metric, Pair, Part, merge
from powerhouse.evaluation.rouge import Rouge
from powerhouse.evaluation.significance import compare
from powerhouse.packages import Package, cache_folder, download, unpack

NUM_PAIRS = 100_000
NUM_SEEDS = 8
SYSTEMS = Package(
    name="sacrebleu",
    version="2.6.0",
    sha256="91499b6cd46138d95154fff1e863c2f9be57e82f0c719d8dd718d0006cf6c566",
    licence="Apache-2.0",
    pip_options=["--no-binary=sacrebleu"],
    members=["*/test/wmt17_en_de_systems.pkl.bz2", "*/test/test_significance.py"],
)
Work = Callable[[Sequence[Pair]], Any]


class PlainUnpickler(pickle.Unpickler):
    """Reads lists, tuples and strings, and nothing that would be executed."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name}")


def read_systems() -> tuple[dict[str, list[str]], list[str], dict[str, dict[str, Any]]]:
    """Outputs by system, the reference, and the p-values that sacrebleu's tests list."""
    with tempfile.TemporaryDirectory() as folder:
        unpack(download(SYSTEMS, cache_folder()), SYSTEMS, Path(folder))
        with bz2.open(next(Path(folder).rglob("*.bz2"))) as file:
            *systems, (_, references) = PlainUnpickler(file).load()
        tree = ast.parse(next(Path(folder).rglob("test_significance.py")).read_text())
    named = {ast.unparse(node.targets[0]): node.value for node in tree.body if isinstance(node, ast.Assign)}
    p_values = {name: ast.literal_eval(value) for name, value in named.items() if name.endswith("_P_VALS")}
    return dict(systems), references[0], p_values


def make_pairs(num_pairs: int) -> list[Pair]:
    systems, reference, _ = read_systems()
    outputs = list(systems.values())
    against = [(texts, reference) for texts in outputs] + [(one, other) for one in outputs for other in outputs if one != other]
    pairs = ((number, Pair(*item)) for one, other in against for number, item in enumerate(zip(one, zip(other), strict=True)))
    # One sentence after the other: two halves then share no text, whose words the first to meet it would keep for the second.
    return [pair for _, pair in sorted(islice(cycle(pairs), num_pairs), key=itemgetter(0))]


def by_sacrebleu(pairs: Sequence[Pair]) -> float:
    hypotheses, references = [pair.hypothesis for pair in pairs], [pair.references[0] for pair in pairs]
    return float(sacrebleu.metrics.BLEU(force=True).corpus_score(hypotheses, [references]).score)


def by_rouge_score(pairs: Sequence[Pair], kinds: Sequence[str]) -> float:
    scorer = rouge_score.rouge_scorer.RougeScorer(list(kinds), use_stemmer=True)
    found = [scorer.score(pair.references[0], pair.hypothesis) for pair in pairs]
    return float(np.mean([item[kinds[-1]].fmeasure for item in found]))


def by_us(pairs: Sequence[Pair], metric: Metric, name: str) -> float:
    return float(metric.values(metric.statistics(pairs).sum(axis=0))[name])


def rows_of_half(pairs: Sequence[Pair], metric: Metric, half: int) -> Part:
    numbers = np.array_split(np.arange(len(pairs)), 2)[half]
    return Part(numbers, metric.statistics(pairs[numbers[0] : numbers[-1] + 1]))


def join(parts: Sequence[Part], metric: Metric, name: str) -> float:
    return float(metric.values(merge(parts).sums_NS.sum(axis=0))[name])


def start(work: Work, pairs: Sequence[Pair]) -> Callable[[], tuple[float, Any]]:
    """Work in a forked process of its own; the result gives its processor seconds and what it returned."""
    parent, child = multiprocessing.Pipe()

    def measure() -> None:
        before = time.process_time()
        result = work(pairs)
        child.send((time.process_time() - before, result))

    process = multiprocessing.get_context("fork").Process(target=measure)
    process.start()

    def finish() -> tuple[float, Any]:
        found: tuple[float, Any] = parent.recv()
        process.join()
        return found

    return finish


def on_two(pairs: Sequence[Pair], metric: Metric, name: str) -> tuple[float, float]:
    halves = [start(partial(rows_of_half, metric=metric, half=half), pairs) for half in (0, 1)]
    times, parts = zip(*(finish() for finish in halves), strict=True)
    before = time.process_time()
    value = join(parts, metric, name)
    return max(times) + time.process_time() - before, value


def measure_speed(num_pairs: int) -> list[list[Any]]:
    pairs, rows = make_pairs(num_pairs), []
    kinds = ("rouge1", "rouge2", "rougeL")
    cases: list[tuple[str, Work, Metric, str]] = [
        ("BLEU", by_sacrebleu, Bleu(), "bleu"),
        ("ROUGE-1/2/L, stems", partial(by_rouge_score, kinds=kinds), Rouge(kinds=kinds), "rougeL"),
    ]
    for title, theirs, metric, name in cases:
        library, expected = start(theirs, pairs)()
        one, found = start(partial(by_us, metric=metric, name=name), pairs)()
        two, again = on_two(pairs, metric, name)
        assert abs(found - expected) < 1e-9
        assert found == again
        rows.append([title, num_pairs, library, one, two, library / one, one / two])
        print(json.dumps(rows[-1]), flush=True)
    return rows


def measure_significance() -> dict[str, float]:
    """Largest differences from sacrebleu's scores and from published p-values, over all systems."""
    systems, reference, p_values = read_systems()
    metric, oracle = Bleu(tokenizer="none"), sacrebleu.metrics.BLEU(tokenize="none", references=[reference])
    rows = {
        name: metric.statistics([Pair(*item) for item in zip(texts, zip(reference), strict=True)])
        for name, texts in systems.items()
    }
    baseline = rows[next(iter(systems))]
    scores = [
        abs(float(metric.values(rows[name].sum(axis=0))["bleu"]) - oracle.corpus_score(systems[name], None).score)
        for name in rows
    ]
    listed = {"randomisation": {name: both[0] for name, both in p_values["MULTEVAL_P_VALS"].items()}}
    listed["bootstrap"] = p_values["MOSES_P_VALS"]
    worst = {"systems": len(systems), "bleu": max(scores)}
    for test, expected in listed.items():
        found = {
            name: np.mean(
                [compare(metric, baseline, rows[name], test=test, seed=seed)["bleu"].p_value for seed in range(NUM_SEEDS)]
            )
            for name in expected
        }
        worst[f"p_value_by_{test}"] = float(max(abs(found[name] - expected[name]) for name in expected))
    return worst


if __name__ == "__main__":
    speed = measure_speed(int(sys.argv[1]) if len(sys.argv) > 1 else NUM_PAIRS)
    header = ["metric", "pairs", "library_s", "one_s", "two_s", "library / one", "one / two"]
    report("metrics", header, speed, None if len(sys.argv) > 1 else {"largest_differences_on_wmt17": measure_significance()})

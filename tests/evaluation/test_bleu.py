"""BLEU against the papers' examples and sacrebleu."""

from __future__ import annotations

import bz2
import logging
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sacrebleu.metrics import BLEU

from powerhouse.config import validate
from powerhouse.errors import ConfigError
from powerhouse.evaluation.bleu import Bleu
from powerhouse.evaluation.metric import make_pairs
from powerhouse.evaluation.significance import compare
from powerhouse.packages import Package, cache_folder, download, unpack
from random_texts import random_pairs

logging.getLogger("sacrebleu").setLevel(logging.ERROR)  # it warns of what the tests ask for on purpose

HYPOTHESES = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
REFERENCES = [
    ["The dog bit the man.", "The dog had bit the man."],
    ["It was not unexpected.", "No one was surprised."],
    ["The man bit him first.", "The man had bitten the dog."],
]
PAPINENI = [
    "It is a guide to action that ensures that the military will forever heed Party commands",
    "It is the guiding principle which guarantees the military forces always being under the command of the Party",
    "It is the practical guide for the army always to heed the directions of the party",
]


def value(metric: Bleu, hypotheses: list[str], references: list[Any]) -> float:
    return metric.score(metric.statistics(make_pairs(hypotheses, references)))["bleu"].value


def precisions(hypothesis: str, references: list[str]) -> list[tuple[int, int]]:
    sums = Bleu(tokenizer="none", is_lowercase=True).statistics(make_pairs([hypothesis], [references]))[0, 5:].astype(int)
    return list(zip(sums[:4].tolist(), sums[4:].tolist(), strict=True))


def test_the_worked_examples_of_papineni_have_their_precisions() -> None:
    one = "It is a guide to action which ensures that the military always obeys the commands of the party"
    two = "It is to insure the troops forever hearing the activity guidebook that party direct"

    assert precisions(one, PAPINENI)[:2] == [(17, 18), (10, 17)]
    assert precisions(two, PAPINENI)[:2] == [(8, 14), (1, 13)]
    assert precisions("the " * 7, ["the cat is on the mat", "there is a cat on the mat"])[0] == (2, 7)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, pytest.approx(48.530827, abs=1e-6)),
        ({"tokenizer": "none"}, pytest.approx(49.1919566, abs=1e-6)),
        ({"tokenizer": "intl"}, pytest.approx(43.91623493, abs=1e-6)),
        ({"max_order": 1}, pytest.approx(77.65, abs=0.005)),
        ({"max_order": 2}, pytest.approx(60.50, abs=0.005)),
        ({"max_order": 3}, pytest.approx(53.93, abs=0.005)),
        ({"max_order": 5}, pytest.approx(46.14, abs=0.005)),
        ({"max_order": 6}, pytest.approx(43.28, abs=0.005)),
    ],
)
def test_the_corpus_of_sacrebleus_readme_has_its_scores(settings: dict[str, Any], expected: Any) -> None:
    assert value(Bleu(**settings), HYPOTHESES, REFERENCES) == expected


@pytest.mark.parametrize(
    ("settings", "hypothesis", "reference", "expected"),
    [
        ({"smoothing": "floor", "amount": 0.01}, "this is a fest", "this is a test", 22.3606797749979),
        ({"uses_effective_order": True}, "test", "a test", 36.78794411714425),
        ({"uses_effective_order": True}, "a test", "a test", 100.0),
        ({"smoothing": "floor"}, "am I am a character sequence", "I am a symbol string sequence a a", 15.55722182),
        ({"smoothing": "none"}, "am I am a character sequence", "I am a symbol string sequence a a", 0.0),
        ({}, "", "a test", 0.0),
        ({}, "nothing alike", "a test", 0.0),
        ({"smoothing": "add-k"}, "", "a test", 0.0),
    ],
)
def test_single_sentences_have_sacrebleus_scores(
    settings: dict[str, Any], hypothesis: str, reference: str, expected: float
) -> None:
    assert value(Bleu(**settings), [hypothesis], [reference]) == pytest.approx(expected, abs=1e-6)


def test_sums_have_sacrebleus_score() -> None:
    sums = np.array([[11.0, 11, 9, 7, 5, 3, 10, 8, 6, 4]])

    assert Bleu().finalise(np.ones(1), sums)["bleu"] == pytest.approx([83.75922397])


VARIANTS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"smoothing": "floor", "amount": 0.01}, {"smooth_method": "floor", "smooth_value": 0.01}),
    ({"smoothing": "add-k", "amount": 0.5}, {"smooth_method": "add-k", "smooth_value": 0.5}),
    ({"smoothing": "none"}, {"smooth_method": "none"}),
    ({"tokenizer": "intl", "is_lowercase": True}, {"tokenize": "intl", "lowercase": True}),
    ({"tokenizer": "char", "max_order": 6}, {"tokenize": "char", "max_ngram_order": 6}),
    ({"tokenizer": "none", "uses_effective_order": True}, {"tokenize": "none", "effective_order": True}),
    ({"tokenizer": "zh"}, {"tokenize": "zh"}),
]


@pytest.mark.parametrize(
    ("ours", "theirs", "num_pairs"),
    [*((*variant, 60) for variant in VARIANTS), pytest.param(*VARIANTS[0], 1000, marks=pytest.mark.slow)],
)
def test_random_pairs_have_sacrebleus_scores_and_signature(
    ours: dict[str, Any], theirs: dict[str, Any], num_pairs: int
) -> None:
    pairs, metric = random_pairs(num_pairs), BLEU(**theirs)
    longest = max(len(pair.references) for pair in pairs)
    streams = [[(*pair.references, *[None] * longest)[number] for pair in pairs] for number in range(longest)]
    corpus = metric.corpus_score([pair.hypothesis for pair in pairs], streams).score
    signature = str(metric.get_signature())
    rows = Bleu(**ours).statistics(pairs)

    assert Bleu(**ours).score(rows)["bleu"].value == pytest.approx(corpus, abs=1e-9)
    assert signature in Bleu(**ours).signature(rows)
    sentences = [metric.sentence_score(pair.hypothesis, pair.references).score for pair in pairs]
    np.testing.assert_allclose(Bleu(**ours).values(rows)["bleu"], sentences, atol=1e-9)


def test_bleu_is_whole_numbers_so_that_sums_are_exact() -> None:
    rows = Bleu().statistics(random_pairs(50))

    assert (rows == rows.round()).all()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tokenizer": "moses"}, "tokenizer: got 'moses'; allowed: input should be '13a', 'intl', 'char', 'zh' or 'none'"),
        ({"smoothing": "epsilon"}, "smoothing: got 'epsilon'; allowed: input should be 'exp', 'floor', 'add-k' or 'none'"),
        ({"max_order": 0}, "max_order: got 0; allowed: input should be greater than or equal to 1"),
    ],
)
def test_wrong_settings_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(Bleu, values, "task.yaml")
    assert message in str(caught.value)


WMT17 = Package(
    name="sacrebleu",
    version="2.6.0",
    sha256="91499b6cd46138d95154fff1e863c2f9be57e82f0c719d8dd718d0006cf6c566",
    licence="Apache-2.0 (outputs of the systems of WMT 2017)",
    pip_options=["--no-binary=sacrebleu"],
    members=["*/test/wmt17_en_de_systems.pkl.bz2"],
)
P_VALUES = {  # randomisation by MultEval (10,000 trials), bootstrap by Moses (mean of three runs), from sacrebleu's own tests
    "FBK.4870": (0.0218, 0.01267),
    "KIT.4950": (0.0410, 0.02233),
    "online-A.0": (0.0001, 0.0),
    "SYSTRAN.4847": (0.59914, 0.20983),
}


class PlainUnpickler(pickle.Unpickler):
    """Reads lists, tuples and strings, and nothing that would be executed."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name}")


@pytest.mark.slow
def test_systems_of_wmt17_have_their_scores_and_p_values(tmp_path: Path) -> None:
    unpack(download(WMT17, cache_folder()), WMT17, tmp_path)
    with bz2.open(next(tmp_path.rglob("*.bz2"))) as file:
        named = {
            name.removeprefix("newstest2017.").removesuffix(".en-de"): texts for name, texts in PlainUnpickler(file).load()
        }
    baseline, *_, references = named
    metric, theirs = Bleu(tokenizer="none"), BLEU(tokenize="none", references=named[references])
    wanted = list(zip(*named[references], strict=True))
    rows = {name: metric.statistics(make_pairs(named[name], wanted)) for name in [baseline, *P_VALUES]}

    for name in (baseline, "FBK.4870"):
        expected = theirs.corpus_score(named[name], None).score
        assert metric.score(rows[name])["bleu"].value == pytest.approx(expected, abs=1e-9)
    for name, expected in P_VALUES.items():
        for test, num_runs, p_value in zip(("randomisation", "bootstrap"), (2, 6), expected, strict=True):
            runs = [compare(metric, rows[baseline], rows[name], test=test, seed=seed)["bleu"] for seed in range(num_runs)]
            assert np.mean([run.p_value for run in runs]) == pytest.approx(p_value, abs=0.01), (name, test)

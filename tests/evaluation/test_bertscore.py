"""BERTScore against bert-score, on MiniLM; and by its formula, on an encoder that a test writes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fakes import tiny_tokenizer, write_tiny_model
from families import build, export
from powerhouse.errors import ConfigError, InputError, ModelFormatError
from powerhouse.evaluation.bertscore import BertScore
from powerhouse.evaluation.metric import Pair, make_pairs
from powerhouse.models.catalog import CATALOG
from powerhouse.models.encoder import Encoder, EncoderConfig
from powerhouse.models.hub import load_model
from powerhouse.packages import cache_folder, download, unpack
from random_texts import random_pairs

EXAMPLES = [  # of bert-score's own tests
    ("28-year-old chef found dead in San Francisco mall", "28-Year-Old Chef Found Dead at San Francisco Mall"),
    (
        "A 28-year-old chef who recently moved to San Francisco was found dead in the staircase of a local shopping center.",
        "A 28-year-old chef who had recently moved to San Francisco was found dead in the stairwell of a local mall this week.",
    ),
    (
        "The victim's brother said he cannot imagine anyone who would want to harm him,"
        '"Finally, it went uphill again at him."',
        "But the victim's brother says he can't think of anyone who would want to hurt him, saying, "
        '"Things were finally going well for him."',
    ),
]
KNOWN = {  # (layer, idf) -> F1 of the examples by bert-score 0.3.13
    (4, False): [0.9857, 0.9349, 0.8099],
    (5, False): [0.9938, 0.9500, 0.8366],
    (5, True): [0.9876, 0.9105, 0.8057],
}
NUM_TESTED = 30


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    values = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    folder = export(build(EncoderConfig, values | {"max_position_embeddings": 24}), tmp_path_factory.mktemp("encoder"))
    tiny_tokenizer().save(folder)
    return folder


def by_formula(folder: Path, hypothesis: str, reference: str, weights: dict[int, float] | None = None) -> list[float]:
    """Precision, recall and F1 token by token, from the states of all layers."""
    encoder, tokenizer = load_model(folder), tiny_tokenizer()
    assert isinstance(encoder, Encoder)
    states, costs = [], []
    for text in (hypothesis, reference):
        ids = [*tokenizer.encode(text), tokenizer.end_of_text_id]
        with torch.inference_mode():
            states.append(encoder.encode(torch.tensor([ids]))[0].double().numpy())
        costs.append([1.0 if weights is None else weights[token] for token in ids[:-1]] + [0.0])
    said, wanted = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in states)
    precision = sum(cost * max(one @ other for other in wanted) for one, cost in zip(said, costs[0], strict=True)) / sum(
        costs[0]
    )
    recall = sum(cost * max(one @ other for other in said) for one, cost in zip(wanted, costs[1], strict=True)) / sum(costs[1])
    return [precision, recall, 2 * precision * recall / (precision + recall)]


def scores(metric: BertScore, pairs: list[Pair]) -> list[float]:
    ready = metric.prepare(pairs)
    return [score.value for score in ready.score(ready.statistics(pairs)).values()]


def test_values_are_those_of_the_formula(tiny: Path) -> None:
    pairs = make_pairs(["the cat"], ["a cat sat"])

    assert scores(BertScore(model=tiny, layer=3), pairs) == pytest.approx(by_formula(tiny, "the cat", "a cat sat"), abs=1e-5)


def test_a_token_of_fewer_references_weighs_more(tiny: Path) -> None:
    references = ["a cat sat", "a dog", "the cat"]
    pairs = make_pairs(["the dog", "a", "cat"], references)
    encoded = tiny_tokenizer().encode_batch(references)
    counts = {token: sum(token in ids for ids in encoded) for token in range(300)}
    weights = {token: np.log(4 / (count + 1)) for token, count in counts.items()}
    metric = BertScore(model=tiny, layer=3, uses_idf=True).prepare(pairs)

    expected = by_formula(tiny, "the dog", "a cat sat", weights)
    assert metric.statistics(pairs)[0, 3:] == pytest.approx(expected, abs=1e-5)


def test_each_value_is_that_of_its_best_reference(tiny: Path) -> None:
    metric = BertScore(model=tiny, layer=2)
    one, two, both = metric.statistics(make_pairs(["the cat"] * 3, ["a cat sat", "dog", ["a cat sat", "dog"]]))[:, 3:]

    assert both.tolist() == np.maximum(one, two).tolist()


def test_a_text_is_like_itself_and_an_empty_one_like_none(tiny: Path) -> None:
    found = BertScore(model=tiny, layer=2).statistics([Pair("the cat", ("the cat",)), Pair(" ", ("the cat",))])[:, 3:]

    assert found[0] == pytest.approx([1, 1, 1], abs=1e-6)
    assert found[1].tolist() == [0, 0, 0]


def test_a_long_text_is_cut_to_the_encoders_context_as_the_signature_says(tiny: Path) -> None:
    metric = BertScore(model=tiny, layer=2)
    rows = metric.statistics(make_pairs(["cat dog " * 50, "cat"], ["cat dog " * 30, "cat"]))

    assert rows[0, 3:] == pytest.approx([1, 1, 1], abs=1e-6)
    assert "|cut_at:24tokens|" in metric.signature(rows)


def test_texts_in_one_pass_have_the_values_of_texts_alone(tiny: Path) -> None:
    pairs = random_pairs(20)
    alone = BertScore(model=tiny, layer=2).statistics(pairs)

    np.testing.assert_allclose(BertScore(model=tiny, layer=2, batch_texts=8).statistics(pairs), alone, atol=1e-5)
    assert BertScore(model=tiny, layer=2).statistics(pairs[7:9]).tobytes() == alone[7:9].tobytes()


def test_a_declared_baseline_becomes_zero(tiny: Path) -> None:
    pairs = make_pairs(["the cat"], ["a cat sat"])
    plain = scores(BertScore(model=tiny, layer=2), pairs)
    metric = BertScore(model=tiny, layer=2, baseline=(0.5, 0.6, 0.7))

    assert scores(metric, pairs) == pytest.approx(
        [(value - low) / (1 - low) for value, low in zip(plain, (0.5, 0.6, 0.7), strict=True)]
    )
    assert "|rescaled:0.5,0.6,0.7|" in metric.signature(metric.statistics(pairs))


def test_the_signature_has_the_hash_of_the_model(tiny: Path, tmp_path: Path) -> None:
    for file in tiny.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = bytearray((tmp_path / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(weights)
    pairs = make_pairs(["the cat"], ["a cat sat"])

    one, two = (BertScore(model=folder, layer=2) for folder in (tiny, tmp_path))
    signatures = [metric.signature(metric.statistics(pairs)) for metric in (one, two)]
    digests = [dict(part.split(":") for part in signature.split("|"))["model"].split(",")[1] for signature in signatures]
    assert digests[0] != digests[1]
    assert [len(digest) for digest in digests] == [8, 8]


def test_what_cannot_be_scored_is_one_clear_error(tiny: Path, tmp_path: Path) -> None:
    pair = Pair("a", ("a",))
    cases: list[tuple[BertScore, type[Exception], str]] = [
        (BertScore(model=tiny, layer=4), ConfigError, "the encoder has no such layer\n  got: 4\n  allowed: 1 to 3"),
        (
            BertScore(model=tiny, layer=1, uses_idf=True),
            InputError,
            "weighs tokens by all references\n  do: call metric.prepare",
        ),
        (BertScore(model=write_tiny_model(tmp_path / "decoder")), ModelFormatError, "needs an encoder\n  got: Decoder"),
        (BertScore(model=tmp_path / "none"), ModelFormatError, "none: no such model directory"),
    ]
    for metric, kind, message in cases:
        with pytest.raises(kind) as caught:
            metric.statistic(pair)
        assert message in str(caught.value)


@pytest.mark.slow
def test_minilm_has_the_values_of_bert_score(tmp_path: Path) -> None:
    import bert_score  # seconds: pandas and all of transformers

    package = CATALOG["minilm-l6"]
    unpack(download(package, cache_folder()), package, tmp_path)
    model = tmp_path / package.path
    hypotheses, references = (list(texts) for texts in zip(*EXAMPLES, strict=True))
    pairs = make_pairs(hypotheses, references)
    for (layer, uses_idf), known in KNOWN.items():
        metric = BertScore(model=model, layer=layer, uses_idf=uses_idf).prepare(pairs)
        assert metric.statistics(pairs)[:, 5] == pytest.approx(known, abs=5e-5)

    pairs = [pair for pair in random_pairs(NUM_TESTED) if pair.hypothesis]  # bert-score fails on an empty one
    metric = BertScore(model=model, uses_idf=True).prepare(pairs)
    texts = [[pair.hypothesis for pair in pairs], [list(pair.references) for pair in pairs]]
    theirs = torch.stack(bert_score.score(*texts, str(model), num_layers=5, idf=True, device="cpu", nthreads=0), 1)
    np.testing.assert_allclose(metric.statistics(pairs)[:, 3:], theirs, atol=1e-4)

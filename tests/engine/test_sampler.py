from __future__ import annotations

from collections import Counter

import pytest
import torch
from transformers.generation import logits_process as peers

from powerhouse.engine.sampler import Penalties, RowSampling, distribution, draw_uniform, likeliest, sample, seed_of

LOGITS_V = torch.tensor([1.0, 3.0, 2.0, 0.0, 2.5])
NUM_DRAWS = 2000


def shares(temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0) -> dict[int, float]:
    """Share of each token when the random numbers are spread evenly over [0, 1): the distribution itself."""
    rows = [RowSampling(temperature, top_k, top_p, (i + 0.5) / NUM_DRAWS) for i in range(NUM_DRAWS)]
    counts = Counter(sample(LOGITS_V.expand(NUM_DRAWS, -1), rows))
    return {token: count / NUM_DRAWS for token, count in counts.items()}


def softmax(kept: list[int], temperature: float = 1.0) -> dict[int, float]:
    weights = {token: float(torch.exp(LOGITS_V[token] / temperature)) for token in kept}
    return {token: weight / sum(weights.values()) for token, weight in weights.items()}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, softmax([0, 1, 2, 3, 4])),
        ({"temperature": 2.0}, softmax([0, 1, 2, 3, 4], 2.0)),
        ({"temperature": 1e-40}, {1: 1.0}),
        ({"temperature": 0.0}, {1: 1.0}),
        ({"top_k": 1}, {1: 1.0}),
        ({"top_k": 3}, softmax([1, 2, 4])),
        ({"top_k": 99}, softmax([0, 1, 2, 3, 4])),
        # 0.47 and 0.29 of all: together past 0.7, and the first alone past 0.4
        ({"top_p": 0.7}, softmax([1, 4])),
        ({"top_p": 0.4}, {1: 1.0}),
        ({"top_p": 1e-9}, {1: 1.0}),
        # among the best three 0.51, 0.31 and 0.19: top-p is applied after top-k
        ({"top_k": 3, "top_p": 0.8}, softmax([1, 4])),
        ({"top_k": 3, "top_p": 0.83}, softmax([1, 2, 4])),
        ({"top_k": 2, "temperature": 0.5}, softmax([1, 4], 0.5)),
    ],
)
def test_tokens_are_drawn_from_the_filtered_distribution(settings: dict[str, float], expected: dict[int, float]) -> None:
    assert shares(**settings) == pytest.approx(expected, abs=1e-3)  # type: ignore[arg-type]


def test_of_equal_logits_top_k_keeps_no_more_than_k() -> None:
    rows = [RowSampling(1.0, 2, 1.0, (i + 0.5) / 100) for i in range(100)]
    assert set(sample(torch.zeros(100, 5), rows)) == {0, 1}


def test_a_row_knows_nothing_of_the_rest_of_the_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    logits_BV = torch.randn(64, 300, generator=generator) * 3
    kinds = [(0.0, None, 1.0), (1.0, None, 1.0), (0.7, 20, 1.0), (1.3, None, 0.9)]
    rows = [RowSampling(*kinds[i % 4], draw_uniform(i, i)) for i in range(64)]
    alone = [sample(logits_BV[i : i + 1], [row])[0] for i, row in enumerate(rows)]
    assert sample(logits_BV, rows) == alone


def test_the_largest_random_number_gives_a_token_that_is_possible() -> None:
    row = RowSampling(1.0, 2, 1.0, 1 - 2**-32)
    assert sample(LOGITS_V[None], [row]) == [4]


def test_random_numbers_are_even_repeatable_and_differ_by_seed_and_place() -> None:
    draws = torch.tensor([[draw_uniform(seed, place) for place in range(200)] for seed in range(50)])
    assert float(draws.min()) >= 0
    assert float(draws.max()) < 1
    # 10,000 draws: each tenth holds 1,000 give or take 30, and five times that is out of all chance
    assert ((draws.histc(10, 0, 1) - 1000).abs() < 150).all()
    assert draws.unique().numel() > 9_990
    assert draw_uniform(3, 5) == draw_uniform(3, 5)


PROMPT, ANSWER = [7, 7, 30, 200], [9, 30, 9, 9, 41]
WRITTEN = ((9, 3), (30, 1), (41, 1))


def penalties(repetition: float, presence: float = 0.0, frequency: float = 0.0) -> Penalties:
    return Penalties(repetition, presence, frequency, tuple({*PROMPT, *ANSWER}), WRITTEN)


@pytest.mark.parametrize(
    ("settings", "processors"),
    [
        ({"min_p": 0.1}, [peers.MinPLogitsWarper(0.1)]),
        (
            {"temperature": 0.6, "min_p": 0.02, "top_k": 12, "top_p": 0.8},
            [
                peers.TemperatureLogitsWarper(0.6),
                peers.MinPLogitsWarper(0.02),
                peers.TopKLogitsWarper(12),
                peers.TopPLogitsWarper(0.8),
            ],
        ),
        ({"penalties": penalties(1.7)}, [peers.RepetitionPenaltyLogitsProcessor(1.7)]),
        ({"penalties": penalties(0.6)}, [peers.RepetitionPenaltyLogitsProcessor(0.6)]),
        ({"bias": ((3, 4.5), (9, -100.0))}, [peers.SequenceBiasLogitsProcessor({(3,): 4.5, (9,): -100.0})]),
        (
            {"bias": ((0, float("-inf")), (4, float("-inf")))},
            [peers.MinNewTokensLengthLogitsProcessor(len(PROMPT), len(ANSWER) + 1, [0, 4])],
        ),
        (
            {"bias": ((9, 2.0),), "penalties": penalties(1.3), "temperature": 1.4, "top_k": 50},
            [
                peers.SequenceBiasLogitsProcessor({(9,): 2.0}),
                peers.RepetitionPenaltyLogitsProcessor(1.3),
                peers.TemperatureLogitsWarper(1.4),
                peers.TopKLogitsWarper(50),
            ],
        ),
    ],
    ids=["min-p", "all filters", "repetition", "repetition below 1", "bias", "no end yet", "bias and penalty"],
)
def test_the_distribution_is_that_of_transformers(settings: dict[str, object], processors: list[peers.LogitsProcessor]) -> None:
    logits_BV = torch.randn(3, 300, generator=torch.Generator().manual_seed(1)) * 3
    row = RowSampling(**({"temperature": 1.0, "top_k": None, "top_p": 1.0, "uniform": 0.0} | settings))  # type: ignore[arg-type]
    expected_BV = peers.LogitsProcessorList(processors)(torch.tensor([PROMPT + ANSWER] * 3), logits_BV.clone())
    torch.testing.assert_close(distribution(logits_BV, [row] * 3), expected_BV.softmax(-1).double(), rtol=1e-5, atol=1e-7)


def test_presence_is_taken_off_once_and_frequency_once_for_each_time() -> None:
    logits_BV = torch.randn(1, 300, generator=torch.Generator().manual_seed(1))
    expected_V = logits_BV[0].clone()
    for token_id, count in Counter(ANSWER).items():
        expected_V[token_id] -= 0.5 + 0.25 * count
    row = RowSampling(1.0, None, 1.0, 0.0, penalties=penalties(1.0, 0.5, 0.25))
    torch.testing.assert_close(distribution(logits_BV, [row])[0], expected_V.softmax(-1).double(), rtol=1e-5, atol=1e-7)


def test_a_row_with_a_bias_changes_no_other_row_nor_the_logits() -> None:
    logits_BV = LOGITS_V.repeat(2, 1)
    greedy = RowSampling(0.0, None, 1.0, 0.0)
    assert sample(logits_BV, [greedy, greedy._replace(bias=((0, 99.0),))]) == [1, 0]
    assert torch.equal(logits_BV, LOGITS_V.repeat(2, 1))


def test_answers_to_one_prompt_have_seeds_of_their_own_and_the_first_has_the_requests() -> None:
    seeds = [seed_of(seed, index) for seed in range(20) for index in range(20)]
    assert len(set(seeds)) == 400
    assert [seed_of(seed, 0) for seed in range(20)] == list(range(20))


@pytest.mark.parametrize("vocab_size", [192, 200])
def test_the_likeliest_is_the_first_of_the_largest(vocab_size: int) -> None:
    logits_BV = torch.randint(-3, 3, (20, vocab_size), generator=torch.Generator().manual_seed(0)).float()
    logits_BV[3] = float("-inf")
    assert likeliest(logits_BV).tolist() == [row.index(max(row)) for row in logits_BV.tolist()]

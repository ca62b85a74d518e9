from __future__ import annotations

from collections import Counter

import pytest
import torch

from powerhouse.engine.sampler import RowSampling, draw_uniform, sample

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

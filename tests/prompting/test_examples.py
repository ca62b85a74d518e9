from __future__ import annotations

from collections import Counter

import pytest

from powerhouse.errors import InputError
from powerhouse.prompting import Example, choose_examples, orders_of

TEXTS = ["a dull plot", "a fine cast", "the plot, the cast, the end", "wooden dialogue", "sharp dialogue", "fine music"]
POOL = [Example({"text": text}, "good" if "fine" in text or "sharp" in text else "bad", text) for text in TEXTS]


def test_a_draw_is_a_function_of_its_seed() -> None:
    draws = [choose_examples(POOL, 3, "seeded", seed) for seed in range(20)]

    assert draws == [choose_examples(POOL, 3, "seeded", seed) for seed in range(20)]
    assert len({tuple(example.text for example in draw) for draw in draws}) > 10
    assert all(len({example.text for example in draw}) == 3 for draw in draws)


@pytest.mark.parametrize("num", [0, 1, 2, 5, 6])
def test_a_balanced_draw_has_as_many_of_each_label_but_for_one(num: int) -> None:
    chosen = choose_examples(POOL, num, "balanced", seed=1)

    counts = Counter(example.label for example in chosen)
    assert len(chosen) == num
    assert abs(counts["good"] - counts["bad"]) <= 1


def test_the_nearest_examples_share_rare_words_and_the_likest_comes_last() -> None:
    chosen = choose_examples(POOL, 2, "nearest", seed=0, question="Dialogue as sharp as can be!")

    assert [example.text for example in chosen] == ["wooden dialogue", "sharp dialogue"]


def test_orders_differ_and_the_first_is_the_given_one() -> None:
    for num_examples, num_orders in ((0, 1), (1, 1), (2, 2), (4, 5), (6, 5)):
        orders = orders_of(POOL[:num_examples], num_orders, seed=3)

        assert orders[0] == POOL[:num_examples]
        assert len({tuple(example.text for example in order) for order in orders}) == num_orders
        assert all(sorted(order, key=POOL.index) == POOL[:num_examples] for order in orders)
        assert orders == orders_of(POOL[:num_examples], num_orders, seed=3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: choose_examples(POOL, 7, "seeded", 0), r"more examples than there are\n  got: 7\n  allowed: 0 to 6"),
        (lambda: choose_examples([*POOL[:1], *POOL[2:4], POOL[1]], 4, "balanced", 0), "a label has too few examples"),
        (lambda: orders_of(POOL[:2], 5, 0), r"2 examples have fewer orders\n  got: 5\n  allowed: 1 to 2"),
    ],
)
def test_what_the_pool_cannot_give_is_refused(call: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()  # type: ignore[operator]

from __future__ import annotations

import re
from itertools import combinations, pairwise
from pathlib import Path

import pytest

from fakes import write_tiny_model
from powerhouse.engine import EngineConfig
from powerhouse.engine.cut import cut_layers, measure_head
from powerhouse.errors import ConfigError


@pytest.mark.parametrize(
    ("num_layers", "num_stages", "head_layers", "lengths"),
    [
        (4, 1, 0.5, [4]),
        (4, 2, 0.0, [2, 2]),
        (7, 3, 0.0, [3, 3, 1]),
        (30, 4, 0.0, [8, 8, 8, 6]),
        (30, 2, 6.0, [18, 12]),
        (30, 4, 5.5, [9, 9, 9, 3]),
        (4, 2, 100.0, [3, 1]),
    ],
)
def test_layers_are_cut_in_order_and_fewer_where_the_vocabulary_is(
    num_layers: int, num_stages: int, head_layers: float, lengths: list[int]
) -> None:
    parts = cut_layers(num_layers, num_stages, head_layers)
    assert [len(part) for part in parts] == lengths
    assert [i for part in parts for i in part] == list(range(num_layers))


@pytest.mark.parametrize("head_layers", [0.0, 0.4, 1.0, 2.7, 9.0])
def test_no_other_cut_has_a_faster_slowest_stage(head_layers: float) -> None:
    def slowest(lengths: list[int]) -> float:
        return max([*lengths[:-1], lengths[-1] + head_layers])

    for num_layers, num_stages in ((5, 2), (9, 3), (10, 4)):
        borders = combinations(range(1, num_layers), num_stages - 1)
        best = min(slowest([b - a for a, b in pairwise([0, *border, num_layers])]) for border in borders)
        assert slowest([len(part) for part in cut_layers(num_layers, num_stages, head_layers)]) == best


def test_more_stages_than_layers_are_refused() -> None:
    message = "more pipeline stages than layers\n  got: 5\n  allowed: 1 to 4\n  do: lower num_stages"
    with pytest.raises(ConfigError, match=re.escape(message)):
        cut_layers(4, 5)


@pytest.mark.parametrize("settings", [{}, {"max_model_len": 20}, {"num_blocks": 4, "max_num_seqs": 8}])
def test_the_vocabulary_is_measured_in_layers_whatever_the_context_and_the_cache(
    tmp_path: Path, settings: dict[str, int]
) -> None:
    config = EngineConfig(num_stages=2, num_threads=1, **settings)
    assert measure_head(write_tiny_model(tmp_path, max_position_embeddings=32), config) > 0

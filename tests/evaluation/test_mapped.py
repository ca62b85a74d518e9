"""Rows from Ray workers, for real."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from ray import cloudpickle
from ray.data.block import BlockAccessor

from powerhouse.errors import InputError
from powerhouse.evaluation.mapped import RowMaker, map_statistics
from powerhouse.evaluation.meteor import Meteor
from powerhouse.evaluation.metric import Part, merge
from powerhouse.evaluation.rouge import Rouge
from powerhouse.evaluation.settings import PoolConfig
from random_texts import random_pairs


@pytest.mark.parametrize("num_references", [None, 2])
def test_blocks_as_ray_data_makes_them_give_the_rows_to_the_bit(num_references: int | None) -> None:
    pairs = [pair for pair in random_pairs(80) if num_references in (None, len(pair.references))]
    references = [list(pair.references) for pair in pairs]
    table = pa.table({"number": range(len(pairs)), "hypothesis": [pair.hypothesis for pair in pairs], "references": references})
    work, parts = RowMaker(cloudpickle.loads(cloudpickle.dumps(Rouge(is_stemmed=False)))), []
    for start in reversed(range(0, len(pairs), 7)):
        made = work(BlockAccessor.for_block(table.slice(start, 7)).to_numpy())
        rows = list(BlockAccessor.for_block(BlockAccessor.batch_to_block(made)).iter_rows(public_row_format=True))
        parts.append(Part(np.array([row["number"] for row in rows]), np.array([row["sums"] for row in rows])))

    assert merge(parts).sums_NS.tobytes() == Rouge(is_stemmed=False).statistics(pairs).tobytes()


@pytest.mark.slow
def test_one_worker_and_three_give_the_rows_and_scores_of_one_process_to_the_bit(local_ray: str) -> None:
    pairs, metric = random_pairs(60, max_lines=2), Rouge(is_stemmed=False)
    here = metric.statistics(pairs)

    for num_actors in (1, 3):
        rows = map_statistics(metric, pairs, PoolConfig(num_actors=num_actors, cpus_per_actor=0.5), block_items=7)

        assert rows.tobytes() == here.tobytes()
        assert metric.score(rows) == metric.score(here)


@pytest.mark.slow
def test_what_a_worker_lacks_is_told_as_if_it_were_here(local_ray: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="METEOR's synonyms need WordNet, which is not installed"):
        map_statistics(Meteor(wordnet=tmp_path), random_pairs(3), PoolConfig(cpus_per_actor=0.5))

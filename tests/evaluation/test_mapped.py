"""Rows from Ray workers, for real."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from powerhouse.errors import InputError
from powerhouse.evaluation.bleu import Bleu
from powerhouse.evaluation.mapped import MappingConfig, map_statistics
from powerhouse.evaluation.meteor import Meteor
from powerhouse.evaluation.rouge import Rouge
from random_texts import random_pairs


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    temporary = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    ray.init(address="local", num_cpus=4, resources={"data": 1000}, include_dashboard=False, _temp_dir=temporary)
    yield
    ray.shutdown()
    shutil.rmtree(temporary, ignore_errors=True)


@pytest.mark.slow
def test_one_two_and_four_workers_give_the_rows_and_scores_of_one_process_to_the_bit(cluster: None) -> None:
    pairs = random_pairs(60, max_lines=2)
    for metric in (Bleu(), Rouge()):
        here = metric.statistics(pairs)
        for num_workers in (1, 2, 4) if isinstance(metric, Rouge) else (2,):
            config = MappingConfig(num_workers=num_workers, cpus_per_worker=0.5, chunk_items=7)

            rows = map_statistics(metric, pairs, config)

            assert rows.tobytes() == here.tobytes()
            assert metric.score(rows) == metric.score(here)


@pytest.mark.slow
def test_what_a_worker_lacks_is_told_as_if_it_were_here(cluster: None, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="METEOR's synonyms need WordNet, which is not installed"):
        map_statistics(Meteor(wordnet=tmp_path), random_pairs(3), MappingConfig(num_workers=1, cpus_per_worker=0.5))

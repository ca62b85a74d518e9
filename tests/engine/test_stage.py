from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from fakes import write_tiny_model
from powerhouse.engine import EngineConfig
from powerhouse.engine.batch import ForwardBatch
from powerhouse.engine.sampler import RowSampling
from powerhouse.engine.stage import Stage, split_layers
from powerhouse.errors import ConfigError, ModelFormatError


@pytest.mark.parametrize(
    ("num_layers", "num_stages", "lengths"), [(4, 1, [4]), (4, 2, [2, 2]), (7, 3, [3, 2, 2]), (30, 4, [8, 8, 7, 7])]
)
def test_layers_are_cut_evenly_and_in_order(num_layers: int, num_stages: int, lengths: list[int]) -> None:
    parts = split_layers(num_layers, num_stages)
    assert [len(part) for part in parts] == lengths
    assert [i for part in parts for i in part] == list(range(num_layers))


def test_more_stages_than_layers_are_refused() -> None:
    message = "more pipeline stages than layers\n  got: 5\n  allowed: 1 to 4\n  do: lower num_stages"
    with pytest.raises(ConfigError, match=re.escape(message)):
        split_layers(4, 5)


def test_slices_after_each_other_are_the_whole(tmp_path: Path) -> None:
    directory = write_tiny_model(tmp_path)
    tokens = (5, 6, 7, 8)
    row = RowSampling(0.0, None, 1.0, 0.0)
    batch = ForwardBatch(tokens, (0, 1, 2, 3), (8, 9, 10, 11), (4,), ((2,),), (3,), (row,))
    whole = Stage.load(directory, EngineConfig(block_size=4))
    expected_TC = whole.forward(batch)
    hidden_TC = None
    for rank in range(4):
        stage = Stage.load(directory, EngineConfig(block_size=4, num_stages=4), rank)
        hidden_TC = stage.forward(batch, hidden_TC)
    assert hidden_TC is not None
    torch.testing.assert_close(hidden_TC, expected_TC, rtol=0, atol=0)
    assert stage.sample(batch, hidden_TC) == whole.sample(batch, expected_TC)


def test_a_stage_holds_its_own_layers_only(tmp_path: Path) -> None:
    stage = Stage.load(write_tiny_model(tmp_path), EngineConfig(num_stages=4), rank=1)
    assert not stage.is_first
    assert not stage.is_last
    assert list(stage.decoder.blocks) == ["1"]


def test_a_damaged_model_directory_is_refused(tmp_path: Path) -> None:
    directory = write_tiny_model(tmp_path)
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelFormatError, match=r"model\.safetensors: damaged or truncated"):
        Stage.load(directory, EngineConfig())


def test_an_unknown_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match="no such model directory"):
        Stage.load(tmp_path / "none", EngineConfig())

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fakes import write_tiny_model
from powerhouse.engine import EngineConfig
from powerhouse.engine.batch import ForwardBatch
from powerhouse.engine.sampler import RowSampling
from powerhouse.engine.stage import Stage
from powerhouse.errors import ModelFormatError


def test_slices_after_each_other_are_the_whole(tmp_path: Path) -> None:
    directory = write_tiny_model(tmp_path)
    tokens = (5, 6, 7, 8)
    row = RowSampling(0.0, None, 1.0, 0.0)
    batch = ForwardBatch(tokens, (0, 1, 2, 3), (8, 9, 10, 11), (4,), ((2,),), (3,), (row,))
    whole = Stage.load(directory, EngineConfig(block_size=4))
    expected_TC = whole.forward(batch)
    hidden_TC = None
    for layer in range(4):
        stage = Stage.load(directory, EngineConfig(block_size=4), range(layer, layer + 1))
        hidden_TC = stage.forward(batch, hidden_TC)
    assert hidden_TC is not None
    torch.testing.assert_close(hidden_TC, expected_TC, rtol=0, atol=0)
    assert stage.sample(batch, hidden_TC) == whole.sample(batch, expected_TC)


def test_a_stage_holds_its_own_layers_only(tmp_path: Path) -> None:
    stage = Stage.load(write_tiny_model(tmp_path), EngineConfig(), range(1, 2))
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

"""A model's weights are written one tensor at a time."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from powerhouse.models.weights import write_float32


def test_what_is_written_is_what_safetensors_reads_and_no_tensor_is_kept_until_the_next_is_taken(tmp_path: Path) -> None:
    shapes = {"matrix": (3, 5), "vector": (7,), "number": (), "nothing": (0, 4), "half": (2, 2)}
    taken: list[weakref.ref[Any]] = []
    expected = {}

    def read(name: str) -> torch.Tensor:
        assert all(reference() is None for reference in taken), "the one before is still in memory"
        array = np.random.default_rng(0).random(shapes[name], np.float32).astype(np.float16 if name == "half" else np.float32)
        array = np.asarray(array)
        expected[name] = torch.from_numpy(array.astype(np.float32))
        taken.append(weakref.ref(array))  # which lives as long as a tensor shares its memory
        return torch.from_numpy(array)

    write_float32(tmp_path / "model.safetensors", shapes, read)

    got = load_file(tmp_path / "model.safetensors")
    assert got.keys() == expected.keys()
    assert all(got[name].dtype == torch.float32 and torch.equal(got[name], expected[name]) for name in expected)
    write_float32(None, shapes, read)
    assert len(taken) == 2 * len(shapes)

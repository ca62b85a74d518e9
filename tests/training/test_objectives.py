"""The loss in chunks of tokens is the loss in one piece."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from distributed import run_on_ranks
from powerhouse.training.config import TrainingConfig
from powerhouse.training.loop import accumulate
from powerhouse.training.methods import method_of
from tiny_run import SHAPES, make_config, method_batch, sharded_model

CHUNK = 7
UNTIED = SHAPES["decoder"] | {"tie_word_embeddings": False}


class MostLogits(TorchDispatchMode):
    """The most rows of any tensor as wide as the vocabulary, parameters and their gradients left out."""

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.vocab_size, self.width, self.num_rows = vocab_size, width, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.shape[-1:] == (self.vocab_size,):
            num_rows = out.numel() // self.vocab_size
            self.num_rows = max(self.num_rows, num_rows if num_rows != self.width else 0)
        return out


def steps_of(config: TrainingConfig) -> list[dict[str, Any]]:
    results = []
    for chunk_tokens in (None, CHUNK):
        model, _ = sharded_model(config)
        objective = partial(method_of(config.shape).objective, chunk_tokens=chunk_tokens)
        with MostLogits(config.shape.vocab_size, config.shape.hidden_size) as most:
            totals = accumulate(model, objective, method_batch(config), config.run)
        gradients = {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}
        results.append({"loss": totals[0] / totals[1], "gradients": gradients, "num_rows": most.num_rows})
    return results


@pytest.mark.slow
@pytest.mark.parametrize("shape", [*SHAPES.values(), UNTIED], ids=[*SHAPES, "untied"])
def test_the_loss_in_chunks_has_the_same_gradients_and_never_more_logits_than_a_chunk(
    tmp_path: Path, shape: dict[str, Any]
) -> None:
    for whole, chunked in run_on_ranks(2, steps_of, make_config(tmp_path, model=shape, run={"micro_batch_rows": 4})):
        torch.testing.assert_close(chunked["loss"], whole["loss"], rtol=1e-6, atol=0)
        for name, gradient in whole["gradients"].items():
            torch.testing.assert_close(chunked["gradients"][name], gradient, rtol=1e-5, atol=1e-7, msg=name)
        assert chunked["num_rows"] <= CHUNK < whole["num_rows"]

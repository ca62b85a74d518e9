"""Recomputed and compiled blocks give the loss and the gradients of plain ones."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from distributed import run_on_ranks
from powerhouse.models.decoder import Decoder, DecoderConfig
from powerhouse.training.blocks import recompute_blocks
from powerhouse.training.config import TrainingConfig
from powerhouse.training.loop import accumulate
from powerhouse.training.methods import METHODS, method_of
from tiny_run import SHAPES, make_config, method_batch, sharded_model


class Counted(TorchDispatchMode):
    """Counts the operations that run, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(function.overloadpacket).removeprefix("aten.")] += 1
        return function(*args, **(kwargs or {}))


def step_of(config: TrainingConfig, counts_operations: bool) -> dict[str, Any]:
    model, _ = sharded_model(config)
    compiled_before = counters["frames"]["ok"]
    objective, batch, counted = method_of(config.shape).objective, method_batch(config), Counted()
    if counts_operations:
        with counted:
            totals = accumulate(model, objective, batch, config.run)
    else:
        totals = accumulate(model, objective, batch, config.run)
    gradients = {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}
    num_compiled = counters["frames"]["ok"] - compiled_before
    return {"loss": totals[0] / totals[1], "gradients": gradients, "counts": counted.counts, "num_compiled": num_compiled}


def steps_of(configs: list[TrainingConfig], counts_operations: bool = True) -> list[dict[str, Any]]:
    return [step_of(config, counts_operations) for config in configs]


def same(one: dict[str, Any], other: dict[str, Any], tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(one["loss"], other["loss"], rtol=tolerance, atol=0)
    assert one["gradients"].keys() == other["gradients"].keys()
    for name, gradient in one["gradients"].items():
        torch.testing.assert_close(gradient, other["gradients"][name], rtol=tolerance, atol=1e-2 * tolerance, msg=name)


PRODUCTS, CHEAP = ("mm", "addmm"), ("mul", "add")


@pytest.mark.slow
@pytest.mark.parametrize("family", list(METHODS))
def test_blocks_computed_again_give_the_same_and_selective_ones_no_matrix_product_twice(tmp_path: Path, family: str) -> None:
    configs = [make_config(tmp_path, model=SHAPES[family], run={"recompute": what}) for what in ("none", "selective", "full")]

    for kept, some, all_again in run_on_ranks(2, steps_of, configs):
        same(kept, some)
        same(kept, all_again)
        num_products = [sum(result["counts"][name] for name in PRODUCTS) for result in (kept, some, all_again)]
        num_cheap = [sum(result["counts"][name] for name in CHEAP) for result in (kept, some, all_again)]
        assert num_products[0] == num_products[1] < num_products[2]
        assert num_cheap[0] < num_cheap[1]


def test_attention_that_is_halved_is_computed_again_with_the_rest_of_a_block_and_kept_by_selective_recomputation() -> None:
    gradients, num_computed = [], []
    for what in (None, "selective", "full"):
        model = Decoder(
            DecoderConfig.model_validate(SHAPES["decoder"] | {"num_hidden_layers": 1, "max_position_embeddings": 256})
        )
        model.initialise(0)
        if what:
            recompute_blocks(model, what)
        with Counted() as counted:
            model(torch.arange(256)[None], torch.arange(256)).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        num_computed.append(counted.counts["powerhouse.halved_attention"])

    assert num_computed == [1, 1, 2]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)
    torch.testing.assert_close(gradients[2], gradients[0], rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's compiler asks for it
def test_compiled_blocks_give_the_same(tmp_path: Path) -> None:
    model = SHAPES["decoder"] | {"num_hidden_layers": 1}  # most of the time is the C++ compiler's
    runs = [{"micro_batch_rows": 8}, {"micro_batch_rows": 8, "compiles_blocks": True, "recompute": "selective"}]
    configs = [make_config(tmp_path, model=model, run=run) for run in runs]

    [(plain, compiled)] = run_on_ranks(1, steps_of, configs, False)

    same(plain, compiled, tolerance=1e-4)
    assert plain["num_compiled"] == 0 < compiled["num_compiled"]  # frames that the compiler took over

"""What two ranks compute is what one process computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from distributed import run_on_ranks
from fakes import tiny_config
from powerhouse.models.decoder import Decoder
from powerhouse.models.model import token_loss
from powerhouse.training.config import TrainingConfig
from powerhouse.training.loop import accumulate, clip_gradients, train_step
from powerhouse.training.objectives import causal_language_model
from powerhouse.training.sharding import gather_state
from tiny_run import make_config, random_batch, sharded_model


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gradients_of(config: TrainingConfig, num_ignored: int, micro_batch_rows: int) -> dict[str, Any]:
    model, _ = sharded_model(config)
    totals = accumulate(model, causal_language_model, random_batch(num_ignored=num_ignored), micro_batch_rows)
    gradients = {name: whole(parameter.grad).clone() for name, parameter in model.named_parameters()}
    norm = clip_gradients(model, 0.01)
    clipped = {name: whole(parameter.grad) for name, parameter in model.named_parameters()}
    return {"loss": totals[0] / totals[1], "gradients": gradients, "norm": norm, "clipped": clipped}


def reference(config: TrainingConfig, num_ignored: int) -> dict[str, Any]:
    """One plain backward pass of torch over the whole batch, with torch's own clipping."""
    model = Decoder(config.model)
    model.initialise(config.seed)
    ids = torch.randint(0, 300, (8, 17), generator=torch.Generator().manual_seed(5))
    labels = ids[:, 1:].clone()
    labels.view(-1)[:num_ignored] = -100
    loss = token_loss(model(ids[:, :-1], torch.arange(16)), labels) / (8 * 16 - num_ignored)
    loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    clipped = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"loss": loss.detach(), "gradients": gradients, "norm": float(norm), "clipped": clipped}


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize(("num_ranks", "micro_batch_rows"), [(1, 8), (2, 4), (2, 1)])
def test_loss_gradients_and_clipping_over_ranks_and_micro_batches_are_those_of_one_pass_with_ragged_labels(
    tmp_path: Path, num_ranks: int, micro_batch_rows: int, is_tied: bool
) -> None:
    model = tiny_config(num_hidden_layers=2, tie_word_embeddings=is_tied).model_dump()
    config = make_config(tmp_path, model=model)
    num_ignored = 37  # all of the first two rows and a part of the third: ranks and micro-batches differ in their counts

    results = run_on_ranks(num_ranks, gradients_of, config, num_ignored, micro_batch_rows)

    expected = reference(config, num_ignored)
    for result in results:
        torch.testing.assert_close(result["loss"].float(), expected["loss"], atol=1e-5, rtol=0)
        assert result["norm"] == pytest.approx(expected["norm"], rel=1e-4)
        for kind in ("gradients", "clipped"):
            for name, gradient in expected[kind].items():
                torch.testing.assert_close(result[kind][name], gradient, atol=1e-6, rtol=1e-4, msg=f"{kind} {name}")


def initial_state(config: TrainingConfig) -> dict[str, Tensor]:
    return gather_state(sharded_model(config)[0])


@pytest.mark.slow
def test_fresh_weights_do_not_depend_on_the_number_of_ranks(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    alone = Decoder(config.model)
    alone.initialise(config.seed)

    for num_ranks in (1, 2):
        state, *others = run_on_ranks(num_ranks, initial_state, config)
        assert all(other == {} for other in others)
        assert state.keys() == alone.state_dict().keys()
        for name, tensor in alone.state_dict().items():
            torch.testing.assert_close(state[name], tensor, atol=0, rtol=0)


def types_of_a_bfloat16_step(config: TrainingConfig) -> dict[str, Any]:
    model, optimizer = sharded_model(config)
    seen = set()
    model.blocks()["0"].register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    train_step(model, optimizer, causal_language_model, random_batch(), 2, config.optim)
    totals = accumulate(model, causal_language_model, random_batch(), 2)
    kept = {tensor.dtype for values in optimizer.state.values() for tensor in values.values()}
    parameters = list(model.parameters())
    return {
        "computed": seen,
        "kept": kept | {p.dtype for p in parameters} | {p.grad.dtype for p in parameters},
        "loss": float(totals[0] / totals[1]),
        "sharded": all(p.to_local().numel() < p.numel() for p in parameters),
        "rank": dist.get_rank(),
    }


@pytest.mark.slow
def test_bfloat16_computes_in_bfloat16_and_keeps_weights_gradients_and_state_in_float32(tmp_path: Path) -> None:
    half = run_on_ranks(2, types_of_a_bfloat16_step, make_config(tmp_path, precision="bfloat16"))
    full = run_on_ranks(2, types_of_a_bfloat16_step, make_config(tmp_path))

    for result in half:
        assert result["computed"] == {torch.bfloat16}
        assert result["kept"] == {torch.float32}
        assert result["sharded"]
    assert full[0]["computed"] == {torch.float32}
    assert half[0]["loss"] == pytest.approx(full[0]["loss"], abs=0.05)
    assert half[0]["loss"] != full[0]["loss"]

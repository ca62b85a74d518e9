"""What several ranks compute is what one process computes."""

from __future__ import annotations

import ctypes
import resource
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from distributed import run_on_ranks
from fakes import tiny_config
from powerhouse.models.decoder import Decoder
from powerhouse.models.hub import save_model
from powerhouse.models.model import token_loss
from powerhouse.training.config import TrainingConfig, read_shape
from powerhouse.training.empty import empty_model
from powerhouse.training.guard import Guard
from powerhouse.training.loop import accumulate, clip_gradients, train_step
from powerhouse.training.objectives import causal_language_model
from powerhouse.training.sharding import WholeState
from tiny_run import make_config, random_batch, sharded_model


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gradients_of(configs: list[TrainingConfig], num_ignored: int) -> list[dict[str, Any]]:
    results = []
    for config in configs:
        model, _ = sharded_model(config)
        totals = accumulate(model, causal_language_model, random_batch(num_ignored=num_ignored), config.run)
        gradients = {name: whole(parameter.grad).clone() for name, parameter in model.named_parameters()}
        norm = clip_gradients(model, 0.01)
        clipped = {name: whole(parameter.grad) for name, parameter in model.named_parameters()}
        share = sum(p.to_local().numel() for p in model.parameters()) / sum(p.numel() for p in model.parameters())
        results.append(
            {"loss": totals[0] / totals[1], "gradients": gradients, "norm": norm, "clipped": clipped, "share": share}
        )
    return results


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


MODES: dict[int, list[tuple[dict[str, Any], float]]] = {
    1: [({"micro_batch_rows": 8}, 1.0)],
    2: [
        ({"micro_batch_rows": 4}, 0.5),
        ({"micro_batch_rows": 1}, 0.5),
        ({"micro_batch_rows": 1, "accumulate": "deferred"}, 0.5),
        ({"micro_batch_rows": 1, "workers_per_copy": 1}, 1.0),
    ],
    4: [
        ({"micro_batch_rows": 1, "workers_per_copy": 4}, 0.25),
        ({"micro_batch_rows": 1, "workers_per_copy": 2}, 0.5),
        ({"micro_batch_rows": 1, "workers_per_copy": 2, "accumulate": "deferred"}, 0.5),
    ],
}
"""Number of ranks -> settings of a run, and the share of the model that each rank then keeps."""


@pytest.mark.parametrize("num_ranks", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_loss_gradients_and_clipping_of_every_sharding_are_those_of_one_pass_with_ragged_labels(
    tmp_path: Path, num_ranks: int
) -> None:
    models = [tiny_config(num_hidden_layers=2, tie_word_embeddings=is_tied).model_dump() for is_tied in (True, False)]
    cases = [(make_config(tmp_path, model=model, run=run), run, share) for model in models for run, share in MODES[num_ranks]]
    num_ignored = 37  # all of the first two rows and a part of the third: ranks and micro-batches differ in their counts

    ranks = run_on_ranks(num_ranks, gradients_of, [config for config, _, _ in cases], num_ignored)

    references = [reference(config, num_ignored) for config, _, _ in cases]
    for results in ranks:
        for result, expected, (_, run, share) in zip(results, references, cases, strict=True):
            torch.testing.assert_close(result["loss"].float(), expected["loss"], atol=1e-5, rtol=0)
            assert result["norm"] == pytest.approx(expected["norm"], rel=1e-4)
            assert result["share"] == pytest.approx(share, abs=0.01)
            for kind in ("gradients", "clipped"):
                for name, gradient in expected[kind].items():
                    torch.testing.assert_close(result[kind][name], gradient, atol=1e-6, rtol=1e-4, msg=f"{run} {kind} {name}")


def memory_of_building(config: TrainingConfig) -> tuple[float, float]:
    """The highest resident memory over that before, and the whole model's size in float32, both in MiB."""
    ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: what is freed goes back to the system at once
    whole_mib = sum(parameter.numel() for parameter in empty_model(config).parameters()) * 4 / 2**20
    with tempfile.TemporaryDirectory(
        dir=config.output.parent
    ) as folder:  # what torch needs at its first use is not the model's
        sharded_model(make_config(Path(folder)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    model, _ = sharded_model(config)
    assert model
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before, whole_mib


@pytest.mark.slow
@pytest.mark.parametrize("starts_from_files", [False, True])
def test_no_rank_ever_holds_the_whole_model(tmp_path: Path, starts_from_files: bool) -> None:
    shape = tiny_config(num_hidden_layers=24, hidden_size=512, intermediate_size=1024, head_dim=64, num_attention_heads=8)
    config = make_config(tmp_path, model=shape.model_dump())
    if starts_from_files:
        state = {name: torch.zeros_like(tensor, device="cpu") for name, tensor in empty_model(config).state_dict().items()}
        save_model(tmp_path / "start", shape, state)
        config = read_shape(make_config(tmp_path, model=None, start_from=tmp_path / "start"))

    for used_mib, whole_mib in run_on_ranks(2, memory_of_building, config):
        assert whole_mib > 200
        assert used_mib < 0.75 * whole_mib, "half of it, and a block"


def initial_state(config: TrainingConfig) -> dict[str, Tensor]:
    return dict(WholeState(sharded_model(config)[0]))


@pytest.mark.slow
def test_fresh_weights_do_not_depend_on_the_number_of_ranks(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    alone = Decoder(config.model)
    alone.initialise(config.seed)

    for num_ranks in (1, 2):
        state, *_ = run_on_ranks(num_ranks, initial_state, config)
        assert state.keys() == alone.state_dict().keys()
        for name, tensor in alone.state_dict().items():
            torch.testing.assert_close(state[name], tensor, atol=0, rtol=0)


def types_of_a_bfloat16_step(config: TrainingConfig) -> dict[str, Any]:
    model, optimizer = sharded_model(config)
    seen = set()
    model.blocks()["0"].register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    train_step(0, model, optimizer, Guard(config.optim), causal_language_model, random_batch(), config.run)
    totals = accumulate(model, causal_language_model, random_batch(), config.run)
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

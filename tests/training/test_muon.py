"""Muon beside torch's, and over two ranks."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from distributed import run_on_ranks
from fakes import tiny_decoder
from powerhouse.training.config import TrainingConfig
from powerhouse.training.guard import Guard
from powerhouse.training.loop import train_step
from powerhouse.training.muon import Muon, _rounds, orthogonalise, orthogonalise_shared
from powerhouse.training.objectives import causal_language_model
from powerhouse.training.optim import make_optimizer
from powerhouse.training.settings import OptimConfig
from powerhouse.training.sharding import WholeState, make_mesh
from tiny_run import make_config, random_batch, sharded_model

MUON = {"lr": 0.01, "optimizer": "muon"}


@pytest.mark.parametrize("shape", [(32, 64), (64, 32), (48, 48)])
def test_singular_values_become_about_one_and_singular_vectors_stay(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)

    inside = u.mT @ orthogonalise(matrix) @ v.mT

    assert (inside.diagonal() > 0.3).all()
    assert (inside.diagonal() < 1.3).all()
    assert (inside - inside.diagonal().diag()).abs().max() < 1e-3


def test_matrices_inside_blocks_step_as_torchs_muon_and_all_else_as_its_adamw() -> None:
    config = OptimConfig(lr=0.02, weight_decay=0.1, optimizer="muon")
    ours, theirs = tiny_decoder(), tiny_decoder()
    optimizer = make_optimizer(ours, config)
    names = [name for name, p in theirs.named_parameters() if p.dim() == 2 and ".layers." in name]
    matrices = [theirs.get_parameter(name) for name in names]
    muon = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    rest = [
        {"params": [p], "weight_decay": 0.1 if p.dim() == 2 else 0.0} for n, p in theirs.named_parameters() if n not in names
    ]
    adamw = torch.optim.AdamW(rest, lr=0.02, betas=(config.beta1, config.beta2), eps=config.eps)

    for step in range(3):
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            mine.grad = torch.randn(mine.shape, generator=torch.Generator().manual_seed(step))
            other.grad = mine.grad.clone()
        optimizer.step()
        muon.step()
        adamw.step()

    assert isinstance(optimizer, Muon)
    assert len(names) == 4 * 7
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        tolerance = 2e-3 if name in names else 1e-6  # torch's iterations are in bfloat16
        torch.testing.assert_close(mine, other, atol=tolerance, rtol=0, msg=name)


def trained(config: TrainingConfig) -> dict[str, torch.Tensor]:
    model, optimizer = sharded_model(config)
    for step in range(3):
        train_step(step, model, optimizer, Guard(config.optim), causal_language_model, random_batch(), config.run)
    return dict(WholeState(model))


def shared_and_alone(workers_per_copy: int | None) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Seven matrices of several sizes, cut over the ranks: orthogonalised by one rank each, and by this rank alone."""
    mesh = make_mesh(torch.device("cpu"), workers_per_copy)
    placements = [Replicate()] * (mesh.ndim - 1) + [Shard(0)]
    generator = torch.Generator().manual_seed(0)
    wholes = [torch.randn(5 + i, 16 - 2 * i, generator=generator) for i in range(7)]
    cut = [distribute_tensor(whole, mesh, placements, src_data_rank=None) for whole in wholes]
    done = [matrix for some in _rounds(cut) for matrix in orthogonalise_shared(some)]
    expected = [orthogonalise(matrix.full_tensor()) for matrix in sorted(cut, key=torch.Tensor.numel)]
    assert all(
        matrix.to_local().shape == cut_.to_local().shape
        for matrix, cut_ in zip(done, sorted(cut, key=torch.Tensor.numel), strict=True)
    )
    return [(matrix.full_tensor(), whole) for matrix, whole in zip(done, expected, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_ranks", "workers_per_copy"), [(3, None), (4, 2), (2, 1)], ids=["sharded", "copies", "replicated"]
)
def test_one_rank_for_each_matrix_gives_the_bits_of_every_rank_for_all(num_ranks: int, workers_per_copy: int | None) -> None:
    for found in run_on_ranks(num_ranks, shared_and_alone, workers_per_copy):
        assert len(found) == 7
        assert all(torch.equal(shared, alone) for shared, alone in found)


def num_orthogonalised(config: TrainingConfig) -> tuple[int, int]:
    """Matrices in the blocks, and how many of them this rank has done whole in a step."""
    model, optimizer = sharded_model(config)
    with patch("powerhouse.training.muon.orthogonalise", wraps=orthogonalise) as counted:
        train_step(0, model, optimizer, Guard(config.optim), causal_language_model, random_batch(), config.run)
    return sum(len(group["params"]) for group in optimizer.param_groups if group["is_matrix"]), counted.call_count


@pytest.mark.slow
def test_two_ranks_do_half_of_the_matrices_each(tmp_path: Path) -> None:
    (num_matrices, first), (_, second) = run_on_ranks(2, num_orthogonalised, make_config(tmp_path, optim=MUON))

    assert first == second == num_matrices / 2


@pytest.mark.slow
def test_two_ranks_and_and_two_copies_step_as_one_rank(tmp_path: Path) -> None:
    alone = run_on_ranks(1, trained, make_config(tmp_path, optim=MUON))[0]

    for num_ranks, run in ((2, {}), (4, {"workers_per_copy": 2})):
        together = run_on_ranks(num_ranks, trained, make_config(tmp_path, optim=MUON, run={"micro_batch_rows": 1, **run}))[0]
        for name, tensor in alone.items():
            torch.testing.assert_close(together[name], tensor, atol=2e-5, rtol=0, msg=name)

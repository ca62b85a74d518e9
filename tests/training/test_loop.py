"""Whole runs of the loop over gloo: golden losses, a loss that is no number, what comes out."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers

from distributed import run_on_ranks
from powerhouse.models.hub import load_decoder
from powerhouse.telemetry import read_metrics
from powerhouse.training.checkpoint import whole_steps
from powerhouse.training.config import TrainingConfig
from powerhouse.training.guard import Guard
from powerhouse.training.loop import train_step
from powerhouse.training.objectives import Batch, causal_language_model
from powerhouse.training.watch import METRICS
from tiny_run import SHAPES, losses, make_config, random_batch, run_loop, sharded_model, without_times, write_tokens

GOLDEN = Path(__file__).parents[1] / "golden" / "tiny_losses.json"


@pytest.fixture
def config(tmp_path: Path) -> TrainingConfig:
    write_tokens(tmp_path / "tokens")
    return make_config(tmp_path)


def elsewhere(config: TrainingConfig, name: str, **changes: object) -> TrainingConfig:
    return config.model_copy(update={"output": config.output.with_name(name), **changes})


@pytest.mark.parametrize(("family", "num_ranks"), [("decoder", 1), ("decoder", 2), ("encoder", 1), ("t5", 1)])
def test_the_losses_of_twenty_steps_are_the_golden_ones(config: TrainingConfig, family: str, num_ranks: int) -> None:
    """To 1e-5: other processors sum in another order. What changes them on purpose writes the file anew, by `write_golden`."""
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))["losses"][family]

    assert golden_losses(config, family, num_ranks) == pytest.approx(golden, rel=1e-5)
    assert golden[-1] < golden[0] - 0.5


def golden_losses(config: TrainingConfig, family: str, num_ranks: int = 1) -> list[float]:
    changes = {
        "num_steps": 20,
        "output": config.output.with_name(family),
        "run": {"micro_batch_rows": 2, "checkpoint_every": 20},
    }
    here = TrainingConfig.model_validate(config.model_dump() | {"model": SHAPES[family]} | changes)
    run_on_ranks(num_ranks, run_loop, here)
    return losses(here)


def write_golden() -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_tokens(Path(folder) / "tokens")
        found = {family: golden_losses(make_config(Path(folder)), family) for family in SHAPES}
    what = "losses of 20 steps of tests/training/test_loop.py's tiny models, one rank, float32"
    GOLDEN.write_text(json.dumps({"what": what, "losses": found}, indent=1) + "\n", encoding="utf-8")


@pytest.mark.slow
def test_a_loss_that_is_no_number_stops_every_rank_with_one_error_and_no_checkpoint(config: TrainingConfig) -> None:
    config = config.model_copy(update={"optim": config.optim.model_copy(update={"lr": 1e30, "warmup_steps": 0})})

    messages = run_on_ranks(2, run_loop, config)

    assert len(set(messages)) == 1
    assert messages[0].startswith("TrainingError: step 1: the loss or its gradient is not a number\n  got: loss ")
    assert "gradient norm nan" in messages[0]
    assert "do: lower optim.lr" in messages[0]
    assert whole_steps(config.checkpoints) == []


def float16_steps(config: TrainingConfig, overflowing_step: int) -> list[dict[str, Any]]:
    """Steps of a run in which one rank's gradient overflows once."""
    model, optimizer = sharded_model(config)
    guard, results = Guard(config.optim, is_scaled=True), []
    for step in range(config.num_steps):

        def objective(model: Any, batch: Batch, step: int = step) -> tuple[torch.Tensor, torch.Tensor]:
            loss_sum, num_valid = causal_language_model(model, batch)
            if step == overflowing_step and dist.get_rank() == 1:
                loss_sum.register_hook(lambda gradient: gradient * 1e6)
            return loss_sum, num_valid

        before = [parameter.to_local().detach().clone() for parameter in model.parameters()]
        result = train_step(step, model, optimizer, guard, objective, random_batch(), config.run)
        has_moved = any(not torch.equal(old, new.to_local()) for old, new in zip(before, model.parameters(), strict=True))
        results.append({"verdict": result.verdict, "scale": result.scale, "has_moved": has_moved, "loss": result.loss})
    return results


@pytest.mark.slow
def test_a_float16_overflow_on_one_rank_skips_the_step_on_all_and_the_scale_recovers(tmp_path: Path) -> None:
    optim = {"lr": 0.01, "loss_scale": 64.0, "loss_scale_growth_steps": 3}
    config = make_config(tmp_path, precision="float16", optim=optim, num_steps=8)

    first, second = run_on_ranks(2, float16_steps, config, 2)

    assert first == second
    assert [result["verdict"] for result in first] == ["taken", "taken", "overflow"] + ["taken"] * 5
    assert [result["has_moved"] for result in first] == [True, True, False] + [True] * 5
    assert [result["scale"] for result in first] == [64, 64, 64, 32, 32, 32, 64, 64]
    assert first[-1]["loss"] < first[0]["loss"] - 1


@pytest.mark.slow
def test_float16_and_muon_and_skipped_spikes_resume_to_the_bit(config: TrainingConfig) -> None:
    optim = config.optim.model_copy(
        update={"optimizer": "muon", "loss_scale": 2.0**26, "loss_scale_growth_steps": 2, "skip_spikes_sigma": 1.0}
        | {"spike_window_steps": 4}
    )
    config = config.model_copy(update={"optim": optim, "precision": "float16", "num_steps": 24})
    config = config.model_copy(update={"run": config.run.model_copy(update={"checkpoint_every": 8})})
    whole, stopped = elsewhere(config, "whole"), elsewhere(config, "stopped")
    run_on_ranks(2, run_loop, whole)

    run_on_ranks(2, run_loop, stopped, 20)
    assert run_on_ranks(2, run_loop, stopped) == [None, None]

    rows = [without_times(read_metrics(run.output / METRICS)) for run in (whole, stopped)]
    assert rows[0] == rows[1]
    skipped = [row for row in rows[0] if row["skipped"]]
    assert rows[0][0] in skipped, "the first scale is far too high"
    assert any("grad_norm" in row for row in skipped), "a spike"
    assert any("grad_norm" not in row for row in rows[0][16:]), "an overflow, after the scale has grown again"


@pytest.mark.slow
def test_transformers_loads_what_was_trained_and_gives_its_logits(config: TrainingConfig) -> None:
    run_on_ranks(2, run_loop, config)
    ids_BT = torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(0))

    theirs = transformers.AutoModelForCausalLM.from_pretrained(config.output, dtype=torch.float32)

    ours = load_decoder(config.output)(ids_BT, torch.arange(16))
    torch.testing.assert_close(ours, theirs(ids_BT).logits, atol=1e-4, rtol=0)

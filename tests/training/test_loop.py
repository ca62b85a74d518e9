"""Whole runs of the loop over gloo: golden losses, a loss that is no number, what comes out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from distributed import run_on_ranks
from powerhouse.models.hub import load_decoder
from powerhouse.training.checkpoint import whole_steps
from powerhouse.training.config import TrainingConfig
from tiny_run import losses, make_config, run_loop, write_tokens

GOLDEN = Path(__file__).parents[1] / "golden" / "tiny_losses.json"


@pytest.fixture
def config(tmp_path: Path) -> TrainingConfig:
    write_tokens(tmp_path / "tokens")
    return make_config(tmp_path)


def elsewhere(config: TrainingConfig, name: str, **changes: object) -> TrainingConfig:
    return config.model_copy(update={"output": config.output.with_name(name), **changes})


def test_the_losses_are_the_golden_ones_for_one_and_for_two_ranks(config: TrainingConfig) -> None:
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))

    for num_ranks in (1, 2):
        here = elsewhere(config, f"model-{num_ranks}")
        run_on_ranks(num_ranks, run_loop, here)
        assert losses(here) == pytest.approx(golden["losses"], abs=golden["tolerance"])
    assert golden["losses"][-1] < golden["losses"][0] - 1


@pytest.mark.slow
def test_a_loss_that_is_no_number_stops_every_rank_with_one_error_and_no_checkpoint(config: TrainingConfig) -> None:
    config = config.model_copy(update={"optim": config.optim.model_copy(update={"lr": 1e30, "warmup_steps": 0})})

    messages = run_on_ranks(2, run_loop, config)

    assert len(set(messages)) == 1
    assert messages[0].startswith("TrainingError: step 1: the loss or its gradient is not a number\n  got: loss ")
    assert "gradient norm nan" in messages[0]
    assert "do: lower optim.lr" in messages[0]
    assert whole_steps(config.checkpoints) == []


@pytest.mark.slow
def test_transformers_loads_what_was_trained_and_gives_its_logits(config: TrainingConfig) -> None:
    run_on_ranks(2, run_loop, config)
    ids_BT = torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(0))

    theirs = transformers.AutoModelForCausalLM.from_pretrained(config.output, dtype=torch.float32)

    ours = load_decoder(config.output)(ids_BT, torch.arange(16))
    torch.testing.assert_close(ours, theirs(ids_BT).logits, atol=1e-4, rtol=0)

"""Whole runs of the loop over gloo: golden losses, checkpoints, resuming, a loss that is no number."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers

from distributed import run_on_ranks
from powerhouse.corpora.shards import TokenRows
from powerhouse.errors import ArtifactError, TrainingError
from powerhouse.models.hub import load_decoder, save_model
from powerhouse.telemetry import read_metrics
from powerhouse.tokenizer import Tokenizer
from powerhouse.training import checkpoint
from powerhouse.training.config import TrainingConfig
from powerhouse.training.data import RowOrder, places_of
from powerhouse.training.loop import CHECKPOINTS, train
from powerhouse.training.methods import method_of
from powerhouse.training.objectives import Batch
from powerhouse.training.sharding import gather_state
from powerhouse.training.watch import METRICS, Watch
from tiny_run import make_config, sharded_model, write_tokens

GOLDEN = Path(__file__).parents[1] / "golden" / "tiny_losses.json"


def run_loop(config: TrainingConfig, stop_after: int | None = None) -> str | None:
    """Train on this rank, resuming where a checkpoint is; `stop_after` batches the data ends, as if the run was killed."""
    config.output.mkdir(parents=True, exist_ok=True)
    model, optimizer = sharded_model(config)
    start = checkpoint.latest_step(config.output / CHECKPOINTS)
    dist.barrier()
    try:
        if start:
            checkpoint.load(config.output / CHECKPOINTS, start, model, optimizer)
        batches = read_batches(config, start, stop_after)
        with Watch(config.output, start, config.num_steps) as watch:
            train(model, optimizer, method_of(config.model).objective, batches, config, config.output, start, watch)
    except (StopIteration, TrainingError, ArtifactError) as error:
        return f"{type(error).__name__}: {error}"
    state = gather_state(model)
    if dist.get_rank() == 0:
        save_model(config.output, config.model, state)
    return None


def read_batches(config: TrainingConfig, start: int, stop_after: int | None) -> Iterator[Batch]:
    method, rows = method_of(config.shape), TokenRows(config.tokens / "rows")
    noise = config.make_noise(Tokenizer.load(config.tokens), rows.row_length)
    order = RowOrder(len(rows), config.seed)
    for step in range(start, config.num_steps if stop_after is None else start + stop_after):
        places = places_of(step, dist.get_rank(), dist.get_world_size(), config.global_batch_rows)
        yield method.batch(rows.take(order.rows_at(places)), places, noise, torch.device("cpu"))


def losses(config: TrainingConfig) -> list[float]:
    rows = read_metrics(config.output / METRICS)
    assert [row["step"] for row in rows] == list(range(config.num_steps))
    return [row["loss"] for row in rows]


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
def test_a_stopped_run_resumes_at_its_checkpoint_with_the_same_losses_and_weights_to_the_bit(config: TrainingConfig) -> None:
    whole, stopped = elsewhere(config, "whole"), elsewhere(config, "stopped")
    run_on_ranks(2, run_loop, whole)

    assert run_on_ranks(2, run_loop, stopped, 5) == ["StopIteration: "] * 2
    assert checkpoint.saved_steps(stopped.output / CHECKPOINTS) == [4]
    assert run_on_ranks(2, run_loop, stopped) == [None, None]

    assert losses(stopped) == losses(whole)
    expected, got = load_decoder(whole.output).state_dict(), load_decoder(stopped.output).state_dict()
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_run_resumes_with_another_number_of_ranks(config: TrainingConfig, before: int, after: int) -> None:
    whole, moved = elsewhere(config, "whole"), elsewhere(config, "moved")
    run_on_ranks(1, run_loop, whole)

    run_on_ranks(before, run_loop, moved, 5)
    assert run_on_ranks(after, run_loop, moved) == [None] * after

    assert losses(moved) == pytest.approx(losses(whole), abs=1e-5)


@pytest.mark.slow
def test_a_checkpoint_that_was_not_finished_is_not_taken_for_one(config: TrainingConfig) -> None:
    run_on_ranks(2, run_loop, config, 5)
    folder = config.output / CHECKPOINTS
    shutil.copytree(folder / "step_00000004", folder / "step_00000006.partial")
    (folder / "step_00000006.partial" / ".metadata").unlink()

    assert checkpoint.latest_step(folder) == 4
    assert run_on_ranks(2, run_loop, config) == [None, None]
    assert [item.name for item in folder.iterdir()] == ["step_00000006"]


@pytest.mark.slow
def test_a_damaged_checkpoint_is_one_clear_error(config: TrainingConfig) -> None:
    run_on_ranks(2, run_loop, config, 5)
    for shard_file in (config.output / CHECKPOINTS / "step_00000004").glob("*.distcp"):
        shard_file.write_bytes(shard_file.read_bytes()[:100])

    messages = run_on_ranks(2, run_loop, config)

    assert all("step_00000004: damaged checkpoint" in message and "do: delete it" in message for message in messages)


@pytest.mark.slow
def test_only_the_newest_checkpoints_are_kept(config: TrainingConfig) -> None:
    run = config.run.model_copy(update={"checkpoint_every": 1, "keep_checkpoints": 2})
    config = config.model_copy(update={"run": run})
    run_on_ranks(1, run_loop, config)

    assert checkpoint.saved_steps(config.output / CHECKPOINTS) == [5, 6]


@pytest.mark.slow
def test_a_loss_that_is_no_number_stops_every_rank_with_one_error_and_no_checkpoint(config: TrainingConfig) -> None:
    config = config.model_copy(update={"optim": config.optim.model_copy(update={"lr": 1e30, "warmup_steps": 0})})

    messages = run_on_ranks(2, run_loop, config)

    assert len(set(messages)) == 1
    assert messages[0].startswith("TrainingError: step 1: the loss or its gradient is not a number\n  got: loss ")
    assert "gradient norm nan" in messages[0]
    assert "do: lower optim.lr" in messages[0]
    assert checkpoint.saved_steps(config.output / CHECKPOINTS) == []


@pytest.mark.slow
def test_transformers_loads_what_was_trained_and_gives_its_logits(config: TrainingConfig) -> None:
    run_on_ranks(2, run_loop, config)
    ids_BT = torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(0))

    theirs = transformers.AutoModelForCausalLM.from_pretrained(config.output, dtype=torch.float32)

    ours = load_decoder(config.output)(ids_BT, torch.arange(16))
    torch.testing.assert_close(ours, theirs(ids_BT).logits, atol=1e-4, rtol=0)

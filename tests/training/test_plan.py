"""A plan of a run: its figures, what it refuses, and the presets."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from powerhouse.config import load
from powerhouse.errors import ConfigError
from powerhouse.training.plan import PlanConfig, make_plan, plan_training
from tiny_run import make_config, write_tokens

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "jobs" / "configs"


def plan_config(folder: Path, **changes: object) -> PlanConfig:
    values = make_config(folder).model_dump(mode="json", exclude={"noise"}) | changes
    return PlanConfig.model_validate(values)


def test_a_plan_of_the_demo_says_all_that_a_run_takes(tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens")

    text = plan_training(plan_config(tmp_path))

    lines = {line[:14].strip(): line[14:] for line in text.splitlines()}
    assert lines["parameters"].startswith("28,192, of which 28,192 are trained")
    assert lines["tokens"] == "768 in rows of 16, 1.20 times the 40 rows there are"
    assert lines["steps"] == "6 of 8 rows: 2 workers x 2 micro-batches x 2 rows"
    assert list(lines) == [
        "parameters", "tokens", "steps", "FLOPs", "memory", "weights", "gradients", "optimizer", "gathered", "activations",
        "peak", "time",
    ]  # fmt: skip
    assert "an MFU of 40% (plan.mfu)" in lines["time"]


def test_time_falls_with_workers_and_with_mfu(tmp_path: Path) -> None:
    plan = make_plan(plan_config(tmp_path), row_length=17)

    assert plan.seconds(100, 2, 0.4) == pytest.approx(plan.seconds(100, 4, 0.2))
    assert plan.seconds(100, 2, 0.4) * plan.peak.flops_per_s * 2 * 0.4 == pytest.approx(100 * plan.flops.total)


PRESETS = [("135m.yaml", 1), ("135m.yaml", 16), ("1b.yaml", 1), ("1b.yaml", 16), ("8b.yaml", 4), ("8b.yaml", 16)]


@pytest.mark.parametrize(("name", "num_gpus"), PRESETS)
def test_a_preset_fits_on_as_many_gpus_as_it_says(name: str, num_gpus: int) -> None:
    config = load(PlanConfig, CONFIGS / name, [f"run.num_workers={num_gpus}", "plan.device=H100", "plan.row_length=4097"])

    text = plan_training(config)

    assert f"{num_gpus} workers x" in text
    assert "time" in text


def test_every_preset_of_a_gpu_is_planned_here() -> None:
    presets = {path.name for path in CONFIGS.glob("*.yaml") if "\n  use_gpu: true" in path.read_text()}

    assert presets == {name for name, _ in PRESETS}


LONG = ["run.use_gpu=true", "run.num_workers=1", "plan.device=L4", "plan.row_length=100001", "global_batch_rows=64"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["run.micro_batch_rows=64"], "the run does not fit into the memory of a worker (L4 of 24 GB)\n  got: "),
        (
            ["run.micro_batch_rows=64"],
            "less 8% for what torch does not count\n  do: run.micro_batch_rows=1 (",
        ),
        (["run.micro_batch_rows=1", "plan.row_length=4000001"], "do: a smaller model, shorter rows, or GPUs with more memory"),
        (["plan.device=H300"], "plan.device: the GPU of each worker\n  got: H300\n  allowed: B200, H200"),
        (["plan.device=null"], "plan.device: the GPU of each worker\n  allowed: B200"),
        (["plan.row_length=null"], "is not there\n  do: make them first, or give plan.row_length=NUMBER"),
        (["run.use_gpu=false"], "plan.device: a GPU, but run.use_gpu is off"),
    ],
)
def test_what_cannot_be_planned_or_cannot_fit_is_one_error(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_training(load(PlanConfig, CONFIGS / "tiny.yaml", [*LONG, *overrides]))

    assert message in str(caught.value)


@pytest.mark.slow
def test_a_change_that_the_error_proposes_fits() -> None:
    given = ["plan.device=H100", "plan.row_length=4097", "run.num_workers=1"]
    with pytest.raises(ConfigError, match=r"run\.recompute=full run\.num_workers=4") as caught:
        plan_training(load(PlanConfig, CONFIGS / "8b.yaml", given))
    proposed = str(caught.value).split("do: ")[1].split(" (")[0].split()

    assert "steps" in plan_training(load(PlanConfig, CONFIGS / "8b.yaml", [*given, *proposed]))


@pytest.mark.slow
def test_the_job_prints_the_plan_and_leaves_nothing(tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens")
    path = tmp_path / "run.yaml"
    path.write_text(make_config(tmp_path).model_dump_json(exclude={"noise"}))

    done = subprocess.run(
        [sys.executable, ROOT / "jobs" / "plan_training.py", "--config", path], capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("parameters")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["run.yaml", "tokens"]

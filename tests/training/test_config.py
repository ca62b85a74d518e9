from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fakes import tiny_config, tiny_tokenizer
from powerhouse.config import load, validate
from powerhouse.errors import ConfigError
from powerhouse.training.config import TrainingConfig, check, check_batch
from tiny_run import make_config, write_tokens

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run": {"num_workers": 3}}, r"run\.num_workers: .*\n  got: 3 with .*\n  allowed: 1, 2, 4$"),
        (
            {"run": {"num_workers": 4, "workers_per_copy": 3}},
            r"run\.workers_per_copy: .*\n  got: 3 with .*=4\n  allowed: 1, 2, 4$",
        ),
        (
            {"run": {"checkpoints": "gopher://host/a"}},
            r"run\.checkpoints: .*\n  got: gopher://host/a .*\n  allowed: a path, s3://",
        ),
        ({"run": {"num_workers": 4, "min_workers": 3}}, r"run\.min_workers: .*\n  got: 3 with .*\n  allowed: 1, 2, 4$"),
        ({"run": {"micro_batch_rows": 3}}, r"run\.micro_batch_rows: .*\n  got: 3 with .*\n  allowed: 1, 2, 4, 8$"),
        ({"model": tiny_config(vocab_size=299).model_dump()}, r"model\.vocab_size: .*\n  got: 299\n  allowed: 300 or more"),
        (
            {"model": tiny_config(max_position_embeddings=15).model_dump()},
            r"model\.max_position_embeddings: .*\n  got: 15\n  allowed: 16 or more",
        ),
    ],
)
def test_settings_that_do_not_fit_name_what_would(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    tokens = write_tokens(tmp_path / "tokens")

    with pytest.raises(ConfigError, match=message):
        check(make_config(tmp_path, **changes), tokens)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("optim", {"lr": 0}, r"optim\.lr: got 0; allowed: input should be greater than 0"),
        ("optim", {"lr": 1, "learning_rate": 1}, r"optim\.learning_rate: unknown key"),
        (
            "precision",
            "int8",
            "precision: got 'int8'; allowed: input should be 'auto', 'float32', 'bfloat16', 'float16' or 'float8'",
        ),
        ("run", {"micro_batch_rows": 1, "min_workers": 2}, "run: .*; allowed: min_workers up to num_workers, which is 1"),
        ("num_steps", 0, "num_steps: got 0; allowed: input should be greater than 0"),
        ("tokens", None, "tokens: got None"),
    ],
)
def test_a_value_out_of_range_is_named_with_its_path(tmp_path: Path, key: str, value: object, message: str) -> None:
    values = make_config(tmp_path).model_dump() | {key: value}

    with pytest.raises(ConfigError, match=message):
        validate(TrainingConfig, values, "test")


def test_settings_that_fit_pass(tmp_path: Path) -> None:
    check(make_config(tmp_path), write_tokens(tmp_path / "tokens"))


@pytest.mark.parametrize("name", ["tiny_encoder", "tiny_t5"])
def test_a_preset_fits_the_tokens_of_the_demo(tmp_path: Path, name: str) -> None:
    config = load(TrainingConfig, REPOSITORY / "jobs" / "configs" / f"{name}.yaml")
    noise = config.make_noise(tiny_tokenizer(), 257)

    assert config.shape.vocab_size == 4096 + len(noise.special_tokens)
    assert getattr(config.model, "max_position_embeddings", 257) == 257


def test_the_demo_settings_are_valid_and_accumulate_over_two_micro_batches() -> None:
    config = load(TrainingConfig, REPOSITORY / "jobs" / "configs" / "tiny.yaml")

    assert config.rows_per_worker == 2 * config.run.micro_batch_rows


@pytest.mark.parametrize(
    ("most", "fewest", "per_copy", "message"),
    [
        (3, 2, None, r"run\.num_workers: .*\n  got: 3 with global_batch_rows=16 .*\n  allowed: 1, 2, 4, 8$"),
        (8, 3, None, r"run\.min_workers: .*\n  got: 3 with global_batch_rows=16 .*\n  allowed: 1, 2, 4, 8$"),
        (4, 1, 2, r"run\.workers_per_copy: .*\n  got: 2 with run\.min_workers=1"),
    ],
)
def test_the_most_and_the_fewest_workers_divide_the_batch(most: int, fewest: int, per_copy: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_batch(16, 2, {"run.num_workers": most, "run.min_workers": fewest}, per_copy)
    check_batch(16, 2, {"run.num_workers": 8, "run.min_workers": 2}, 2)


@pytest.mark.parametrize(
    ("rows", "micro", "most", "fewest", "per_copy"), [(24, 2, 12, 1, None), (48, 1, 16, 4, 4), (30, 1, 15, 3, 3)]
)
def test_of_every_number_of_workers_between_them_enough_share_the_batch(
    tmp_path: Path, rows: int, micro: int, most: int, fewest: int, per_copy: int | None
) -> None:
    run = {"num_workers": most, "min_workers": fewest, "micro_batch_rows": micro, "workers_per_copy": per_copy}
    config = make_config(tmp_path, global_batch_rows=rows, run=run)
    check(config, write_tokens(tmp_path / "tokens"))

    used = [config.usable_workers(number) for number in range(fewest, most + 1)]
    assert used == sorted(used)
    assert (used[0], used[-1]) == (fewest, most)
    assert all(config.can_share(number) for number in used)
    assert set(used) == {number for number in range(fewest, most + 1) if config.can_share(number)}

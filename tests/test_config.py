from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import Field

from powerhouse.config import Config, StoragePath, describe, load, parse_command_line, storage_root, validate
from powerhouse.errors import ConfigError


class Optim(Config):
    lr: float = Field(default=1e-3, gt=0)
    """Step size."""


class Job(Config):
    steps: int = Field(ge=1)
    """How many."""
    optim: Optim = Optim()
    """Optimiser."""
    groups: tuple[Optim, ...] = ()
    """More."""
    output: StoragePath = Path("out")
    """Where."""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    return path


def test_overrides_are_laid_over_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "steps: 3\noptim: {lr: 0.1}\n")

    assert load(Job, path, ["optim.lr=3e-4", "steps=5"]) == Job(steps=5, optim=Optim(lr=3e-4))


def test_an_override_may_name_a_group_that_the_file_leaves_out() -> None:
    assert load(Job, None, ["steps=1", "optim.lr=2"]).optim.lr == 2


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("steps: 3\nstep: 4", [], "job.yaml: step: unknown key; did you mean steps?"),
        ("steps: 3\noptim: {learning: 4}", [], "job.yaml: optim.learning: unknown key allowed: lr"),
        ("steps: 3\ngroups: [{l: 4}]", [], "groups.0.l: unknown key"),
        ("steps: 0", [], "steps: got 0; allowed: input should be greater than or equal to 1"),
        ("steps: 3", ["optim.lr=-1"], "optim.lr: got -1; allowed: input should be greater than 0"),
        ("optim: {lr: 1}", [], "steps: missing, and it has no default"),
        ("steps: many", [], "steps: got 'many'; allowed: input should be a valid integer"),
        ("- 1", [], "job.yaml: not a mapping"),
        ("a: [", [], "job.yaml: not a YAML file"),
        ("steps: 3", ["optim"], "not an override\n  got: 'optim'\n  allowed: key=value"),
        ("steps: 3", ["steps.x=1"], "steps.x: steps is not a group of settings"),
    ],
)
def test_a_mistake_is_one_error_that_names_file_path_got_and_allowed(
    tmp_path: Path, text: str, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(Job, write(tmp_path, text), overrides)

    assert message in str(caught.value)


def test_every_mistake_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(Job, {"steps": 0, "optim": {"lr": 0}}, "here")

    assert [line.split(": got")[0] for line in str(caught.value).splitlines()] == ["here: steps", "here: optim.lr"]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such config file"):
        load(Job, tmp_path / "none.yaml")


def test_a_relative_data_path_lies_under_the_storage_root(tmp_path: Path) -> None:
    assert storage_root() == tmp_path
    assert Job(steps=1).output == tmp_path / "out"
    assert Job(steps=1, output=Path("/data/out")).output == Path("/data/out")


def test_help_shows_the_text_under_each_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_command_line(Job, ["--help"], "Does a job.")

    assert "optim.lr  (default 0.001)\n      Step size." in describe(Job)
    assert "steps  (required)\n      How many." in capsys.readouterr().out

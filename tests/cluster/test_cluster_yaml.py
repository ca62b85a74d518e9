"""`cluster.yaml` is a file that Ray's own launcher accepts, with a group for every kind of work."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from powerhouse.config import load
from powerhouse.training.config import TrainingConfig

ROOT = Path(__file__).parents[2]


def read() -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    return values


def test_rays_own_schema_accepts_it() -> None:
    prepared = prepare_config(read())
    validate_config(prepared)

    assert prepared["head_node_type"] == "head"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda values: values.update(max_wokers=3), "max_wokers"),
        (lambda values: values.update(head_node_type="nose"), "head_node_type"),
        (lambda values: values["available_node_types"]["train"]["resources"].update(GPU="eight"), "eight"),
    ],
)
def test_rays_schema_refuses_a_spoiled_one(spoil: Callable[[dict[str, Any]], None], message: str) -> None:
    values = read()
    spoil(values)

    with pytest.raises(Exception, match=message):
        validate_config(prepare_config(values))


def test_each_group_has_its_own_resource_and_the_head_has_none() -> None:
    groups = read()["available_node_types"]

    for name in ("data", "train", "serve"):
        assert [group for group, node in groups.items() if name in node["resources"]] == [name]
    assert groups["head"]["resources"] == {"CPU": 0, "GPU": 0}
    assert [name for name, node in groups.items() if node["resources"].get("GPU")] == ["train", "serve"]


def test_the_files_its_usage_names_exist() -> None:
    header = (ROOT / "cluster.yaml").read_text().split("\ncluster_name:")[0]
    named = re.findall(r"\b(?:jobs|serve_apps)/[\w./]+\.(?:py|yaml)", header)

    assert len(named) >= 4
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_the_settings_its_usage_gives_to_a_job_are_settings() -> None:
    header = (ROOT / "cluster.yaml").read_text().split("\ncluster_name:")[0]
    config, overrides = re.findall(r"train_model.py --config (\S+) (.+)", header)[0]

    assert load(TrainingConfig, ROOT / config, overrides.split()).run.use_gpu

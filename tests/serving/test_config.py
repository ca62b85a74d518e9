from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from powerhouse.config import storage_root, validate
from powerhouse.errors import ConfigError
from powerhouse.serving.config import ServingConfig, to_actor_options

CHAT_YAML = Path(__file__).parents[2] / "serve_apps" / "chat.yaml"


def test_a_replica_of_three_stages_asks_for_four_bundles() -> None:
    config = ServingConfig.model_validate(
        {"model": "m", "model_name": "m", "engine": {"num_stages": 3}, "stage_resources": {"GPU": 1, "serve": 0.001}}
    )
    assert config.bundles == [{"CPU": 1, "serve": 0.001}] + [{"GPU": 1, "serve": 0.001}] * 3


def test_a_single_stage_lives_in_the_replica_and_adds_to_its_bundle() -> None:
    config = ServingConfig.model_validate(
        {"model": "m", "model_name": "m", "replica_resources": {"CPU": 1}, "stage_resources": {"CPU": 2, "GPU": 1}}
    )
    assert config.bundles == [{"CPU": 3, "GPU": 1}]


def test_a_bundle_is_said_in_the_words_of_an_actors_options() -> None:
    options = to_actor_options({"CPU": 0.5, "serve": 0.001})
    assert options == {"num_cpus": 0.5, "num_gpus": 0, "resources": {"serve": 0.001}}


def test_the_shipped_application_is_valid_and_fits_twice_into_eight_cpus() -> None:
    application = yaml.safe_load(CHAT_YAML.read_text(encoding="utf-8"))["applications"][0]
    config = validate(ServingConfig, application["args"], "chat.yaml")
    max_replicas = application["deployments"][0]["autoscaling_config"]["max_replicas"]
    assert config.engine.num_stages == max_replicas == 2
    assert config.model == storage_root() / "demo/model"
    assert max_replicas * sum(bundle["CPU"] for bundle in config.bundles) <= 4


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({}, "args: model: missing"),
        ({"model": "m", "model_name": ""}, "args: model_name: got ''; allowed:"),
        ({"model": "m", "model_name": "m", "modle": 1}, "args: modle: unknown key; did you mean model?"),
        ({"model": "m", "model_name": "m", "engine": {"num_stage": 2}}, "args: engine.num_stage: unknown key"),
        (
            {"model": "m", "model_name": "m", "engine": {"adapters": {"m": "a"}}},
            "names of engine.adapters other than model_name, not 'm' for both",
        ),
        ({"model": "m", "model_name": "m", "startup_timeout_s": 0}, "startup_timeout_s: got 0; allowed:"),
    ],
)  # fmt: skip
def test_a_mistake_in_the_args_is_one_clear_error(args: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(ServingConfig, args, "args")
    assert message in str(caught.value)

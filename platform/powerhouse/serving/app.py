"""The Serve application: what `import_path: powerhouse.serving.app:build` of a Serve file names. [Ray]"""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve.config import BackpressureConfig
from ray.serve.exceptions import RayServeException

from powerhouse.config import validate
from powerhouse.engine.adapters import load_adapters
from powerhouse.errors import PowerhouseError
from powerhouse.models.hub import read_config
from powerhouse.serving.api import RETRY_AFTER_S
from powerhouse.serving.config import ServingConfig, to_actor_options
from powerhouse.serving.replica import PipelineReplica
from powerhouse.tokenizer import Tokenizer

# What a Serve file's `deployments` may override. A generation may take minutes, so a replica that is to stop has them.
_DEFAULTS: dict[str, Any] = {
    "name": "PipelineReplica",
    "max_queued_requests": 128,
    "backpressure_config": BackpressureConfig(status_code=429, retry_after_s=RETRY_AFTER_S),
    "graceful_shutdown_timeout_s": 300,
    "graceful_shutdown_wait_loop_s": 0.5,
    "health_check_period_s": 2,
    "health_check_timeout_s": 30,
}


def build(args: dict[str, Any]) -> serve.Application:
    """Make the application from the `args` of a Serve file: the fields of `ServingConfig`.

    The directories of the model and of its adapters are checked here, before Serve touches a replica: a bad one fails the
    deployment once and at once, and leaves what was deployed before it running.

    Raises:
        RayServeException: a field is unknown, missing or out of range (ConfigError), or the directory of the model or of an
            adapter is missing or damaged (ModelFormatError). Serve shows the message of this error alone; any other it
            tries three times more, and shows with its traceback.
    """
    try:
        config = _checked(args)
    except PowerhouseError as error:
        raise RayServeException(f"{type(error).__name__}: {error}") from error
    bundles = config.bundles
    deployment = serve.deployment(
        serve.ingress()(PipelineReplica),
        placement_group_bundles=bundles,
        ray_actor_options=to_actor_options(bundles[0]),
        # All that the engine can hold, running and waiting; Serve's own queue comes after it.
        max_ongoing_requests=config.engine.max_num_seqs + config.engine.max_waiting_requests,
        **_DEFAULTS,
    )
    return deployment.bind(config)


def _checked(args: dict[str, Any]) -> ServingConfig:
    config = validate(ServingConfig, args, "args of the Serve application")
    read_config(config.model)
    load_adapters(config.model, list(config.engine.adapters.values()))
    Tokenizer.load(config.model)
    return config

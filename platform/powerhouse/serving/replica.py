"""One replica of the endpoint = one pipeline, in the placement group that Serve made for it. [Ray]

Bundle 0 holds this process: HTTP, tokenizer, scheduler. Bundle i holds stage i - 1. When the replica dies, so does its
group and with it the stages; when a stage dies, the health check fails and Serve replaces the replica.
"""

from __future__ import annotations

import ray
from fastapi import FastAPI

from powerhouse.engine import Engine, PipelineRunner
from powerhouse.engine.streaming import EngineLoop
from powerhouse.models.hub import read_config
from powerhouse.serving.api import make_api
from powerhouse.serving.config import ServingConfig
from powerhouse.serving.metrics import make_recorder
from powerhouse.serving.stage_actor import Stages
from powerhouse.tokenizer import Tokenizer


class PipelineReplica:
    def __init__(self, config: ServingConfig) -> None:
        self._config = config
        self._stages: Stages | None = None
        engine = Engine.from_directory(config.model, config.engine) if config.engine.num_stages == 1 else self._start()
        self._engine_loop = EngineLoop(engine, make_recorder(config.engine.num_stages))

    def __serve_build_asgi_app__(self) -> FastAPI:
        return make_api(self._engine_loop, self._config.model_name)

    def check_health(self) -> None:
        """Raise if the engine or a stage has ended; Serve calls this every `health_check_period_s`."""
        self._engine_loop.check()
        if self._stages:
            self._stages.check()

    def __del__(self) -> None:  # Serve calls it when the requests under way have ended
        if hasattr(self, "_engine_loop"):
            self._engine_loop.stop()

    def _start(self) -> Engine:
        config = self._config
        model_config, tokenizer = read_config(config.model), Tokenizer.load(config.model)
        runner = PipelineRunner.listen(config.engine.num_stages, host=ray.util.get_node_ip_address())
        group = ray.util.get_current_placement_group()
        self._stages = Stages.start(runner, config.model, config.engine, group, config.stage_resources)
        try:
            runner.wait_ready(config.startup_timeout_s, self._stages.check)
        except Exception:
            runner.close()
            raise
        return Engine(model_config, tokenizer, config.engine, runner)

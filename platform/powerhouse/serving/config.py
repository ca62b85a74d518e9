"""What a Serve application file says under `args`, and the bundles that follow from it."""

from __future__ import annotations

from collections import Counter
from typing import Any

from pydantic import Field, model_validator

from powerhouse.config import Config, StoragePath
from powerhouse.engine import EngineConfig

Resources = dict[str, float]


class ServingConfig(Config):
    """One model behind one endpoint; every replica is a pipeline of `engine.num_stages` stages."""

    model: StoragePath
    """Model directory: config.json, model.safetensors, tokenizer.json."""
    model_name: str = Field(min_length=1)
    """The name that requests give as `model`; that of an adapter of `engine.adapters` asks for the model with it."""
    engine: EngineConfig = EngineConfig()
    """Batching, cache, precision and number of stages of one replica."""
    replica_resources: Resources = Field(default={"CPU": 1, "serve": 0.001})
    """What Ray sets aside for a replica's HTTP, tokenizer and scheduler."""
    stage_resources: Resources = Field(default={"CPU": 1, "serve": 0.001})
    """What Ray sets aside for each stage; {"GPU": 1, "serve": 0.001} puts it on a GPU."""
    startup_timeout_s: float = Field(default=300, gt=0)
    """How long the stages of a replica may take to load their layers."""

    @model_validator(mode="after")
    def _one_model_to_a_name(self) -> ServingConfig:
        if self.model_name in self.engine.adapters:
            raise ValueError(f"names of engine.adapters other than model_name, not {self.model_name!r} for both")
        return self

    @property
    def bundles(self) -> list[Resources]:
        """The replica's placement group: bundle 0 is the replica, bundle i stage i-1; one stage lives in the replica."""
        if self.engine.num_stages == 1:
            return [dict(Counter(self.replica_resources) + Counter(self.stage_resources))]
        return [self.replica_resources, *[self.stage_resources] * self.engine.num_stages]


def to_actor_options(resources: Resources) -> dict[str, Any]:
    """Say a bundle in the words of an actor's options."""
    custom = {name: amount for name, amount in resources.items() if name not in ("CPU", "GPU")}
    return {"num_cpus": resources.get("CPU", 0), "num_gpus": resources.get("GPU", 0), "resources": custom}

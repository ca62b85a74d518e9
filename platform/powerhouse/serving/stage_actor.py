"""The actor around one pipeline stage. [Ray]

It is placed and watched by Ray and never called per token: one call of `run` is its whole life, and the call's ObjectRef
is done when the stage is.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from powerhouse.engine import EngineConfig, PipelineRunner, run_stage
from powerhouse.errors import EngineError
from powerhouse.serving.config import Resources, to_actor_options


class StageActor:
    def run(self, *args: Any) -> None:
        """Serve one stage until the driver ends it or is gone; see `engine.run_stage`."""
        run_stage(*args)


@dataclass(frozen=True)
class Stages:
    """The stage actors of one replica; when this is dropped, so are they."""

    actors: list[Any]
    sentinels: list[Any]
    """ObjectRefs of `run`: done when a stage has ended."""

    @classmethod
    def start(
        cls, runner: PipelineRunner, model: Path, config: EngineConfig, group: PlacementGroup, resources: Resources
    ) -> Stages:
        """Start stage i in bundle i + 1 of the group; it then connects to the runner."""
        actor_class = ray.remote(StageActor)
        actors, sentinels = [], []
        for rank in range(config.num_stages):
            strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank + 1)
            actor = actor_class.options(scheduling_strategy=strategy, **to_actor_options(resources)).remote()
            actors.append(actor)
            sentinels.append(
                actor.run.remote(rank, config.num_stages, model, config, runner.address, runner.store_port, runner.secret)
            )
        return cls(actors, sentinels)

    def check(self, wait_s: float = 0) -> None:
        """Raise what ended a stage, if one ends within `wait_s`.

        Raises:
            EngineError: it ended without an error of its own, or its process died.
        """
        ended, _ = ray.wait(self.sentinels, timeout=wait_s)
        if ended:
            ray.get(ended)
            raise EngineError("a pipeline stage has ended", got=f"stage {self.sentinels.index(ended[0])}")

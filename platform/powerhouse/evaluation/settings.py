"""What `jobs/evaluate_model.py` is told."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from powerhouse.config import Config, StoragePath
from powerhouse.device import DeviceName, DtypeName
from powerhouse.evaluation.endpoint import EndpointConfig
from powerhouse.evaluation.tasks import Task


class PoolConfig(Config):
    """How much of the cluster the work takes."""

    num_actors: int = Field(default=1, gt=0)
    """Processes that work; each holds a copy of the model."""
    cpus_per_actor: float = Field(default=1, gt=0)
    """CPUs asked of Ray for an actor; also its number of torch threads, at least one."""
    gpus_per_actor: float = Field(default=0, ge=0)
    """GPUs asked of Ray for an actor."""


class EvaluationConfig(PoolConfig):
    """Score a model on tasks, and on the held-out documents of a corpus beside what costs nothing to train."""

    model: StoragePath | None = None
    """Model directory: ours, or any Hugging Face directory of a supported architecture."""
    endpoint: EndpointConfig | None = None
    """An OpenAI-compatible endpoint in place of a directory."""
    adapter: StoragePath | None = None
    """LoRA or soft prompt in peft's format, put into the model; it then answers in plain torch, not through the engine."""
    tasks: dict[Annotated[str, Field(pattern="^[^/]+$")], Task] = Field(default={})
    """Tasks by name, which also names their files."""
    corpus: StoragePath | None = None
    """Corpus artifact; its held-out documents are scored."""
    tokens: StoragePath | None = None
    """Tokens artifact whose training rows give the unigram baseline of the held-out documents."""
    output: StoragePath
    """Where scores.json, report.html, rows/, samples/ and replies.jsonl go."""
    precision: DtypeName = "float32"
    """Type of the computation."""
    device: DeviceName = "auto"
    """Where each actor computes."""
    batch_windows: int = Field(default=16, gt=0)
    """Windows of the model's context in one forward pass over held-out documents."""
    engine: dict[str, Any] = Field(default={})
    """Further settings of the engine that answers tasks: num_blocks, max_num_seqs, ... (powerhouse.engine.EngineConfig)."""

    @property
    def num_threads(self) -> int:
        return max(int(self.cpus_per_actor), 1)

    @model_validator(mode="after")
    def _there_is_something_to_do(self) -> EvaluationConfig:
        if (self.model is None) == (self.endpoint is None):
            raise ValueError("either model, a directory, or endpoint")
        if (self.corpus is None) != (self.tokens is None):
            raise ValueError("corpus and tokens together: the baseline of the one is made of the other")
        if not self.tasks and self.corpus is None:
            raise ValueError("tasks, or a corpus with its tokens")
        if self.endpoint and (self.corpus or self.adapter):
            raise ValueError("with an endpoint only tasks: held-out documents and adapters need a directory")
        return self

"""The engine's settings."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from powerhouse.config import Config, StoragePath
from powerhouse.device import DeviceName, DtypeName

Quantization = Literal["int8", "int4", "int8_dynamic"]


class SpeculationConfig(Config):
    """Guesses of the next tokens, checked together: for a few requests at a time, whose steps wait for memory."""

    num_tokens: int = Field(default=4, gt=0)
    """Most tokens guessed at a time."""
    model: StoragePath | None = None
    """A smaller model with the same tokenizer that guesses; where left out, the text is expected to repeat itself."""
    ngram: int = Field(default=3, gt=0)
    """Last tokens that are looked up in the text before; without a model."""


class EngineConfig(Config):
    """How a model is held and how much is computed at a time; the same for every stage of a pipeline."""

    dtype: DtypeName = "float32"
    """Precision of weights, activations and KV cache; on a CPU without 16-bit arithmetic, of the weights alone."""
    quantization: Quantization | None = None
    """Weights rounded as they are loaded. int8: a scale per output. int4: a scale and an offset for every 32 inputs of an
    output. int8_dynamic, on a CPU: activations are rounded too, which makes products faster, not only smaller."""
    device: DeviceName = "auto"
    """Where each stage computes."""
    num_stages: int = Field(default=1, gt=0)
    """Pipeline stages the layers are cut into, each a process of its own; 1 computes in the engine's process."""
    num_threads: int | None = Field(default=None, gt=0)
    """CPU threads of each process that computes; torch's own choice (all cores) where left out."""
    block_size: int = Field(default=16, gt=0)
    """Tokens in a block of the KV cache."""
    num_blocks: int = Field(default=512, gt=0)
    """Blocks in the KV cache; its tokens are num_blocks x block_size, on every stage for that stage's layers."""
    caches_prefixes: bool = True
    """Keep the keys and values of what was computed until their room is needed, for requests that begin alike."""
    max_num_seqs: int = Field(default=32, gt=0)
    """Requests that compute at the same time, over all stages together."""
    max_num_batched_tokens: int = Field(default=512, gt=0)
    """Tokens that are computed at the same time, over all stages together; a longer prompt is computed in chunks. Each of the
    batches in flight, one per stage, has its share: a stage waits for the largest."""
    max_waiting_requests: int = Field(default=1024, gt=0)
    """Requests that may wait for their turn; one more is refused."""
    compiles: bool = False
    """Make steps faster by code that is compiled at the start. On a CPU that takes two or three seconds and a C++ compiler, and
    the KV cache is bfloat16 where `dtype` is. On a GPU steps in which every request decodes are captured in CUDA graphs, one
    for each size: it takes longer, and Triton."""
    max_model_len: int | None = Field(default=None, gt=0)
    """Longest prompt and answer together, in tokens; the model's own context where left out."""

    adapters: dict[str, StoragePath] = Field(default_factory=dict)
    """LoRA changes and soft prompts that requests may name, and their directories in peft's format."""
    speculation: SpeculationConfig | None = None
    """Guessing ahead; none where left out."""

    @model_validator(mode="after")
    def _every_request_decodes_each_step(self) -> EngineConfig:
        tokens, requests = self.max_num_batched_tokens, self.max_num_seqs
        if tokens < requests:
            raise ValueError(f"max_num_batched_tokens at least max_num_seqs, not {tokens} and {requests}")
        return self

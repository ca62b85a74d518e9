"""The settings of a training run, and what they must agree on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from powerhouse.artifacts import Artifact
from powerhouse.config import Config, StoragePath
from powerhouse.errors import ConfigError
from powerhouse.models.adapters import AdapterConfig, LoRAConfig, PromptConfig, make_adapter_config
from powerhouse.models.encoder import EncoderConfig
from powerhouse.models.encoder_decoder import T5Config
from powerhouse.models.hub import open_checkpoint
from powerhouse.models.model import ModelConfig
from powerhouse.tokenizer import Tokenizer
from powerhouse.training.batches import Noise
from powerhouse.training.methods import METHODS, make_shape, method_of
from powerhouse.training.settings import NoiseConfig, OptimConfig, RunConfig, WatchConfig
from powerhouse.training.storage import Store


class TrainingConfig(Config):
    """Pretrain on packed rows: a decoder on next tokens, an encoder on masked tokens, a T5 on corrupted spans."""

    tokens: StoragePath
    """Artifact of packed rows."""
    output: StoragePath
    """Where the model directory goes."""
    model: Annotated[SerializeAsAny[ModelConfig] | None, BeforeValidator(make_shape)] = None
    """Shape of a new model: a named size, or settings with `family`: decoder (the default), encoder or t5."""
    start_from: StoragePath | None = None
    """In place of `model`: a model directory to train on, whose tokenizer made the tokens."""
    adapter: Annotated[SerializeAsAny[AdapterConfig] | None, BeforeValidator(make_adapter_config)] = None
    """Train this beside the frozen model of `start_from` and nothing else; the output is a directory in peft's format."""
    noise: NoiseConfig = NoiseConfig()
    """What is hidden from an encoder or a T5."""
    optim: OptimConfig
    """Optimiser and schedule."""
    precision: Literal["auto", "float32", "bfloat16", "float16", "float8"] = "auto"
    """Type of the computation; master weights, gradient sums and the optimiser's state are always float32. `auto` is
    bfloat16 where the processor has instructions for it, else float32; the model's manifest names the one that was used.
    float16 comes with a dynamic loss scale; float8 is bfloat16 with the blocks' matrix products in 8 bits."""
    global_batch_rows: int = Field(gt=0)
    """Rows that one step learns from, over all workers."""
    num_steps: int = Field(gt=0)
    """Optimiser steps."""
    masks_documents: bool | None = None
    """Attention stays within a document and positions start anew with it, as if it were alone in its row. null: where the
    rows tell which tokens are learned (conversations, pairs of texts), and else not."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Of the fresh weights and of the order of the rows."""
    run: RunConfig
    """How the work is spread and saved."""
    watch: WatchConfig = WatchConfig()
    """What is seen of it while it goes on."""

    @model_validator(mode="after")
    def _has_a_model(self) -> TrainingConfig:
        if self.model is None and self.start_from is None and self.adapter is None:
            raise ValueError("a `model`, the shape of a new one, or `start_from`, a directory to train on")
        if self.adapter is not None and self.start_from is None:
            raise ValueError("`start_from`, a model directory that the adapter belongs to")
        return self

    @property
    def shape(self) -> ModelConfig:
        """Shape of the model, known once a directory to start from is read."""
        assert self.model is not None, "train_model reads the shape first"
        return self.model

    @property
    def checkpoints(self) -> str:
        """Folder or URI of the run's checkpoints."""
        return self.run.checkpoints or str(self.output / "checkpoints")

    def can_share(self, num_workers: int) -> bool:
        """Whether so many workers can take equal parts of a step, in whole micro-batches and whole copies of the model."""
        is_even = self.global_batch_rows % (num_workers * self.run.micro_batch_rows) == 0
        return is_even and num_workers % (self.run.workers_per_copy or 1) == 0

    def usable_workers(self, num_there: int) -> int:
        """How many of the workers that are there can share a step."""
        return max(number for number in range(1, num_there + 1) if self.can_share(number))

    @property
    def rows_per_worker(self) -> int:
        """Rows of one step that one worker sees."""
        return self.global_batch_rows // self.run.num_workers

    @property
    def optim_of_trained(self) -> OptimConfig:
        """With the adapter's own decay, where there is one."""
        return self.optim.model_copy(update={"weight_decay": self.adapter.weight_decay}) if self.adapter else self.optim

    def make_noise(self, tokenizer: Tokenizer, row_length: int) -> Noise:
        """What is hidden from the model, with the tokenizer that made the rows."""
        share, mean_span = self.noise.share, self.noise.mean_span
        start_id = getattr(self.shape, "start_token_id", None)
        return method_of(self.shape).make_noise(
            tokenizer, row_length, seed=self.seed, share=share, mean_span=mean_span, start_id=start_id
        )


def read_shape(config: TrainingConfig) -> TrainingConfig:
    """Fill `model` in from the directory to start from.

    Raises:
        ConfigError: `model` is there too, or the directory holds a kind that is not trained.
        ModelFormatError: the directory is missing or damaged.
    """
    if config.start_from is None:
        return config
    if config.model is not None:
        raise ConfigError("model and start_from: both are set", do="leave out `model`: the directory has its shape")
    shape = open_checkpoint(config.start_from).config
    if not any(isinstance(shape, method.config_class) for method in METHODS.values()):
        raise ConfigError(f"start_from: {config.start_from}", got=type(shape).__name__, allowed=", ".join(METHODS))
    if isinstance(shape, EncoderConfig) and shape.head != "masked_lm":
        raise ConfigError(f"start_from: {config.start_from} has no masked-LM head", got=shape.head, do="use one that has")
    return config.model_copy(update={"model": shape})


def check(config: TrainingConfig, tokens: Artifact) -> None:
    """Hold the settings against each other and against the tokens.

    Raises:
        ConfigError: the global batch does not divide, the checkpoints have no known kind of store, or the model cannot take
            these tokens.
    """
    if config.precision == "float8" and isinstance(config.adapter, LoRAConfig):
        raise ConfigError("precision: layers with LoRA do not multiply in 8 bits", got="float8", allowed="bfloat16, float32")
    run = config.run
    check_batch(config.global_batch_rows, run.micro_batch_rows, run.worker_counts, run.workers_per_copy)
    Store(config.checkpoints)
    method, row_length = method_of(config.shape), int(tokens.manifest.counts["row_length"])
    tokenizer = Tokenizer.load(tokens.path)
    if config.start_from and Tokenizer.load(config.start_from).core.to_str() != tokenizer.core.to_str():
        raise ConfigError(
            f"start_from: {config.start_from} has another tokenizer than {tokens.path}", do="make tokens with the model's own"
        )
    noise = config.make_noise(tokenizer, row_length)
    num_tokens = max([noise.num_tokens, *(token_id + 1 for token_id in noise.special_ids)])
    if config.shape.vocab_size < num_tokens:
        raise ConfigError(
            f"model.vocab_size: smaller than the vocabulary of {tokens.path}, and what the method adds to it",
            got=config.shape.vocab_size,
            allowed=f"{num_tokens} or more",
        )
    num_soft = config.adapter.num_tokens if isinstance(config.adapter, PromptConfig) else 0
    longest = method.num_positions(row_length) + num_soft
    context = getattr(config.shape, "max_position_embeddings", longest)
    if context < longest:
        raise ConfigError(
            f"model.max_position_embeddings: shorter than the rows of {tokens.path}", got=context, allowed=f"{longest} or more"
        )
    if isinstance(config.shape, T5Config) and config.shape.end_token_id != noise.end_id:
        raise ConfigError(
            "model.end_token_id: not the tokenizer's end of a text", got=config.shape.end_token_id, allowed=noise.end_id
        )
    _check_learned(config, tokens)


def _check_learned(config: TrainingConfig, tokens: Artifact) -> None:
    """Hold what the rows tell to be learned against what the family can learn from them."""
    counts, is_t5 = tokens.manifest.counts, isinstance(config.shape, T5Config)
    if "num_learned_tokens" not in counts:
        if is_t5 and config.masks_documents:
            raise ConfigError("masks_documents: spans are hidden without regard to documents", got=True, allowed="false, null")
        return
    if isinstance(config.shape, EncoderConfig):
        raise ConfigError(
            f"tokens: {config.tokens} tells which tokens are answers, and an encoder writes none",
            do="train a decoder or a t5 on it",
        )
    if is_t5 and config.masks_documents is False:
        raise ConfigError("masks_documents: a source and its target belong together", got=False, allowed="true, null")
    if is_t5 and counts["num_answers"] != counts["num_documents"]:
        raise ConfigError(
            f"tokens: {config.tokens} has records with several answers",
            got=f"{counts['num_answers']} answers in {counts['num_documents']} records",
            do="give a t5 one source and one target a record, or train a decoder on it",
        )


def check_batch(rows: int, micro: int, worker_counts: Mapping[str, int], workers_per_copy: int | None = None) -> None:
    """Hold the global batch, which stays the same, against the fewest and the most workers, by the name of the setting.

    Of a number between them that does not divide it, `usable_workers` go on.

    Raises:
        ConfigError: one does not divide it into micro-batches.
    """
    if rows % micro:
        raise ConfigError(
            "run.micro_batch_rows: does not divide the global batch",
            got=f"{micro} with global_batch_rows={rows}",
            allowed=_divisors(rows),
        )
    for setting, num_workers in worker_counts.items():
        if rows % (num_workers * micro):
            raise ConfigError(
                f"{setting}: does not divide the global batch",
                got=f"{num_workers} with global_batch_rows={rows} and micro_batch_rows={micro}",
                allowed=_divisors(rows // micro),
            )
        if num_workers % (workers_per_copy or 1):
            raise ConfigError(
                "run.workers_per_copy: does not divide the workers",
                got=f"{workers_per_copy} with {setting}={num_workers}",
                allowed=_divisors(num_workers),
            )


def _divisors(number: int) -> str:
    return ", ".join(str(i) for i in range(1, number + 1) if number % i == 0)

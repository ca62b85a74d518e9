"""The settings of a training run, and what they must agree on."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from powerhouse.artifacts import Artifact
from powerhouse.config import Config, StoragePath
from powerhouse.errors import ConfigError
from powerhouse.models.encoder import EncoderConfig
from powerhouse.models.encoder_decoder import T5Config
from powerhouse.models.hub import open_checkpoint
from powerhouse.models.model import ModelConfig
from powerhouse.tokenizer import Tokenizer
from powerhouse.training.methods import METHODS, Noise, make_shape, method_of


class OptimConfig(Config):
    """AdamW (Loshchilov and Hutter 2019) under a schedule with warm-up."""

    lr: float = Field(gt=0)
    """Highest learning rate."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the rate rises linearly to `lr`."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """cosine: half a cosine down (Loshchilov and Hutter 2017). wsd: stable at `lr`, then a straight line down, so that a run
    can be prolonged from before its decay (Hu et al. 2024, section 4)."""
    decay_fraction: float = Field(default=0.2, gt=0, le=1)
    """Share of the steps over which wsd decays."""
    final_lr_fraction: float = Field(default=0.1, ge=0, le=1)
    """The rate falls to this fraction of `lr` at the last step."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decay of matrices; norms are not decayed."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the gradient's running mean."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the squared gradient's running mean."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the squared gradient's mean."""
    clip_norm: float = Field(default=1.0, gt=0)
    """Longest gradient, in the 2-norm over all parameters."""


class RunConfig(Config):
    """How the work is spread and saved: it changes the speed, not the result, so a resumed run may change it."""

    num_workers: int = Field(default=1, gt=0)
    """Training processes; the model is sharded over them."""
    micro_batch_rows: int = Field(gt=0)
    """Rows in one forward pass of one worker; the rest of the global batch is accumulated."""
    cpus_per_worker: float = Field(default=1, gt=0)
    """CPUs asked of Ray for a worker; also its number of torch threads, at least one."""
    use_gpu: bool = False
    """A GPU for each worker, and nccl instead of gloo."""
    checkpoint_every: int = Field(default=100, gt=0)
    """Steps between two checkpoints; the last step is always saved."""
    keep_checkpoints: int = Field(default=1, gt=0)
    """Newest checkpoints that are kept."""
    recomputes_blocks: bool = False
    """Keep only each block's input for the backward pass and compute the rest again (Chen et al. 2016): less memory, about a
    third more work."""
    max_failures: int = Field(default=2, ge=0)
    """How often lost workers are replaced before the run gives up."""


class NoiseConfig(Config):
    """Gaps to fill: BERT's masked tokens (Devlin et al. 2019), T5's corrupted spans (Raffel et al. 2020)."""

    share: float = Field(default=0.15, gt=0, lt=1)
    """Share of a row's tokens that are hidden."""
    mean_span: float = Field(default=3.0, ge=1)
    """Mean length of a hidden span of a T5, in tokens."""


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
    noise: NoiseConfig = NoiseConfig()
    """What is hidden from an encoder or a T5."""
    optim: OptimConfig
    """Optimiser and schedule."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the computation; master weights, gradient sums and the optimiser's state are always float32. `auto` is
    bfloat16 where the processor has instructions for it, else float32; the model's manifest names the one that was used."""
    global_batch_rows: int = Field(gt=0)
    """Rows that one step learns from, over all workers."""
    num_steps: int = Field(gt=0)
    """Optimiser steps."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Of the fresh weights and of the order of the rows."""
    run: RunConfig
    """How the work is spread and saved."""

    @model_validator(mode="after")
    def _has_a_model(self) -> TrainingConfig:
        if self.model is None and self.start_from is None:
            raise ValueError("a `model`, the shape of a new one, or `start_from`, a directory to train on")
        return self

    @property
    def shape(self) -> ModelConfig:
        """Shape of the model, known once a directory to start from is read."""
        assert self.model is not None, "train_model reads the shape first"
        return self.model

    @property
    def rows_per_worker(self) -> int:
        """Rows of one step that one worker sees."""
        return self.global_batch_rows // self.run.num_workers

    def make_noise(self, tokenizer: Tokenizer, row_length: int) -> Noise:
        """What is hidden from the model, with the tokenizer that made the rows."""
        share, mean_span = self.noise.share, self.noise.mean_span
        return method_of(self.shape).make_noise(tokenizer, row_length, seed=self.seed, share=share, mean_span=mean_span)


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
        ConfigError: the global batch does not divide, or the model cannot take these tokens.
    """
    _check_batch(config)
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
    context, longest = getattr(config.shape, "max_position_embeddings", row_length), method.num_positions(row_length)
    if context < longest:
        raise ConfigError(
            f"model.max_position_embeddings: shorter than the rows of {tokens.path}", got=context, allowed=f"{longest} or more"
        )
    if isinstance(config.shape, T5Config) and {config.shape.start_token_id, config.shape.end_token_id} != {noise.end_id}:
        raise ConfigError(
            "model.start_token_id, model.end_token_id: not the tokenizer's end of a text",
            got=f"{config.shape.start_token_id}, {config.shape.end_token_id}",
            allowed=noise.end_id,
        )


def _check_batch(config: TrainingConfig) -> None:
    rows, micro = config.global_batch_rows, config.run.micro_batch_rows
    if rows % (config.run.num_workers * micro) == 0:
        return
    if rows % micro:
        raise ConfigError(
            "run.micro_batch_rows: does not divide the global batch",
            got=f"{micro} with global_batch_rows={rows}",
            allowed=_divisors(rows),
        )
    raise ConfigError(
        "run.num_workers: does not divide the global batch",
        got=f"{config.run.num_workers} with global_batch_rows={rows} and micro_batch_rows={micro}",
        allowed=_divisors(rows // micro),
    )


def _divisors(number: int) -> str:
    return ", ".join(str(i) for i in range(1, number + 1) if number % i == 0)

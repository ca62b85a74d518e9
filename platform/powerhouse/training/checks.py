"""What a run is to show while it goes on, held against its model before it starts."""

from __future__ import annotations

from powerhouse.artifacts import Artifact
from powerhouse.errors import ConfigError
from powerhouse.heldout import HELDOUT, read_heldout
from powerhouse.models.encoder import EncoderConfig
from powerhouse.models.encoder_decoder import T5Config
from powerhouse.tokenizer import Tokenizer
from powerhouse.training.config import TrainingConfig, check
from powerhouse.training.rows import ROWS
from powerhouse.training.trackers import check_mlflow


def check_watch(config: TrainingConfig) -> None:
    """Hold what is to be seen against the model and what is installed.

    Raises:
        ConfigError: MLflow is not installed, or the model does not continue texts, or a prompt leaves no room.
        InputError: there are no held-out documents.
    """
    check_mlflow(config.watch.mlflow)
    _check_look(config, Tokenizer.load(config.tokens))


def _check_look(config: TrainingConfig, tokenizer: Tokenizer) -> None:
    """Hold what is to be looked at against the model.

    Raises:
        ConfigError: the model does not write texts, a prompt leaves no room, or the held-out rows are of another kind.
        InputError: there are no held-out documents.
    """
    watch, shape = config.watch, config.shape
    if watch.prompts and isinstance(shape, EncoderConfig):
        raise ConfigError("watch.prompts: an encoder writes no texts", got=type(shape).__name__, do="leave them out")
    if is_rows(config):
        _check_rows(config, tokenizer)
    elif watch.heldout:
        read_heldout(watch.heldout / HELDOUT)
        if isinstance(shape, T5Config) and "num_learned_tokens" in Artifact.open(config.tokens, "tokens").manifest.counts:
            do = "set it to tokens that were made of pairs kept aside"
            raise ConfigError("watch.heldout: a corpus has no pairs, which this run learns", got=watch.heldout, do=do)
    room = getattr(shape, "max_position_embeddings", 2**31) - watch.sample_tokens
    for prompt in watch.prompts:
        if not 0 < (num_tokens := len(tokenizer.encode(prompt))) <= room:
            raise ConfigError(
                f"watch.prompts: {prompt!r} and watch.sample_tokens do not fit the model's context",
                got=f"{num_tokens} tokens and {watch.sample_tokens} new",
                allowed=f"1 to {room} tokens",
            )


def _check_rows(config: TrainingConfig, tokenizer: Tokenizer) -> None:
    """Held-out rows are such as the run could be trained on."""
    assert config.watch.heldout is not None, "there are rows"
    tokens = Artifact.open(config.watch.heldout, "tokens")
    if Tokenizer.load(tokens.path).core.to_str() != tokenizer.core.to_str():
        raise ConfigError(
            f"watch.heldout: {tokens.path} has another tokenizer than {config.tokens}", do="make it with that one"
        )
    check(config.model_copy(update={"tokens": tokens.path}), tokens)


def is_rows(config: TrainingConfig) -> bool:
    return config.watch.heldout is not None and (config.watch.heldout / ROWS).is_dir()

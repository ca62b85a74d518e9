from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from distributed import run_on_ranks
from fakes import tiny_config, tiny_decoder, tiny_tokenizer, write_tiny_model
from families import ENCODER, build, export
from powerhouse.artifacts import Artifact
from powerhouse.config import validate
from powerhouse.errors import ConfigError
from powerhouse.models.encoder import EncoderConfig
from powerhouse.models.encoder_decoder import T5Config
from powerhouse.tokenizer import Tokenizer
from powerhouse.training.build import build_model
from powerhouse.training.config import TrainingConfig, check, read_shape
from powerhouse.training.loop import accumulate, gradients
from powerhouse.training.methods import METHODS, Noise, method_of
from powerhouse.training.sharding import WholeState
from tiny_run import ROW_LENGTH, SHAPES, make_config, method_batch, sharded_model, write_tokens


def noise_of(family: str) -> Noise:
    return METHODS[family].make_noise(tiny_tokenizer(), ROW_LENGTH, seed=0, share=0.3, mean_span=3.0)


def rows(num_rows: int) -> np.ndarray:
    return np.random.default_rng(0).integers(1, 300, (num_rows, ROW_LENGTH)).astype(np.int32)


def test_the_next_token_is_the_label_of_a_decoder() -> None:
    batch = METHODS["decoder"].batch(
        np.array([[5, 6, 7, 8]], dtype=np.int32), np.array([0]), noise_of("decoder"), torch.device("cpu")
    )

    assert {name: tensor.tolist() for name, tensor in batch.items()} == {"inputs": [[5, 6, 7]], "labels": [[6, 7, 8]]}
    assert batch["labels"].dtype == torch.int64


def test_a_t5_is_shown_the_start_and_then_each_target_but_the_last() -> None:
    noise = noise_of("t5")
    batch = METHODS["t5"].batch(rows(3), np.arange(3), noise, torch.device("cpu"))

    assert (batch["inputs"][:, 0] == noise.end_id).all()
    torch.testing.assert_close(batch["inputs"][:, 1:], batch["labels"][:, :-1])
    assert noise.special_tokens == ("<extra_id_0>", "<extra_id_1>")
    assert set(batch["sources"][batch["sources"] >= 300].tolist()) == {300, 301}


def losses_on(config: TrainingConfig) -> tuple[float, float]:
    """The mean loss of a batch over all ranks, and the norm of its gradient."""
    model, _ = sharded_model(config)
    totals = accumulate(model, method_of(config.shape).objective, method_batch(config), config.run)
    square = sum(float(g.full_tensor().double().square().sum()) for g in gradients(model))
    dict(WholeState(model))
    return float(totals[0] / totals[1]), square**0.5


@pytest.mark.slow
@pytest.mark.parametrize("family", list(METHODS))
def test_two_ranks_give_the_loss_and_the_gradient_of_one(tmp_path: Path, family: str) -> None:
    config = make_config(tmp_path, model=SHAPES[family])

    [alone], together = run_on_ranks(1, losses_on, config), run_on_ranks(2, losses_on, config)

    assert alone[0] == pytest.approx(np.log(300), rel=0.5)
    for rank in together:
        assert rank == pytest.approx(alone, rel=1e-5)


def test_a_shape_is_named_or_spelt_out(tmp_path: Path) -> None:
    assert isinstance(make_config(tmp_path, model="bert-base").model, EncoderConfig)
    assert isinstance(make_config(tmp_path, model="flan-t5-small").model, T5Config)
    config = make_config(tmp_path, model=SHAPES["t5"])
    assert config.model == T5Config.model_validate({k: v for k, v in SHAPES["t5"].items() if k != "family"})


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("gpt-7", r"model: got 'gpt-7'; allowed: one of bert-base, .*, or a mapping"),
        ({"family": "rnn"}, "allowed: a family of decoder, encoder, t5"),
        (SHAPES["encoder"] | {"hidden_siz": 3}, r"model\.hidden_siz: unknown key; did you mean hidden_size\?"),
        (SHAPES["encoder"] | {"vocab_size": 0}, r"model\.vocab_size: got 0; allowed: input should be greater than 0"),
    ],
)
def test_a_shape_that_is_none_is_refused(tmp_path: Path, model: Any, message: str) -> None:
    values = make_config(tmp_path).model_dump() | {"model": model}

    with pytest.raises(ConfigError, match=message):
        validate(TrainingConfig, values, "test")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (SHAPES["encoder"] | {"vocab_size": 300}, r"model\.vocab_size: .*\n  got: 300\n  allowed: 301 or more"),
        (SHAPES["t5"] | {"vocab_size": 300}, r"model\.vocab_size: .*\n  got: 300\n  allowed: 301 or more"),
        (SHAPES["encoder"] | {"max_position_embeddings": 16}, r"rows of .*\n  got: 16\n  allowed: 17 or more"),
        (SHAPES["t5"] | {"end_token_id": 1}, r"not the tokenizer's end of a text\n  got: 1\n  allowed: 0"),
    ],
)
def test_a_shape_that_does_not_fit_the_tokens_is_refused(tmp_path: Path, model: Any, message: str) -> None:
    tokens = write_tokens(tmp_path / "tokens")

    with pytest.raises(ConfigError, match=message):
        check(make_config(tmp_path, model=model), tokens)


def test_the_tokens_that_a_method_adds_are_the_ids_after_the_vocabulary(tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens")
    tokenizer = Tokenizer.load(tmp_path / "tokens")
    noise = make_config(tmp_path, model=SHAPES["encoder"]).make_noise(tokenizer, ROW_LENGTH)

    tokenizer.add_special_tokens(noise.special_tokens)
    tokenizer.save(tmp_path / "saved")

    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert theirs.convert_tokens_to_ids("<mask>") == noise.special_ids[0] == 300
    assert tokenizer.vocab_size == 301
    again = METHODS["encoder"].make_noise(tokenizer, ROW_LENGTH, seed=0, share=0.15, mean_span=3.0)
    assert again.special_ids == (300,), "a token that is there keeps its id"


def gathered_model(config: TrainingConfig) -> dict[str, torch.Tensor]:
    return dict(WholeState(build_model(config, torch.device("cpu"))))


def test_training_starts_from_the_weights_of_a_directory(tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens")
    directory = write_tiny_model(tmp_path / "start", seed=7)
    config = read_shape(make_config(tmp_path, model=None, start_from=directory))

    [state, _] = run_on_ranks(2, gathered_model, config)

    assert config.shape == tiny_config()
    expected = tiny_decoder(seed=7).state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())
    check(config, Artifact.open(tmp_path / "tokens", "tokens"))


def other_tokenizer(directory: Path) -> None:
    Tokenizer.train(["none of these words"] * 3, 262).save(directory)


def bare_encoder(directory: Path) -> None:
    export(build(EncoderConfig, ENCODER | {"head": "none"}), directory)


@pytest.mark.parametrize(
    ("changes", "damage", "message"),
    [
        ({"model": tiny_config().model_dump()}, None, "model and start_from: both are set"),
        ({}, other_tokenizer, "has another tokenizer than"),
        ({}, bare_encoder, "has no masked-LM head\n  got: none"),
    ],
)
def test_a_directory_that_cannot_be_trained_on_is_refused(
    tmp_path: Path, changes: dict[str, Any], damage: Callable[[Path], None] | None, message: str
) -> None:
    tokens = write_tokens(tmp_path / "tokens")
    directory = write_tiny_model(tmp_path / "start")
    if damage:
        damage(directory)

    with pytest.raises(ConfigError, match=message):
        check(read_shape(make_config(tmp_path, **{"model": None, "start_from": directory} | changes)), tokens)


def test_a_run_needs_a_shape_or_a_directory(tmp_path: Path) -> None:
    values = make_config(tmp_path).model_dump() | {"model": None}

    with pytest.raises(ConfigError, match="a `model`, the shape of a new one, or `start_from`"):
        validate(TrainingConfig, values, "test")

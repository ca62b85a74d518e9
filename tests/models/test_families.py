"""Every family and option against transformers, which reads what is written here and writes what is read here."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.models.marian.modeling_marian import MarianEncoder

from families import (
    CLASSES,
    CLASSIC,
    CLASSICS,
    DECODER,
    DECODERS,
    ENCODER,
    ENCODERS,
    LENGTH,
    T5_SHAPE,
    T5S,
    VOCAB,
    build,
    export,
)  # fmt: skip
from powerhouse.models.attention import DenseCache
from powerhouse.models.classic import ClassicConfig
from powerhouse.models.decoder import DecoderConfig
from powerhouse.models.encoder import EncoderConfig, pool
from powerhouse.models.encoder_decoder import EncoderDecoder, T5Config
from powerhouse.models.hub import load_model, open_checkpoint
from powerhouse.models.hugging_face import FORMATS
from powerhouse.models.model import Model, token_loss

ALL = (
    [pytest.param(DecoderConfig, DECODER | more, id=name) for name, more in DECODERS.items()]
    + [pytest.param(EncoderConfig, ENCODER | more, id=f"bert, {name}") for name, more in ENCODERS.items()]
    + [pytest.param(T5Config, T5_SHAPE | more, id=f"t5, {name}") for name, more in T5S.items()]
    + [pytest.param(ClassicConfig, CLASSIC | more, id=f"classic, {name}") for name, more in CLASSICS.items()]
)


def ids(rows: int = 2, length: int = LENGTH, seed: int = 0) -> Tensor:
    return torch.randint(4, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same_gradients(ours: Model, theirs: nn.Module) -> None:
    form = next(item for item in FORMATS.values() if item.config_class is type(ours.config))
    mine = {form.name(name, ours.config): gradient for name, gradient in gradients(ours).items()}
    expected = gradients(theirs)
    assert mine.keys() == expected.keys()
    for name, gradient in mine.items():
        torch.testing.assert_close(
            gradient, expected[name], atol=1e-4, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


def assert_same_logits_loss_and_gradients(
    ours: Model, logits: Tensor, theirs: nn.Module, expected: Any, labels: Tensor, loss: Tensor
) -> None:
    torch.testing.assert_close(logits, expected.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(loss, expected.loss, atol=1e-4, rtol=0)
    loss.backward()
    expected.loss.backward()
    assert_same_gradients(ours, theirs)


@pytest.mark.parametrize("values", [DECODER | more for more in DECODERS.values()], ids=list(DECODERS))
def test_a_decoders_logits_loss_and_gradients_are_those_of_transformers(tmp_path: Path, values: dict[str, Any]) -> None:
    ours = build(DecoderConfig, values)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(export(ours, tmp_path), attn_implementation="eager")
    tokens = ids()

    logits = ours(tokens, torch.arange(LENGTH))
    loss = token_loss(logits[:, :-1], tokens[:, 1:]) / tokens[:, 1:].numel()

    assert_same_logits_loss_and_gradients(ours, logits, theirs, theirs(tokens, labels=tokens), tokens, loss)


@pytest.mark.parametrize("more", [ENCODERS["masked LM"], ENCODERS["masked LM, relu"]])
def test_a_masked_lms_logits_loss_and_gradients_are_those_of_transformers(tmp_path: Path, more: dict[str, Any]) -> None:
    ours = build(EncoderConfig, ENCODER | more)
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(export(ours, tmp_path))
    tokens, segments = ids(), torch.randint(0, 2, (2, LENGTH), generator=torch.Generator().manual_seed(2))
    valid = torch.arange(LENGTH) < torch.tensor([[LENGTH], [17]])
    labels = tokens.masked_fill(torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(3)) < 0.5, -100)
    labels = labels.masked_fill(~valid, -100)

    logits = ours(tokens, valid, segments)
    loss = token_loss(logits, labels) / (labels != -100).sum()
    expected = theirs(tokens, attention_mask=valid.long(), token_type_ids=segments, labels=labels)

    logits, expected.logits = (x.masked_fill(~valid[..., None], 0.0) for x in (logits, expected.logits))
    assert_same_logits_loss_and_gradients(ours, logits, theirs, expected, labels, loss)


@pytest.mark.parametrize("head", ["pooler", "none"])
def test_a_bare_encoders_states_and_pooled_vector_are_those_of_transformers(tmp_path: Path, head: str) -> None:
    ours = build(EncoderConfig, ENCODER | {"head": head})
    theirs = transformers.AutoModel.from_pretrained(export(ours, tmp_path), add_pooling_layer=head == "pooler")
    tokens, valid = ids(), torch.arange(LENGTH) < torch.tensor([[LENGTH], [17]])

    expected = theirs(tokens, attention_mask=valid.long())

    states = ours.encode(tokens, valid)
    torch.testing.assert_close(states[valid], expected.last_hidden_state[valid], atol=1e-4, rtol=0)
    if head == "pooler":
        torch.testing.assert_close(ours(tokens, valid), expected.pooler_output, atol=1e-4, rtol=0)
    torch.testing.assert_close(pool(states, valid, "mean")[1], expected.last_hidden_state[1, :17].mean(0), atol=1e-4, rtol=0)
    torch.testing.assert_close(pool(states, valid, "cls"), expected.last_hidden_state[:, 0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", [*T5S, *CLASSICS])
def test_an_encoder_decoders_logits_loss_and_gradients_are_those_of_transformers(tmp_path: Path, kind: str) -> None:
    is_t5 = kind in T5S
    ours = build(T5Config, T5_SHAPE | T5S[kind]) if is_t5 else build(ClassicConfig, CLASSIC | CLASSICS[kind])
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(export(ours, tmp_path))
    source, target = ids(), ids(length=9, seed=1)
    valid = torch.arange(LENGTH) < torch.tensor([[LENGTH], [17]])
    assert isinstance(ours, EncoderDecoder)

    logits = ours(target[:, :-1], torch.arange(8), ours.remember(source, valid))
    loss = token_loss(logits, target[:, 1:]) / target[:, 1:].numel()
    expected = theirs(
        source, attention_mask=valid.long(), decoder_input_ids=target[:, :-1].contiguous(), labels=target[:, 1:].contiguous()
    )

    assert_same_logits_loss_and_gradients(ours, logits, theirs, expected, target, loss)


def test_the_classic_transformer_as_encoder_and_as_decoder_is_marians_half(tmp_path: Path) -> None:
    encoder = build(ClassicConfig, CLASSIC | {"num_decoder_layers": 0})
    decoder = build(ClassicConfig, CLASSIC | {"num_encoder_layers": 0})
    their_encoder = MarianEncoder.from_pretrained(export(encoder, tmp_path / "encoder"))
    their_decoder = transformers.MarianForCausalLM.from_pretrained(export(decoder, tmp_path / "decoder"))
    tokens = ids()

    torch.testing.assert_close(encoder.encode(tokens), their_encoder(tokens).last_hidden_state, atol=1e-4, rtol=0)
    torch.testing.assert_close(decoder(tokens, torch.arange(LENGTH), None), their_decoder(tokens).logits, atol=1e-4, rtol=0)
    for model, name in ((encoder, "encoder"), (decoder, "decoder")):
        assert load_model(tmp_path / name).config == model.config


@pytest.mark.parametrize(("config_class", "values"), ALL)
def test_what_is_saved_is_what_is_loaded_and_what_transformers_expects(
    tmp_path: Path, config_class: Any, values: dict[str, Any]
) -> None:
    model = build(config_class, values)

    loaded = load_model(export(model, tmp_path))

    assert loaded.config == model.config
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, atol=0, rtol=0)
    classes = {"masked_lm": transformers.AutoModelForMaskedLM}
    by_config = {DecoderConfig: transformers.AutoModelForCausalLM, EncoderConfig: transformers.AutoModel}
    auto = classes.get(values.get("head", "")) or by_config.get(config_class, transformers.AutoModelForSeq2SeqLM)
    _, report = auto.from_pretrained(tmp_path, output_loading_info=True)
    missing = {name for name in report["missing_keys"] if not name.startswith("pooler.") and "embed_positions" not in name}
    assert (missing, report["unexpected_keys"]) == (set(), set())


@pytest.mark.parametrize(("config_class", "values"), ALL)
def test_what_transformers_writes_is_read_and_written_back_with_the_same_names(
    tmp_path: Path, config_class: Any, values: dict[str, Any]
) -> None:
    first = export(build(config_class, values), tmp_path / "first")
    architecture = getattr(
        transformers, open_checkpoint(first).format.write(build(config_class, values).config)["architectures"][0]
    )
    theirs = architecture.from_pretrained(first)
    theirs.save_pretrained(tmp_path / "theirs")

    loaded = load_model(tmp_path / "theirs")
    again = export(loaded, tmp_path / "again")

    expected = {
        name: x for name, x in load_file(tmp_path / "theirs" / "model.safetensors").items() if "embed_positions" not in name
    }
    written = load_file(again / "model.safetensors")
    surplus = set(expected) - set(written)
    assert all(name.startswith("pooler.") for name in surplus) or values.get("head") == "none", surplus
    assert not set(written) - set(expected)
    for name, tensor in written.items():
        torch.testing.assert_close(tensor, expected[name], atol=0, rtol=0)


@pytest.mark.parametrize("pieces", [[1] * 16, [7, 1, 8]])
@pytest.mark.parametrize("values", [DECODER | more for more in DECODERS.values()], ids=list(DECODERS))
def test_decoding_in_pieces_is_the_full_pass(values: dict[str, Any], pieces: list[int]) -> None:
    model, cache, tokens = build(DecoderConfig, values), DenseCache(), ids(length=16)

    outputs, start = [], 0
    for length in pieces:
        outputs.append(model(tokens[:, start : start + length], torch.arange(start, start + length), cache))
        start += length

    torch.testing.assert_close(torch.cat(outputs, dim=1), model(tokens, torch.arange(16)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", [*T5S, *CLASSICS])
def test_an_encoder_decoder_in_pieces_is_the_full_pass(kind: str) -> None:
    model = build(T5Config, T5_SHAPE | T5S[kind]) if kind in T5S else build(ClassicConfig, CLASSIC | CLASSICS[kind])
    assert isinstance(model, EncoderDecoder)
    memory, target, cache = model.remember(ids()), ids(length=9, seed=1), DenseCache()

    pieces = [model(target[:, i : i + 1], torch.tensor([i]), memory, cache) for i in range(9)]

    torch.testing.assert_close(torch.cat(pieces, dim=1), model(target, torch.arange(9), memory), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("values", [DECODER | more for more in DECODERS.values() if "dynamic" not in str(more)])
def test_a_left_padded_row_gives_what_it_gives_alone(values: dict[str, Any]) -> None:
    model, tokens = build(DecoderConfig, values), ids(length=12)
    valid = torch.arange(12) >= torch.tensor([[0], [5]])
    positions = (valid.long().cumsum(1) - 1).clamp(min=0)

    batch = model(tokens, positions, DenseCache(valid))

    torch.testing.assert_close(batch[:1], model(tokens[:1], torch.arange(12)), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(batch[1:, 5:], model(tokens[1:, 5:], torch.arange(7)), atol=1e-4, rtol=1e-4)


def test_each_family_has_named_sizes_that_are_valid() -> None:
    for config_class in CLASSES:
        for name in config_class.SIZES:
            assert config_class.model_validate(name) == config_class.model_validate(
                copy.deepcopy(dict(config_class.SIZES[name]))
            )


def test_an_unknown_size_lists_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"one of llama-3\.1-8b, llama-3\.2-1b, mistral-7b"):
        DecoderConfig.model_validate("llama-5")


# Published, or counted by transformers: parameters of the models that these shapes are named after.
KNOWN_SIZES = [
    (DecoderConfig, "smollm2-135m", {}, 134_515_008),
    (DecoderConfig, "llama-3.2-1b", {}, 1_235_814_400),
    (DecoderConfig, "qwen3-0.6b", {}, 596_049_920),
    (DecoderConfig, "mistral-7b", {}, 7_248_023_552),
    (EncoderConfig, "minilm-l6", {"head": "pooler"}, 22_713_216),
    (EncoderConfig, "bert-base", {"head": "pooler"}, 109_482_240),
    (T5Config, "t5-small", {}, 60_506_624),
    (T5Config, "flan-t5-small", {}, 76_961_152),
]


@pytest.mark.parametrize(("config_class", "name", "changes", "num_parameters"), KNOWN_SIZES)
def test_a_named_size_has_as_many_parameters_as_its_namesake(
    config_class: Any, name: str, changes: dict[str, Any], num_parameters: int
) -> None:
    with torch.device("meta"):
        model = CLASSES[config_class](config_class.model_validate(dict(config_class.SIZES[name]) | changes))

    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters

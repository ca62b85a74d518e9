from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import transformers
from pydantic import ValidationError

from fakes import tiny_config, tiny_decoder, write_tiny_model
from powerhouse.models.attention import DenseCache
from powerhouse.models.decoder import Decoder
from powerhouse.models.hub import load_decoder
from powerhouse.models.model import token_loss


@pytest.fixture
def ids_BT() -> torch.Tensor:
    return torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}, {"num_key_value_heads": 4, "rope_theta": 500.0}])
def test_logits_loss_and_gradients_are_those_of_transformers(
    tmp_path: Path, ids_BT: torch.Tensor, changes: dict[str, object]
) -> None:
    directory = write_tiny_model(tmp_path / "model", **changes)
    ours = load_decoder(directory)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)

    logits = ours(ids_BT[:, :-1], torch.arange(23))
    expected = theirs(ids_BT[:, :-1]).logits
    loss = token_loss(logits, ids_BT[:, 1:]) / ids_BT[:, 1:].numel()
    expected_loss = theirs(ids_BT, labels=ids_BT).loss
    loss.backward()
    expected_loss.backward()

    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(loss, expected_loss, atol=1e-4, rtol=0)
    expected_gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert set(expected_gradients) == {name for name, _ in ours.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected_gradients[name], atol=1e-4, rtol=0, msg=name)


def test_a_model_that_transformers_wrote_loads_and_gives_its_logits(tmp_path: Path, ids_BT: torch.Tensor) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)

    ours = load_decoder(tmp_path)

    torch.testing.assert_close(ours(ids_BT, torch.arange(24)), theirs(ids_BT).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("pieces", [[1] * 24, [10, 1, 13], [23, 1]])
def test_decoding_in_pieces_over_a_dense_cache_is_the_full_pass(ids_BT: torch.Tensor, pieces: list[int]) -> None:
    model, cache = tiny_decoder(), DenseCache()

    outputs, start = [], 0
    for length in pieces:
        positions = torch.arange(start, start + length)
        outputs.append(model(ids_BT[:, start : start + length], positions, cache))
        start += length

    torch.testing.assert_close(torch.cat(outputs, dim=1), model(ids_BT, torch.arange(24)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cuts", [[0, 2, 4], [0, 1, 3, 4]])
@pytest.mark.parametrize("is_tied", [True, False])
def test_the_slices_of_a_directory_one_after_the_other_are_the_whole(
    tmp_path: Path, ids_BT: torch.Tensor, cuts: list[int], is_tied: bool
) -> None:
    directory = write_tiny_model(tmp_path / "model", tie_word_embeddings=is_tied)
    positions = torch.arange(24)

    hidden = ids_BT
    for start, stop in itertools.pairwise(cuts):
        hidden = load_decoder(directory, layers=range(start, stop))(hidden, positions)

    torch.testing.assert_close(hidden, load_decoder(directory)(ids_BT, positions))


def test_a_slice_is_initialised_as_its_part_of_the_whole() -> None:
    whole = tiny_decoder(seed=3).state_dict()
    part = Decoder(tiny_config(), range(1, 3))
    part.initialise(3)

    for name, tensor in part.state_dict().items():
        torch.testing.assert_close(tensor, whole[name], atol=0, rtol=0, msg=name)


def test_a_tied_model_has_one_matrix_and_an_untied_one_two() -> None:
    tied, untied = tiny_decoder(), tiny_decoder(tie_word_embeddings=False)

    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    count = {model: sum(p.numel() for p in model.parameters()) for model in (tied, untied)}
    assert count[untied] - count[tied] == 300 * 32


def test_labels_of_minus_100_do_not_count() -> None:
    logits_BTV = torch.randn(1, 3, 5, generator=torch.Generator().manual_seed(0))
    labels_BT = torch.tensor([[2, -100, 4]])

    expected = -logits_BTV.log_softmax(-1)[0, [0, 2], [2, 4]].sum()

    torch.testing.assert_close(token_loss(logits_BTV, labels_BT), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 3}, "num_attention_heads a multiple of num_key_value_heads, not 4 and 3"),
        ({"head_dim": 7}, "multiple of 2"),
        ({"vocab_size": 0}, "greater than 0"),
        ({"dropout": 0.1}, "Extra inputs are not permitted"),
    ],
)
def test_shapes_that_cannot_be_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        tiny_config(**changes)

"""Rows of several documents: what is learnt from them is what would be learnt from each document alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor

from distributed import run_on_ranks
from families import DECODER, ENCODER, T5_SHAPE, T5S, build, export
from powerhouse.artifacts import Artifact
from powerhouse.errors import ConfigError, InputError
from powerhouse.models.attention import Mask, RowAttention, document_positions
from powerhouse.models.decoder import DecoderConfig
from powerhouse.models.encoder import EncoderConfig
from powerhouse.models.encoder_decoder import T5Config
from powerhouse.models.kernels import KERNELS
from powerhouse.training.batches import Noise, PackedRows, causal_batch, masked_batch, sequence_batch
from powerhouse.training.config import TrainingConfig, check
from powerhouse.training.data import read_batches
from powerhouse.training.loop import accumulate, gradients
from powerhouse.training.methods import method_of
from powerhouse.training.objectives import Batch, causal_language_model, masked_language_model, sequence_to_sequence
from tiny_run import make_config, sharded_model, write_pairs, write_tokens

LENGTHS = [[5, 1, 9], [2, 4, 3, 6], [15]]
"""Of the documents in three rows."""
DOCUMENTS = np.stack([np.repeat(np.arange(len(row)), row) for row in LENGTHS]).astype(np.int32)
TOKENS = np.random.default_rng(0).integers(2, 60, DOCUMENTS.shape).astype(np.int32)
LEARNED = np.random.default_rng(1).random(DOCUMENTS.shape) < 0.6
NOISE = Noise(0, 0.3, 3.0, 60, start_id=0, end_id=1, special_tokens=("<mask>",), special_ids=(59,))


def rows(**changes: Any) -> PackedRows:
    values: dict[str, Any] = {"tokens_BR": TOKENS, "places_B": np.arange(3), "documents_BR": DOCUMENTS, "learned_BR": LEARNED}
    return PackedRows(**values | changes)


def tensors(batch: dict[str, Any]) -> Batch:
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in batch.items()}


def alone() -> list[tuple[Any, Any]]:
    """Tokens and marks of each document for itself."""
    return [
        (TOKENS[row, DOCUMENTS[row] == number], LEARNED[row, DOCUMENTS[row] == number])
        for row in range(3)
        for number in range(len(LENGTHS[row]))
    ]


def gradient_of(model: Any, loss: Tensor) -> list[Tensor]:
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return [torch.zeros(1) if gradient is None else gradient for gradient in found]


def assert_same(model: Any, packed: tuple[Tensor, Tensor], single: list[tuple[Tensor, Tensor]]) -> None:
    """The sums of loss and count, and the gradients of the loss."""
    loss, count = sum(one[0] for one in single), sum(int(one[1]) for one in single)
    assert int(packed[1]) == count > 0
    torch.testing.assert_close(packed[0], torch.as_tensor(loss), rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(gradient_of(model, packed[0]), gradient_of(model, torch.as_tensor(loss)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_positions_start_anew_with_each_document() -> None:
    expected = [[i for length in row for i in range(length)] for row in LENGTHS]
    assert document_positions(torch.from_numpy(DOCUMENTS)).tolist() == expected


@pytest.mark.parametrize("change", [{}, {"architecture": "mistral", "sliding_window": 4}], ids=["llama", "mistral"])
@pytest.mark.parametrize("learned", [None, LEARNED], ids=["all", "answers"])
def test_a_decoders_loss_and_gradient_on_packed_rows_are_those_of_the_documents_alone(change: Any, learned: Any) -> None:
    model = build(DecoderConfig, DECODER | change)
    single = [
        causal_language_model(model, tensors(causal_batch(PackedRows(t[None], np.arange(1), None, learned_R), NOISE)))
        for t, marks in alone()
        for learned_R in [None if learned is None else marks[None]]
        if len(t) > 1
    ]

    packed = causal_language_model(model, tensors(causal_batch(rows(learned_BR=learned), NOISE)))
    assert_same(model, packed, single)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_keeps_documents_apart(kernel: str) -> None:
    model, documents = build(DecoderConfig, DECODER), torch.from_numpy(DOCUMENTS)
    inputs = torch.from_numpy(TOKENS.astype(np.int64))

    with torch.no_grad():  # flex learns only where it is compiled
        logits = model(inputs, document_positions(documents), RowAttention(Mask(document_BS=documents), KERNELS[kernel]))
        for row, number in [(0, 2), (1, 1), (2, 0)]:
            here = documents[row] == number
            expected = model(inputs[row, here][None], torch.arange(int(here.sum())))
            torch.testing.assert_close(logits[row, here], expected[0], atol=1e-5, rtol=1e-4)


def test_an_encoders_loss_and_gradient_on_packed_rows_are_those_of_the_documents_alone() -> None:
    model = build(EncoderConfig, ENCODER)
    batch = tensors(masked_batch(rows(learned_BR=None), NOISE))
    single = [
        masked_language_model(model, {name: batch[name][row, DOCUMENTS[row] == number][None] for name in ("inputs", "labels")})
        for row in range(3)
        for number in range(len(LENGTHS[row]))
    ]

    assert_same(model, masked_language_model(model, batch), single)


PAIR_MARKS = np.stack([np.concatenate([np.arange(n) >= (n + 1) // 2 for n in row]) for row in LENGTHS])
"""The second half of each document is its answer; one of a single token has none."""


def test_a_t5_is_given_sources_with_an_end_and_targets_after_the_start() -> None:
    tokens = np.array([[11, 12, 13, 14, 21, 22, 23, 99], [31, 32, 33, 34, 35, 36, 37, 38]], dtype=np.int32)
    documents = np.array([[0, 0, 0, 0, 1, 1, 1, 2], [0] * 8], dtype=np.int32)
    learned = np.array([[0, 0, 1, 1, 0, 1, 1, 0], [0, 0, 0, 1, 1, 1, 0, 0]], dtype=np.bool_)

    batch = sequence_batch(PackedRows(tokens, np.arange(2), documents, learned), NOISE)
    assert {name: array.tolist() for name, array in batch.items()} == {
        "sources": [[11, 12, 1, 21, 1], [31, 32, 33, 1, 1]],
        "source_documents": [[0, 0, 0, 1, 1], [0, 0, 0, 0, -100]],
        "inputs": [[0, 13, 0, 22], [0, 34, 35, 1]],
        "documents": [[0, 0, 1, 1], [0, 0, 0, 0]],
        "labels": [[13, 14, 22, 23], [34, 35, 36, -100]],
    }


@pytest.mark.parametrize("kind", T5S)
def test_a_t5s_loss_and_gradient_on_packed_pairs_are_those_of_transformers_on_padded_ones(tmp_path: Path, kind: str) -> None:
    ours = build(T5Config, T5_SHAPE | T5S[kind])
    theirs = transformers.T5ForConditionalGeneration.from_pretrained(export(ours, tmp_path))
    pairs = [
        (TOKENS[row, here & ~PAIR_MARKS[row]], TOKENS[row, here & PAIR_MARKS[row]])
        for row in range(3)
        for here in [DOCUMENTS[row] == number for number in range(len(LENGTHS[row]))]
        if (here & PAIR_MARKS[row]).any()
    ]
    sources, labels = torch.zeros(len(pairs), 9, dtype=torch.long), torch.full((len(pairs), 8), -100)
    for index, (source, target) in enumerate(pairs):
        sources[index, : len(source) + 1] = torch.tensor([*source.tolist(), NOISE.end_id])
        labels[index, : len(target)] = torch.from_numpy(target)
    expected = theirs(sources, attention_mask=(sources != 0).long(), labels=labels).loss

    loss, count = sequence_to_sequence(ours, tensors(sequence_batch(rows(learned_BR=PAIR_MARKS), NOISE)))
    assert int(count) == int(PAIR_MARKS.sum())
    torch.testing.assert_close(loss / count, expected, atol=1e-4, rtol=0)
    embedding = torch.autograd.grad(loss / count, ours.embed_tokens.weight)[0]
    torch.testing.assert_close(embedding, torch.autograd.grad(expected, theirs.shared.weight)[0], atol=1e-4, rtol=0)


def test_without_a_word_of_documents_a_row_is_one_text_and_learned_tokens_are_still_the_labels() -> None:
    plain = causal_batch(rows(documents_BR=None, learned_BR=None), NOISE)
    assert set(plain) == {"inputs", "labels"}
    np.testing.assert_array_equal(plain["labels"], TOKENS[:, 1:])
    learned = causal_batch(rows(documents_BR=None), NOISE)["labels"]
    np.testing.assert_array_equal(learned, np.where(LEARNED[:, 1:], TOKENS[:, 1:], -100))


SHAPES: dict[str, dict[str, Any]] = {
    "decoder": DECODER | {"vocab_size": 300, "max_position_embeddings": 40},
    "encoder": ENCODER | {"vocab_size": 301, "family": "encoder", "max_position_embeddings": 64},
    "t5": T5_SHAPE | {"vocab_size": 310, "family": "t5", "start_token_id": 2, "end_token_id": 0},
}


def first_steps(config: TrainingConfig) -> list[tuple[float, float, int]]:
    """Mean loss, gradient norm and number of labels of the first global batches, without an update."""
    model, _ = sharded_model(config)
    device, objective, found = torch.device("cpu"), method_of(config.shape).objective, []
    for batch in read_batches(config, 0, dist.get_rank(), dist.get_world_size(), device):
        totals = accumulate(model, objective, batch, config.run)
        square = sum(float(g.full_tensor().double().square().sum()) for g in gradients(model))
        found.append((float(totals[0] / totals[1]), square**0.5, int(totals[1])))
        model.zero_grad()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("family", ["decoder", "t5"])
def test_pairs_are_learned_from_alike_on_any_number_of_ranks(tmp_path: Path, family: str) -> None:
    write_pairs(tmp_path)
    config = make_config(tmp_path, model=SHAPES[family], num_steps=3)
    check(config, Artifact.open(config.tokens, "tokens"))

    [single], pair = run_on_ranks(1, first_steps, config), run_on_ranks(2, first_steps, config)
    assert len(single) == 3
    for rank in pair:
        for ours, expected in zip(rank, single, strict=True):
            assert ours == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("masks", "has_documents"), [(None, True), (True, True), (False, False)])
def test_documents_of_rows_that_tell_what_is_learned_are_kept_apart_unless_told_otherwise(
    tmp_path: Path, masks: bool | None, has_documents: bool
) -> None:
    write_pairs(tmp_path)
    config = make_config(tmp_path, model=SHAPES["decoder"], masks_documents=masks)
    batch = next(read_batches(config, 0, 0, 1, torch.device("cpu")))
    assert ("documents" in batch) == has_documents
    assert 0 < (batch["labels"] != -100).sum() < batch["labels"].numel()


def test_documents_of_plain_rows_are_kept_apart_only_where_asked_for(tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens")
    assert set(next(read_batches(make_config(tmp_path), 0, 0, 1, torch.device("cpu")))) == {"inputs", "labels"}
    with pytest.raises(InputError, match="the shards have no column `starts`"):
        next(read_batches(make_config(tmp_path, masks_documents=True), 0, 0, 1, torch.device("cpu")))


@pytest.mark.parametrize(
    ("family", "masks", "message"),
    [
        ("encoder", None, "tells which tokens are answers, and an encoder writes none"),
        ("t5", False, r"masks_documents: a source and its target belong together\n  got: False\n  allowed: true, null"),
    ],
)
def test_what_a_family_cannot_learn_from_answers_is_refused(tmp_path: Path, family: str, masks: Any, message: str) -> None:
    tokens = write_pairs(tmp_path)
    with pytest.raises(ConfigError, match=message):
        check(make_config(tmp_path, model=SHAPES[family], masks_documents=masks), tokens)


def test_a_t5_takes_no_documents_in_its_spans_and_no_records_of_several_answers(tmp_path: Path) -> None:
    plain = write_tokens(tmp_path / "tokens")
    config = make_config(tmp_path, model=SHAPES["t5"], masks_documents=True)
    with pytest.raises(ConfigError, match="spans are hidden without regard to documents"):
        check(config, plain)
    counts = dict(plain.manifest.counts) | {"num_learned_tokens": 9, "num_answers": 8, "num_documents": 4}
    several = Artifact(plain.path, plain.manifest.model_copy(update={"counts": counts}))
    with pytest.raises(ConfigError, match=r"records with several answers\n  got: 8 answers in 4 records"):
        check(make_config(tmp_path, model=SHAPES["t5"]), several)

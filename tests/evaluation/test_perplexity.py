from __future__ import annotations

import math
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from fakes import TEXTS, tiny_decoder, tiny_tokenizer, write_tiny_model
from powerhouse.evaluation.perplexity import nats_of_documents, unigram_nats, xz_bits_per_byte
from powerhouse.heldout import bits_per_byte, cut_into_windows
from powerhouse.models.hub import load_decoder


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 11])
def test_every_token_is_a_label_once_and_its_input_is_the_token_before_it(length: int) -> None:
    document = list(range(1, length + 1))
    windows = cut_into_windows([document], context=4, end_of_text_id=0)

    is_valid = windows.labels_WT != -100
    assert windows.labels_WT[is_valid].tolist() == document
    assert windows.inputs_WT[is_valid].tolist() == [0, *document[:-1]]
    assert windows.owner_W.tolist() == [0] * math.ceil(length / 4)


def test_documents_do_not_see_each_other() -> None:
    model, tokenizer = tiny_decoder(), tiny_tokenizer()
    documents = tokenizer.encode_batch(TEXTS)

    together = nats_of_documents(model, documents, 0, batch_windows=2)

    alone = [nats_of_documents(model, [document], 0, batch_windows=16)[0] for document in documents]
    assert together == pytest.approx(alone, rel=1e-5)


def test_a_document_within_the_context_costs_what_transformers_says(tmp_path: Path) -> None:
    directory = write_tiny_model(tmp_path / "model")
    document = tiny_tokenizer().encode(TEXTS[0])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ids_BT = torch.tensor([[0, *document]])

    with torch.no_grad():
        expected = theirs(ids_BT, labels=ids_BT).loss.item() * len(document)

    assert nats_of_documents(load_decoder(directory), [document], 0, 4) == pytest.approx([expected], rel=1e-5)


def test_an_even_guess_over_a_vocabulary_costs_its_logarithm() -> None:
    model = tiny_decoder()
    for parameter in model.parameters():
        parameter.data.zero_()

    assert nats_of_documents(model, [[1, 2, 3], []], 0, 4) == pytest.approx([3 * math.log(300), 0.0])


def test_bits_per_byte_of_a_fair_coin_flip_per_byte_is_one() -> None:
    assert bits_per_byte(10 * math.log(2), 10.0) == pytest.approx(1.0)


def test_unigram_probabilities_are_smoothed_by_one_and_sum_to_one() -> None:
    costs_V = unigram_nats(np.array([7, 0, 1]))

    np.testing.assert_allclose(np.exp(-costs_V), np.array([8, 1, 2]) / 11)


def test_xz_is_the_size_of_the_command_line_tools_stream() -> None:
    texts = [text * 40 for text in TEXTS]
    data = "".join(texts).encode()

    stream = subprocess.run(["xz", "-9", "--stdout"], input=data, capture_output=True, check=True).stdout

    assert xz_bits_per_byte(texts) == pytest.approx(8 * len(stream) / len(data))

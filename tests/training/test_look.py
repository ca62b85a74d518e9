"""Held-out figures and samples of every family and of a soft prompt, beside transformers and peft; what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers

from distributed import run_on_ranks
from fakes import tiny_tokenizer, write_tiny_model
from powerhouse.corpora.shards import TokenRows
from powerhouse.errors import ConfigError
from powerhouse.heldout import bits_per_byte
from powerhouse.telemetry import read_metrics
from powerhouse.training.checks import check_watch
from powerhouse.training.config import TrainingConfig, read_shape
from powerhouse.training.noise import mask_tokens
from powerhouse.training.watch import METRICS, SAMPLES
from tiny_run import HELDOUT_TEXTS, ROW_LENGTH, SHAPES, make_config, run_loop, write_heldout, write_pairs, write_tokens

T5 = SHAPES["t5"] | {"vocab_size": 310, "start_token_id": 2}


def last_look(config: TrainingConfig) -> dict[str, Any]:
    """Train two steps on two ranks, and give the last line."""
    assert run_on_ranks(2, run_loop, config) == [None, None]
    last: dict[str, Any] = read_metrics(config.output / METRICS)[-1]
    return last


@pytest.mark.slow
def test_an_encoders_held_out_loss_is_transformers_at_the_hidden_tokens(tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens")
    config = make_config(tmp_path, model=SHAPES["encoder"], num_steps=2, watch={"heldout": write_heldout(tmp_path)})

    seen = last_look(config)

    ids = [token for text in HELDOUT_TEXTS for token in (*tiny_tokenizer().encode(text), 0)]
    rows = np.resize(np.array(ids, dtype=np.int32), (len(ids) // ROW_LENGTH, ROW_LENGTH))
    hidden, labels = mask_tokens(rows, np.arange(len(rows)), seed=0, share=0.15, mask_id=300, vocab_size=300)
    theirs = transformers.BertForMaskedLM.from_pretrained(config.output)
    expected = theirs(input_ids=torch.from_numpy(hidden), labels=torch.from_numpy(labels)).loss
    assert seen["heldout_loss"] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.slow
def test_a_t5_that_learns_pairs_is_scored_on_pairs_kept_aside_and_answers_the_prompts(tmp_path: Path) -> None:
    heldout = write_pairs(tmp_path).path  # the same ones: here it matters only how they are scored
    watch = {"heldout": heldout, "num_heldout": 3, "prompts": ["Who?"], "sample_tokens": 3}
    config = make_config(tmp_path, model=T5, num_steps=2, masks_documents=True, watch=watch)

    seen = last_look(config)

    theirs = transformers.T5ForConditionalGeneration.from_pretrained(config.output)
    rows, nats, num_tokens = TokenRows(heldout / "rows"), 0.0, 0
    taken = zip(*(take(np.arange(3)) for take in (rows.take, rows.take_documents, rows.take_learned)), strict=True)
    for tokens, documents, learned in taken:
        for number in np.unique(documents[learned]):  # each pair alone, with no packing
            here = documents == number
            target = torch.from_numpy(tokens[here & learned].astype(np.int64))[None]
            source = torch.tensor([[*tokens[here & ~learned].tolist(), 0]])
            nats += theirs(input_ids=source, labels=target).loss.item() * target.shape[1]
            num_tokens += target.shape[1]
    assert seen["heldout_loss"] == pytest.approx(nats / num_tokens, rel=1e-4)
    asked = torch.tensor([[*tiny_tokenizer().encode("Who?"), 0]])
    answer = theirs.generate(asked, max_new_tokens=3, do_sample=False, use_cache=False)[0, 1:].tolist()
    written = answer[: answer.index(0)] if 0 in answer else answer
    assert read_metrics(config.output / SAMPLES)[-1]["text"] == tiny_tokenizer().decode(written)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_soft_prompt_stands_before_every_window_that_is_scored(tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens")
    base, heldout = write_tiny_model(tmp_path / "base", num_hidden_layers=2), write_heldout(tmp_path)
    adapter = {"kind": "prompt", "num_tokens": 3}
    values = {"model": None, "start_from": base, "adapter": adapter, "num_steps": 2, "watch": {"heldout": heldout}}
    config = read_shape(make_config(tmp_path, **values))

    seen = last_look(config)

    theirs = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), config.output)
    nats = 0.0
    for ids in map(tiny_tokenizer().encode, HELDOUT_TEXTS):
        for start in range(0, len(ids), ROW_LENGTH - 1):
            labels = ids[start : start + ROW_LENGTH - 1]
            inputs = torch.tensor([[0, *ids][start : start + len(labels)]])
            logits = theirs(input_ids=inputs).logits[0, -len(labels) :]
            nats += torch.nn.functional.cross_entropy(logits, torch.tensor(labels), reduction="sum").item()
    expected = bits_per_byte(nats, len("".join(HELDOUT_TEXTS).encode()))
    assert seen["heldout_bits_per_byte"] == pytest.approx(expected, rel=1e-5)


def test_a_figure_that_would_say_nothing_of_the_run_is_refused(tmp_path: Path) -> None:
    pairs, corpus = write_pairs(tmp_path).path, write_heldout(tmp_path)
    (tmp_path / "plain").mkdir()
    write_tokens(tmp_path / "plain" / "tokens")
    encoder = SHAPES["encoder"] | {"max_position_embeddings": 64}

    check_watch(make_config(tmp_path / "plain", watch={"heldout": pairs}))  # a decoder may learn all and be asked for answers
    for folder, changes, message in (
        (tmp_path, {"model": T5, "watch": {"heldout": corpus}}, "watch.heldout: a corpus has no pairs, which this run learns"),
        (tmp_path / "plain", {"model": encoder, "watch": {"heldout": pairs}}, "and an encoder writes none"),
        (tmp_path / "plain", {"model": encoder, "watch": {"prompts": ["Who?"]}}, "watch.prompts: an encoder writes no texts"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_watch(make_config(folder, **changes))

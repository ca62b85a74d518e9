"""The evaluation job for real: actors score held-out documents of a corpus."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fakes import TEXTS, tiny_tokenizer, write_tiny_model
from powerhouse import artifacts
from powerhouse.artifacts import Counts
from powerhouse.engine import EngineConfig
from powerhouse.engine.offline import OfflineModel
from powerhouse.errors import InputError, ModelFormatError
from powerhouse.evaluation.families import open_plain_decoder
from powerhouse.evaluation.launch import EvaluationConfig, evaluate_model
from powerhouse.evaluation.perplexity import nats_of_documents
from powerhouse.evaluation.plans import make_plan
from powerhouse.evaluation.task_scores import make_plans, open_model
from powerhouse.heldout import read_heldout
from powerhouse.models.hub import load_decoder
from tiny_run import write_tokens

HELDOUT = [*TEXTS, "", "one more"]


@pytest.fixture
def config(tmp_path: Path) -> EvaluationConfig:
    write_tiny_model(tmp_path / "model")
    write_tokens(tmp_path / "tokens")
    artifacts.produce(tmp_path / "corpus", "corpus", {}, {"text": "tiny"}, write_heldout)
    names = ("model", "corpus", "tokens", "output")
    return EvaluationConfig.model_validate(
        {name: tmp_path / name for name in names} | {"num_actors": 2, "cpus_per_actor": 0.5, "batch_windows": 2}
    )


def write_heldout(folder: Path) -> Counts:
    (folder / "heldout").mkdir()
    for number, texts in enumerate((HELDOUT[:2], HELDOUT[2:])):
        pq.write_table(pa.table({"text": texts}), folder / "heldout" / f"part-{number}.parquet")
    return {"documents": len(HELDOUT)}


@pytest.mark.slow
def test_actors_give_the_bits_per_byte_of_one_process_beside_both_baselines(config: EvaluationConfig, local_ray: str) -> None:
    evaluation = evaluate_model(config)

    scores = json.loads((evaluation.path / "scores.json").read_text())
    texts = [text for text in HELDOUT if text]
    nats = nats_of_documents(load_decoder(config.model), tiny_tokenizer().encode_batch(texts), 0, 8)
    num_bytes = len("".join(texts).encode())
    assert scores["bits_per_byte"]["value"] == pytest.approx(sum(nats) / np.log(2) / num_bytes, rel=1e-6)
    assert set(scores) == {"bits_per_byte", "unigram_bits_per_byte", "xz_bits_per_byte"}
    for score in scores.values():
        assert score["n"] == len(texts)
        assert score["signature"].startswith("metric:bits_per_byte|")
    low, high = scores["unigram_bits_per_byte"]["interval"]
    assert low < scores["unigram_bits_per_byte"]["value"] < high
    assert evaluation.manifest.counts["bytes"] == num_bytes
    assert set(evaluation.manifest.inputs) == {"model", "corpus", "tokens"}


@pytest.mark.slow
def test_actors_with_the_engine_answer_tasks_as_the_plain_model_does(
    config: EvaluationConfig, local_ray: str, tmp_path: Path
) -> None:
    rows = [{"text": text[:40], "label": label} for text, label in zip(TEXTS * 2, ["good", "bad"] * 3, strict=True)]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = {"good": ["was"], "bad": ["the"]}
    label = {"kind": "label", "data": "items.jsonl", "template": "{text} it [MASK]", "labels": words, "target": "label"}
    read = {"kind": "read", "data": "items.jsonl"}
    changes = {"corpus": None, "tokens": None, "tasks": {"mood": label, "text": read}, "num_actors": 1}
    tasks = EvaluationConfig.model_validate(config.model_dump() | changes)
    open_decoder = partial(OfflineModel, config=EngineConfig(device="cpu", num_threads=1))

    fast = evaluate_model(tasks, open_decoder)
    replies = dict(json.loads(line) for line in (fast.path / "replies.jsonl").read_text().splitlines())
    questions = [question for plan in make_plans(tasks).values() for question in plan.questions()]
    assert replies.keys() == {question.key for question in questions}
    for question, slow in zip(questions, open_model(tasks, open_plain_decoder)(questions), strict=True):
        assert replies[question.key].keys() == slow.keys()
        for name, values in slow.items():
            assert replies[question.key][name] == pytest.approx(values, rel=1e-5), (question, name)
    too_long = tasks.tasks["mood"].model_copy(update={"template": "{text} " * 20 + "[MASK]"})
    with pytest.raises(InputError, match=r"^a prompt is too long for the model\n  got: \d+ tokens"):
        open_model(tasks, open_decoder)(list(make_plan(too_long).questions()))

    assert json.loads((fast.path / "scores.json").read_text()).keys() > {"mood.accuracy", "text.bits_per_byte"}
    assert evaluate_model(tasks, open_decoder).manifest == fast.manifest
    samples = (fast.path / "samples" / "mood.jsonl").read_text().splitlines()
    assert [json.loads(line)["item"] for line in samples] == list(range(6))


def test_held_out_documents_come_in_the_order_of_their_files_without_the_empty_ones(tmp_path: Path) -> None:
    write_heldout(tmp_path)

    assert read_heldout(tmp_path / "heldout") == [text for text in HELDOUT if text]


def test_a_model_directory_that_is_not_there_is_refused_before_any_work(config: EvaluationConfig) -> None:
    with pytest.raises(ModelFormatError, match="no such model directory"):
        evaluate_model(config.model_copy(update={"model": config.model / "nowhere"}))


def test_a_corpus_without_or_with_damaged_held_out_documents_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no held-out documents"):
        read_heldout(tmp_path / "heldout")

    (tmp_path / "part.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(InputError, match="damaged held-out documents"):
        read_heldout(tmp_path)

"""Tasks put to a model: what is asked is planned first, asked where there is no reply yet, and judged at the end."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from powerhouse.artifacts import write_atomically
from powerhouse.device import choose_device, to_dtype
from powerhouse.errors import InputError
from powerhouse.evaluation.asking import Question, Reply, Respondent
from powerhouse.evaluation.endpoint import Endpoint, ask_endpoint
from powerhouse.evaluation.families import open_respondent
from powerhouse.evaluation.plans import Plan, make_plan
from powerhouse.evaluation.reading import DecoderRespondent, TokenModel
from powerhouse.evaluation.records import digest_of
from powerhouse.evaluation.replies import Replies, collect, missing
from powerhouse.evaluation.results import ROWS, SAMPLES, Result, item_key, judge
from powerhouse.evaluation.settings import EvaluationConfig
from powerhouse.models.decoder import DecoderConfig
from powerhouse.models.hub import open_checkpoint
from powerhouse.prompting import Encode
from powerhouse.tokenizer import Tokenizer

Made = TypeVar("Made")

OpenDecoder = Callable[[Path], TokenModel]
"""Loads a decoder's directory to score and write many rows at once: the engine, for who has one."""


def score_tasks(folder: Path, config: EvaluationConfig, open_decoder: OpenDecoder) -> dict[str, Result]:
    """Ask what has no reply in the folder yet, and write what every task's items add up to, and the items themselves.

    Raises:
        InputError: a task and its data, or a task and the model, do not fit.
        ClusterError: the endpoint has stopped to answer, or actors died; what was answered is kept.
    """
    plans = make_plans(config)
    _check_plans(plans, config)
    with Replies(folder) as replies:
        questions = missing((question for plan in plans.values() for question in plan.questions()), replies.by_key)
        if questions:
            asking = ask_endpoint(config.endpoint, questions) if config.endpoint else ask_pool(config, questions, open_decoder)
            collect(questions, asking, replies)
        results = {name: _judge(name, plan, config, replies.by_key) for name, plan in plans.items()}
    for name, result in results.items():
        _write(folder, name, plans[name], result)
    return results


def make_plans(config: EvaluationConfig) -> dict[str, Plan]:
    """Read the data of all tasks.

    Raises:
        InputError: a task and its data do not fit.
    """
    return {name: _named(name, partial(make_plan, task)) for name, task in config.tasks.items()}


def _check_plans(plans: Mapping[str, Plan], config: EvaluationConfig) -> None:
    for name, plan in plans.items():
        _named(name, partial(plan.check, _encoder(config)))


def _encoder(config: EvaluationConfig) -> Encode:
    if config.endpoint:
        return Endpoint(config.endpoint).tokenizer.encode_batch
    assert config.model is not None, "a directory is given"
    return Tokenizer.load(config.model).encode_batch


def _judge(name: str, plan: Plan, config: EvaluationConfig, replies: Mapping[str, Reply]) -> Result:
    task = config.tasks[name]
    facts = task.facts() | {"data": digest_of(task.data)[:8]} | ({"limit": task.limit} if task.limit else {})
    return _named(name, partial(judge, plan, task.used_metrics(), facts, replies))


def _named(name: str, act: Callable[[], Made]) -> Made:
    """Do it; a mistake is told with the task that it is in."""
    try:
        return act()
    except InputError as error:
        raise InputError(f"task {name}: {error}") from None


def _write(folder: Path, name: str, plan: Plan, result: Result) -> None:
    for part in (ROWS, SAMPLES):
        (folder / part).mkdir(exist_ok=True)
    metrics = [{"settings": metric.model_dump(mode="json"), "rows": rows_NS.tolist()} for metric, rows_NS in result.rows]
    kept = {"items": [item_key(row) for row in plan.rows], "metrics": metrics}
    write_atomically(folder / ROWS / f"{name}.json", json.dumps(kept))
    lines = [json.dumps(sample, ensure_ascii=False) + "\n" for sample in result.samples]
    write_atomically(folder / SAMPLES / f"{name}.jsonl", "".join(lines))


def ask_pool(
    config: EvaluationConfig, questions: Mapping[str, Question], open_decoder: OpenDecoder
) -> Iterator[tuple[str, Reply]]:
    """Ask a model directory that actors hold, and give the replies as they come."""
    from powerhouse.evaluation.pool import in_pool  # Ray takes a second to load: not for an endpoint, nor for --check

    ordered = sorted(questions.values(), key=lambda question: question.text)  # those that begin alike are neighbours
    columns = {"key": [question.key for question in ordered], "question": [question.text for question in ordered]}
    for row in in_pool(Answerer, (config, open_decoder), columns, config):
        yield row["key"], json.loads(row["reply"])


class Answerer:
    """A Ray Data actor: questions in, replies out."""

    def __init__(self, config: EvaluationConfig, open_decoder: OpenDecoder) -> None:
        self._respond = open_model(config, open_decoder)

    def __call__(self, batch: dict[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        replies = self._respond([Question.parse(text) for text in batch["question"]])
        return {"key": batch["key"], "reply": np.array([json.dumps(reply) for reply in replies])}


def open_model(config: EvaluationConfig, open_decoder: OpenDecoder) -> Respondent:
    """A decoder by what is given, any other family and any adapter in plain torch.

    Raises:
        InputError: the directory is missing or damaged, or answers no questions.
    """
    assert config.model is not None, "a directory is given"
    device = choose_device(config.device)
    if device.type == "cpu":
        torch.set_num_threads(config.num_threads)
    if config.adapter is None and isinstance(open_checkpoint(config.model).config, DecoderConfig):
        return DecoderRespondent(open_decoder(config.model))
    return open_respondent(config.model, adapter=config.adapter, dtype=to_dtype(config.precision), device=device)

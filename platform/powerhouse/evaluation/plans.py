"""What a task asks of each of its items, and what the replies say: no model, no Ray, no file but the data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from powerhouse.errors import InputError
from powerhouse.evaluation.asking import Question, Reply
from powerhouse.evaluation.records import Row, read_rows
from powerhouse.evaluation.tasks import BaseTask, ChoiceTask, ExamplesConfig, LabelTask, ReadingTask, WritingTask
from powerhouse.prompting import (
    CONTENT_FREE,
    Encode,
    Example,
    Prompt,
    Verbalizer,
    calibrate,
    choose_examples,
    orders_of,
    slot_row,
)

Replies = Mapping[str, Reply]


def make_plan(task: BaseTask) -> Plan:
    """Read the data and make the questions.

    Raises:
        InputError: the data, the template or the words cannot be used.
    """
    plans: dict[type[BaseTask], Any] = {
        LabelTask: LabelPlan,
        ChoiceTask: ChoicePlan,
        WritingTask: WritingPlan,
        ReadingTask: ReadingPlan,
    }
    plan: Plan = plans[type(task)](task)
    return plan


@dataclass(frozen=True)
class Said:
    """What came of one item."""

    hypothesis: str
    references: tuple[str, ...]
    details: Mapping[str, Any]
    """For people: probabilities, the answer's number."""


class Plan:
    """Questions of all items, and their reading. An item may be asked in several ways, its variants."""

    num_variants = 1

    def __init__(self, task: BaseTask, columns: Sequence[str]) -> None:
        self.rows = read_rows(task.data, columns, task.limit)
        self.shown: list[Prompt] = []
        """Of each item the first variant, for people."""

    def questions(self) -> Iterator[Question]:
        raise NotImplementedError

    def said(self, number: int, variant: int, replies: Replies) -> Said:
        """What the model said to an item."""
        raise NotImplementedError

    def check(self, encode: Encode) -> None:
        """Hold the task against a tokenizer, before anything is asked."""


class LabelPlan(Plan):
    def __init__(self, task: LabelTask) -> None:
        template, self._verbalizer = task.make_template(), Verbalizer(task.labels)
        super().__init__(task, [*sorted(template.fields), task.target])
        self._template, self._task = template, task
        self.num_variants = task.examples.num_orders if task.examples else 1
        self._truth = [self._label(task.data, number, row[task.target]) for number, row in enumerate(self.rows, 1)]
        self._shots = self._draw(task.examples) if task.examples else [[[]] for _ in self.rows]
        self._asked = [[self._ask(row, shots) for shots in ways] for row, ways in zip(self.rows, self._shots, strict=True)]
        self._free = [[self._ask_content_free(row, shots) for shots in ways]
                      for row, ways in zip(self.rows, self._shots, strict=True)]  # fmt: skip
        self.shown = [ways[0].prompt for ways in self._asked]

    def _label(self, path: Path, number: int, label: object) -> str:
        try:
            return self._verbalizer.labels[self._verbalizer.index_of(label)]
        except InputError as error:
            raise InputError(f"{path}: row {number}: {error}") from None

    def _draw(self, config: ExamplesConfig) -> list[list[list[tuple[Row, str]]]]:
        """Of each item, the examples in each of their orders."""
        rows = read_rows(config.data, [*sorted(self._template.fields), self._task.target])
        pool = [
            Example(row, self._label(config.data, number, row[self._task.target]), self._text(row))
            for number, row in enumerate(rows, 1)
        ]
        if config.choice != "nearest":
            chosen = choose_examples(pool, config.num, config.choice, config.seed)
            return [self._orders(chosen, config)] * len(self.rows)
        found = (choose_examples(pool, config.num, config.choice, config.seed, self._text(row)) for row in self.rows)
        return [self._orders(chosen, config) for chosen in found]

    def _orders(self, chosen: Sequence[Example], config: ExamplesConfig) -> list[list[tuple[Row, str]]]:
        orders = orders_of(chosen, config.num_orders, config.seed)
        return [[(dict(example.item), self._verbalizer.word_of(example.label)) for example in order] for order in orders]

    def _text(self, row: Row) -> str:
        return " ".join(str(row[name]) for name in sorted(self._template.fields))

    def _ask(self, row: Row, shots: Sequence[tuple[Row, str]]) -> Question:
        return Question("answers", self._template.fill(row, shots), self._verbalizer.words)

    def _ask_content_free(self, row: Row, shots: Sequence[tuple[Row, str]]) -> list[Question]:
        texts = CONTENT_FREE if self._task.calibrated else ()
        return [self._ask(row | dict.fromkeys(self._template.fields, text), shots) for text in texts]

    def questions(self) -> Iterator[Question]:
        for asked, free in zip(self._asked, self._free, strict=True):
            yield from asked
            for questions in free:
                yield from questions

    def said(self, number: int, variant: int, replies: Replies) -> Said:
        probabilities = self._probabilities(self._asked[number][variant], replies)
        if free := self._free[number][variant]:
            probabilities = calibrate(probabilities, np.array([self._probabilities(question, replies) for question in free]))
        labels = self._verbalizer.labels
        shares = {label: round(float(share), 6) for label, share in zip(labels, probabilities, strict=True)}
        return Said(labels[int(probabilities.argmax())], (self._truth[number],), {"probabilities": shares})

    def _probabilities(self, question: Question, replies: Replies) -> Any:
        return self._verbalizer.probabilities(replies[question.key]["logprobs"])

    def check(self, encode: Encode) -> None:
        prompt = self._asked[0][0].prompt
        self._verbalizer.check_tokens([slot_row(encode, prompt, word).answer for word in self._verbalizer.words])


class ChoicePlan(Plan):
    def __init__(self, task: ChoiceTask) -> None:
        template = task.make_template()
        columns = [task.choices] if isinstance(task.choices, str) else list(task.choices)
        super().__init__(task, [*sorted(template.fields), *columns, task.target])
        self._task = task
        self._answers = [_answers_of(task, number, row) for number, row in enumerate(self.rows, 1)]
        self._truth = [_number_of(task, number, row, answers)
                       for number, (row, answers) in enumerate(zip(self.rows, self._answers, strict=True), 1)]  # fmt: skip
        self._asked = [Question("answers", template.fill(row), answers)
                       for row, answers in zip(self.rows, self._answers, strict=True)]  # fmt: skip
        self.shown = [question.prompt for question in self._asked]

    def questions(self) -> Iterator[Question]:
        return iter(self._asked)

    def said(self, number: int, variant: int, replies: Replies) -> Said:
        reply, answers = replies[self._asked[number].key], self._answers[number]
        lengths = {
            "answer": [1] * len(answers),
            "character": [len(answer) for answer in answers],
            "byte": [len(answer.encode()) for answer in answers],
            "token": reply["num_tokens"],
        }[self._task.per]
        scores = [logprob / length for logprob, length in zip(reply["logprobs"], lengths, strict=True)]
        details = {"logprobs": [round(logprob, 4) for logprob in reply["logprobs"]], "answers": list(answers)}
        return Said(str(int(np.argmax(scores))), (str(self._truth[number]),), details)


class WritingPlan(Plan):
    def __init__(self, task: WritingTask) -> None:
        template = task.make_template()
        super().__init__(task, [*sorted(template.fields), *task.references])
        self._asked = [Question("write", template.fill(row), writing=task.writing) for row in self.rows]
        self._references = [_references_of(task, row) for row in self.rows]
        self.shown = [question.prompt for question in self._asked]

    def questions(self) -> Iterator[Question]:
        return iter(self._asked)

    def said(self, number: int, variant: int, replies: Replies) -> Said:
        return Said(str(replies[self._asked[number].key]["text"]).strip(), self._references[number], {})


class ReadingPlan(Plan):
    def __init__(self, task: ReadingTask) -> None:
        super().__init__(task, [task.column])
        self.texts = [str(row[task.column]) for row in self.rows]
        if (empty := next((number for number, text in enumerate(self.texts, 1) if not text), None)) is not None:
            raise InputError(f"{task.data}: row {empty} has no text to read", do="leave it out of the data")
        self.shown = [Prompt(text) for text in self.texts]
        self._asked = [Question("read", prompt, window=task.window) for prompt in self.shown]

    def questions(self) -> Iterator[Question]:
        return iter(self._asked)

    def read(self, replies: Replies) -> list[tuple[float, int]]:
        """Nats and tokens of each text."""
        found = [replies[question.key] for question in self._asked]
        return [(reply["nats"], reply["num_tokens"]) for reply in found]


def _answers_of(task: ChoiceTask, number: int, row: Row) -> tuple[str, ...]:
    found = row[task.choices] if isinstance(task.choices, str) else [row[name] for name in task.choices]
    if not isinstance(found, list) or len(found) < 2:
        raise InputError(f"{task.data}: row {number} has no list of answers", got=repr(found)[:80], allowed="two or more")
    return tuple(map(str, found))


def _number_of(task: ChoiceTask, number: int, row: Row, answers: Sequence[str]) -> int:
    right = str(row[task.target])
    if right in answers:
        return answers.index(right)
    if right.isdecimal() and int(right) < len(answers):
        return int(right)
    allowed = f"0 to {len(answers) - 1}, or one of the answers"
    raise InputError(f"{task.data}: row {number}: unknown label", got=f"{task.target}={right!r}", allowed=allowed)


def _references_of(task: WritingTask, row: Row) -> tuple[str, ...]:
    return tuple(str(text) for name in task.references for text in (row[name] if isinstance(row[name], list) else [row[name]]))

"""Tasks as a YAML file declares them: data, a template, what may stand in its slot."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from powerhouse.config import Config, StoragePath
from powerhouse.evaluation.asking import Writing
from powerhouse.evaluation.labels import Accuracy, LabelF1
from powerhouse.evaluation.metric import Metric
from powerhouse.evaluation.metrics import AnyMetric
from powerhouse.prompting import Template


class ExamplesConfig(Config):
    """Examples that stand before each question."""

    data: StoragePath
    """Items to draw from, with the columns of the task's own data; keep them apart from it."""
    num: int = Field(gt=0)
    """Examples before each question."""
    choice: Literal["seeded", "balanced", "nearest"] = "balanced"
    """At random; as many of each label as can be; or the most alike to each item."""
    seed: int = Field(default=0, ge=0)
    """Of the draw and of the orders."""
    num_orders: int = Field(default=1, gt=0)
    """Orders of the same examples; every item is asked in each."""


class BaseTask(Config):
    """A data file and what is asked of each of its rows."""

    data: StoragePath
    """File of items: .jsonl, .csv, .tsv or .parquet."""
    limit: int | None = Field(default=None, gt=0)
    """Only the first so many items."""

    def files(self) -> dict[str, Path]:
        """Data that the task reads."""
        return {"data": self.data}

    def used_metrics(self) -> tuple[Metric, ...]:
        """What is measured, the first one deciding which samples are the best."""
        return ()

    def facts(self) -> dict[str, Any]:
        """What the signature says of how the items were asked."""
        raise NotImplementedError


class TemplateTask(BaseTask):
    template: str
    """Text with columns in braces and one slot, as in "Review: {text}\\nSentiment: [MASK]"."""
    user: str | None = None
    """The user's turn of a chat; `template` is then the answer that begins, "[MASK]" alone at the least."""

    def make_template(self) -> Template:
        return Template(self.template, self.user)

    def facts(self) -> dict[str, Any]:
        return {"template": short_hash(f"{self.template}\0{self.user}")}


class LabelTask(TemplateTask):
    """The likeliest label: P(label | item) is the sum over its words of their probability in the slot."""

    kind: Literal["label"]
    """Labels by their words."""
    labels: dict[str, tuple[str, ...]]
    """Words that say each label."""
    target: str
    """Column with the true label."""
    calibrated: bool = False
    """Take out what the prompt answers to items without content (Zhao et al. 2021)."""
    examples: ExamplesConfig | None = None
    """Examples before each question; none where left out."""

    metrics: tuple[AnyMetric, ...] = ()
    """What is measured; accuracy and the labels' F1 where left out."""

    def files(self) -> dict[str, Path]:
        return super().files() | ({"examples": self.examples.data} if self.examples else {})

    def used_metrics(self) -> tuple[Metric, ...]:
        return self.metrics or (Accuracy(), LabelF1(labels=tuple(self.labels)))

    def facts(self) -> dict[str, Any]:
        words = ";".join(f"{label}={','.join(words)}" for label, words in self.labels.items())
        shown = self.examples
        examples = f"{shown.num},{shown.choice},seed{shown.seed},orders{shown.num_orders}" if shown else 0
        return super().facts() | {"labels": words, "calibrated": self.calibrated, "examples": examples}


class ChoiceTask(TemplateTask):
    """The likeliest of an item's own answers."""

    kind: Literal["choice"]
    """Answers by their text."""
    choices: tuple[str, ...] | str
    """Columns with the answers, or one column that holds their list."""
    target: str
    """Column with the number of the right answer, from 0, or its text."""
    per: Literal["answer", "character", "byte", "token"] = "answer"
    """Compare log-probabilities of whole answers, or divided by length: lm-evaluation-harness's acc, acc_norm, acc_bytes."""

    def used_metrics(self) -> tuple[Metric, ...]:
        return (Accuracy(),)

    def facts(self) -> dict[str, Any]:
        return super().facts() | {"per": self.per}


class WritingTask(TemplateTask):
    """A text, written from the slot on."""

    kind: Literal["write"]
    """Texts against references."""
    writing: Writing = Writing()
    """How it is written."""
    references: tuple[str, ...] = Field(min_length=1)
    """Columns with a right text each, or with a list of them."""
    metrics: tuple[AnyMetric, ...] = Field(min_length=1)
    """What is measured."""

    def used_metrics(self) -> tuple[Metric, ...]:
        return self.metrics

    def facts(self) -> dict[str, Any]:
        how = self.writing
        greedy = "greedy" if how.temperature == 0 else f"temperature{how.temperature},seed{how.seed}"
        return super().facts() | {"writing": f"{greedy},max{how.max_tokens},stop{json.dumps(how.stop)}"}


class ReadingTask(BaseTask):
    """How likely texts are: bits per byte, perplexities."""

    kind: Literal["read"]
    """The text itself."""
    column: str = "text"
    """Column with the text."""
    window: int | None = Field(default=None, gt=1)
    """Tokens read at a time; as many as the model can where left out."""

    def facts(self) -> dict[str, Any]:
        return {"windows": f"disjoint,{self.window or 'context'}"}


def short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


Task = Annotated[LabelTask | ChoiceTask | WritingTask | ReadingTask, Field(discriminator="kind")]

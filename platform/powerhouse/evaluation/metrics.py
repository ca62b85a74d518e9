"""Every metric, as a task file names them."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from powerhouse.evaluation.bertscore import BertScore
from powerhouse.evaluation.bleu import Bleu
from powerhouse.evaluation.labels import Accuracy, AnswerF1, ExactMatch, LabelF1
from powerhouse.evaluation.meteor import Meteor
from powerhouse.evaluation.rouge import Rouge

AnyMetric = Annotated[
    Accuracy | ExactMatch | AnswerF1 | LabelF1 | Bleu | Rouge | Meteor | BertScore, Field(discriminator="metric")
]
"""In YAML: `{metric: bleu, tokenizer: intl}`."""

"""The metrics by the name that a task file gives them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, SerializeAsAny

from powerhouse.evaluation.labels import Accuracy, AnswerF1, ExactMatch, LabelF1
from powerhouse.evaluation.likelihood import Likelihood
from powerhouse.evaluation.metric import Metric

METRICS: dict[str, type[Metric]] = {
    "accuracy": Accuracy,
    "exact_match": ExactMatch,
    "answer_f1": AnswerF1,
    "label_f1": LabelF1,
    "likelihood": Likelihood,
}


def make_metric(value: Any) -> Any:
    """The metric that a name, or a mapping with the name as `metric`, declares."""
    if isinstance(value, Metric):
        return value
    settings = {"metric": value} if isinstance(value, str) else value
    if not isinstance(settings, Mapping) or settings.get("metric") not in METRICS:
        raise ValueError(f"a name, or a mapping with `metric`, of {', '.join(METRICS)}")
    return METRICS[settings["metric"]].model_validate(settings)


AnyMetric = Annotated[SerializeAsAny[Metric], BeforeValidator(make_metric)]

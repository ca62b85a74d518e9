"""The steps of a corpus in their order: the one place where a step is added."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, field_validator

from powerhouse.config import Config
from powerhouse.corpora.dedup import RemoveDuplicates, Sign
from powerhouse.corpora.document import CorpusStep, DocumentStep, Outcome
from powerhouse.corpora.filters import Filter, QualityConfig
from powerhouse.corpora.redact import PERSONAL_COLUMNS, Redact
from powerhouse.corpora.sources import SourceConfig


class DocumentsConfig(Config):
    """What the document steps depend on: a change reads the text anew."""

    inputs: list[SourceConfig] = Field(min_length=1)
    """The folders of raw text."""
    chunk_chars: int = Field(default=4000, ge=200)
    """A plain text is cut at blank lines into documents of about this many characters."""
    phone_region: str = Field(default="US", pattern="^[A-Z]{2}$")
    """Country (ISO 3166) whose national phone numbers are found; international ones always are."""
    quality: QualityConfig = QualityConfig()
    """Limits of the quality rules."""

    @field_validator("inputs")
    @classmethod
    def _names_differ(cls, inputs: list[SourceConfig]) -> list[SourceConfig]:
        names = [source.name for source in inputs]
        if len(set(names)) < len(names):
            raise ValueError("sources with different names")
        return inputs


class CorpusStepsConfig(Config):
    """What the corpus steps depend on: a change only decides anew."""

    duplicate_threshold: float = Field(default=0.8, gt=0, le=1)
    """A document is removed if its estimated Jaccard similarity to a kept one reaches this."""


def make_document_steps(config: DocumentsConfig) -> list[DocumentStep]:
    """Make the steps of one worker; each sees the text that the ones before it left."""
    return [Redact(config.phone_region), Filter(config.quality), Sign()]


def make_corpus_steps(config: CorpusStepsConfig) -> list[CorpusStep]:
    """Make the steps of the driver; each sees the reasons that the ones before it gave."""
    return [CountPersonalData(), RemoveDuplicates(config.duplicate_threshold)]


class CountPersonalData:
    name = "personal_data"

    def __call__(self, index: pa.Table) -> Outcome:
        return Outcome(report=dict(self._counts(index)))

    def _counts(self, index: pa.Table) -> Iterator[tuple[str, int]]:
        for name, _ in PERSONAL_COLUMNS:
            yield name.removeprefix("num_"), pc.sum(index[name]).as_py() or 0

"""The steps of a corpus in their order: the one place where a step is added."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, field_validator, model_validator

from powerhouse.config import Config, StoragePath
from powerhouse.corpora import classifier
from powerhouse.corpora.bias import AuditBias, FindIdentities
from powerhouse.corpora.decontaminate import Decontaminate, EvaluationSetConfig, ReportContamination, digests, read_items
from powerhouse.corpora.dedup import RemoveDuplicates, Sign
from powerhouse.corpora.document import CorpusStep, DocumentStep, Outcome
from powerhouse.corpora.filters import Cut, QualityConfig
from powerhouse.corpora.language import Language
from powerhouse.corpora.redact import PERSONAL_COLUMNS, Redact, read_key
from powerhouse.corpora.repeats import HashLines, KeyUrl, RemoveLines, RemoveSameUrls
from powerhouse.corpora.scores import Score
from powerhouse.corpora.sources import SourceConfig
from powerhouse.corpora.toxicity import RateSentences, Toxicity


class SharedStepsConfig(Config):
    """What both kinds of step look at."""

    evaluation_sets: list[EvaluationSetConfig] = Field(default=[])
    """Test items; a document that holds 13 words in a row of one is left out. List those the models will be judged by."""
    max_documents_per_line: int | None = Field(default=None, ge=1)
    """A line that stands in more documents than this is taken out of all of them; null keeps every line."""
    rates_sentences: bool = False
    """Whether a classifier judges each sentence with a word of the toxic lexicon; its numbers (0.8 MB) are fetched once."""


class DocumentsConfig(SharedStepsConfig):
    """What the document steps depend on: a change reads the text anew."""

    inputs: list[SourceConfig] = Field(min_length=1)
    """The folders of raw text."""
    chunk_chars: int = Field(default=4000, ge=200)
    """A plain text is cut at blank lines into documents of about this many characters."""
    extract_timeout_s: float = Field(default=10, gt=0)
    """A page that takes more processor time than this to extract is left out."""
    phone_region: str = Field(default="US", pattern="^[A-Z]{2}$")
    """Country (ISO 3166) whose national phone numbers are found; international ones always are."""
    pseudonym_key_file: StoragePath | None = None
    """File with a key of at least 16 bytes, by which personal data become pseudonyms; without one they become tags."""

    @field_validator("inputs")
    @classmethod
    def _names_differ(cls, inputs: list[SourceConfig]) -> list[SourceConfig]:
        names = [source.name for source in inputs]
        if len(set(names)) < len(names):
            raise ValueError("sources with different names")
        return inputs


class CorpusStepsConfig(SharedStepsConfig):
    """What the corpus steps depend on: a change only decides anew."""

    quality: QualityConfig = QualityConfig()
    """Limits of the quality rules."""
    duplicate_threshold: float = Field(default=0.8, gt=0, le=1)
    """A document is removed if its estimated Jaccard similarity to a kept one reaches this."""
    max_source_duplicate_share: float = Field(default=0.5, ge=0, le=1)
    """A source that loses more of its documents than this as duplicates raises an alarm, in the log and in the report."""

    @model_validator(mode="after")
    def _sentences_are_rated_where_they_are_limited(self) -> Self:
        if "max_toxic_sentence_share" in self.quality.model_fields_set and not self.rates_sentences:
            raise ValueError("quality.max_toxic_sentence_share together with `rates_sentences: true`, which measures it")
        return self


def digest_inputs(config: DocumentsConfig) -> dict[str, str]:
    """Give the hashes of the files beside the text that the result depends on.

    Raises:
        InputError: one is missing, or cannot be fetched.
    """
    model = {"sentence_classifier": classifier.fetch()} if config.rates_sentences else {}
    keys = {"pseudonym_key": hashlib.sha256(key.encode()).hexdigest()} if (key := read_key(config.pseudonym_key_file)) else {}
    return digests(config.evaluation_sets) | keys | model


def make_document_steps(config: DocumentsConfig) -> list[DocumentStep]:
    """Make the steps of one worker; each sees the text that the ones before it left."""
    items = read_items(config.evaluation_sets)
    lines = [] if config.max_documents_per_line is None else [HashLines()]
    redact = Redact(config.phone_region, read_key(config.pseudonym_key_file))
    return [
        redact,
        Score(),
        Language(),
        Toxicity(),
        *([RateSentences()] if config.rates_sentences else []),
        FindIdentities(),
        *([Decontaminate(items)] if items else []),
        *lines,
        KeyUrl(),
        Sign(),
    ]


def make_corpus_steps(config: CorpusStepsConfig, folder: Path | None = None) -> list[CorpusStep]:
    """Make the steps of the driver; each sees the reasons that the ones before it gave. `folder` has room for what is large."""
    items = read_items(config.evaluation_sets)
    report = [ReportContamination(items)] if items else []
    lines = [] if config.max_documents_per_line is None else [RemoveLines(config.max_documents_per_line)]
    return [
        Cut(config.quality),
        AuditBias(),
        CountPersonalData(),
        *report,
        RemoveSameUrls(),
        RemoveDuplicates(config.duplicate_threshold, config.max_source_duplicate_share, folder),
        *lines,
    ]


class CountPersonalData:
    name = "personal_data"

    def __call__(self, index: pa.Table) -> Outcome:
        return Outcome(report=dict(self._counts(index)))

    def _counts(self, index: pa.Table) -> Iterator[tuple[str, int]]:
        for name, _ in PERSONAL_COLUMNS:
            yield name.removeprefix("num_"), pc.sum(index[name]).as_py() or 0

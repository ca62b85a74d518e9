from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from powerhouse.config import load
from powerhouse.corpora.classifier import PACKAGE, Classifier, Record, read_pickle
from powerhouse.corpora.document import Draft, RawDocument
from powerhouse.corpora.filters import Cut, QualityConfig
from powerhouse.corpora.process import DocumentProcessor, read_files
from powerhouse.corpora.sources import SourceConfig, list_files
from powerhouse.corpora.steps import CorpusStepsConfig, DocumentsConfig, digest_inputs, make_document_steps
from powerhouse.corpora.toxicity import RateSentences
from powerhouse.errors import ConfigError, InputError
from powerhouse.packages import cache_folder, download

# What profanity_check.predict_prob of alt-profanity-check 1.9.1 with scikit-learn 1.9.1 gives for each.
ORACLE = {
    "The cock crowed at dawn on Monday": 0.978255044862,
    "the hoe is a gardening tool": 0.982613051201,
    "You fucking bastard, go away now": 0.999999971016,
    "Jews are vermin and must be driven out": 0.164848254922,
    "The bitch gave birth to six puppies": 0.994325086926,
    "You are an idiot and a moron": 0.999999882225,
    "zzzz": 0.036375752016,
    "": 0.036375752016,
}
PROSE = "The farmers stayed in their houses until the rain was over. Nobody said a word about the harvest. "


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return Classifier.load()


@pytest.mark.slow
def test_probabilities_are_those_of_the_library_whose_numbers_are_read(classifier: Classifier) -> None:
    assert classifier(list(ORACLE)) == pytest.approx(list(ORACLE.values()), abs=1e-11)


@pytest.mark.slow
def test_many_texts_at_once_have_the_probabilities_of_each_alone(classifier: Classifier) -> None:
    texts = [*ORACLE, *(f"{one} {other} {one}" for one in ORACLE for other in ORACLE)]

    assert classifier(texts) == pytest.approx([float(classifier([text])[0]) for text in texts], abs=1e-14)
    assert len(classifier([])) == 0


@pytest.mark.slow
def test_a_sentence_is_toxic_where_lexicon_and_classifier_agree(classifier: Classifier) -> None:
    def rate(text: str) -> tuple[float, float]:
        draft = Draft(RawDocument(0, "text", text), text)
        RateSentences(classifier)(draft)
        return draft.columns["toxic_sentence_share"], draft.columns["worst_sentence_probability"]

    assert rate(PROSE + "You fucking bastard, go away now!") == (pytest.approx(1 / 3), pytest.approx(1.0, abs=1e-6))
    assert rate(PROSE + "You are an idiot.")[0] == 0  # no word of the lexicon: not asked
    assert rate(PROSE * 5 + "The cock crowed at dawn on Monday.")[0] == pytest.approx(1 / 11)  # one alone is under any limit
    assert rate(PROSE) == rate("") == rate("...") == (0, 0)


@pytest.mark.slow
def test_where_sentences_are_rated_a_text_of_insults_is_left_out_for_them(tmp_path: Path) -> None:
    texts = [PROSE * 5, (PROSE + "You are a bastard. ") * 5]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    inputs = [SourceConfig(name="s", kind="book", path=str(tmp_path))]
    steps = make_document_steps(DocumentsConfig(inputs=inputs, rates_sentences=True))
    index = pa.concat_tables([DocumentProcessor(steps, 60)(raw) for raw in read_files(list_files(inputs), 1000)])
    repeated = [limit for limit in QualityConfig.model_fields if limit.startswith(("max_repeated", "max_top"))]
    off = dict.fromkeys([*repeated, "max_toxic_word_share"], 1) | {"min_stop_words": 0}

    assert index["toxic_sentence_share"].to_pylist() == pytest.approx([0, 1 / 3])
    assert [(found.row, found.reason) for found in Cut(QualityConfig(**off))(index).removals] == [(1, "toxic_sentence_share")]


def test_a_limit_on_what_is_not_measured_is_refused() -> None:
    with pytest.raises(ConfigError, match="together with `rates_sentences: true`, which measures it"):
        load(CorpusStepsConfig, None, ["quality.max_toxic_sentence_share=0.05"])

    assert load(CorpusStepsConfig, None, ["quality.max_toxic_sentence_share=0.05", "rates_sentences=true"]).rates_sentences


class Command:
    """Pickled, it asks whoever unpickles it to make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_pickle_that_asks_for_a_call_is_refused_and_nothing_is_called(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds what it should not\n.*the name pathlib"):
        read_pickle(pickle.dumps(Command(tmp_path / "made")))

    assert not (tmp_path / "made").exists()
    pickle.loads(pickle.dumps(Command(tmp_path / "made")))
    assert (tmp_path / "made").exists()  # the same bytes do it where pickles are executed


def test_listed_names_become_records_that_are_never_called() -> None:
    read = read_pickle(pickle.dumps({"a": np.dtype("f8"), "b": [np.float64(2), "text"]}))

    assert isinstance(read["a"], Record)
    assert read["a"].arguments[0] == "f8"
    assert read["b"][1] == "text"


DAMAGED = {
    "cut": (pickle.dumps({"a": "text"})[:-4], "truncated|ran out|exhausted"),
    "no pickle": (b"PK\x03\x04", "persistent"),
    "eval": (b"cbuiltins\neval\n(S'1'\ntR.", "the name builtins.eval"),
    "a module of numpy that runs code": (b"cnumpy.testing._private.utils\nrunstring\n(S'1'\ntR.", "runstring"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_what_is_no_pickle_of_numbers_is_one_readable_error(name: str) -> None:
    content, message = DAMAGED[name]

    with pytest.raises(InputError, match=message):
        read_pickle(content)


@pytest.mark.slow
def test_the_package_in_the_cache_is_the_one_whose_checksum_is_written_down() -> None:
    assert download(PACKAGE, cache_folder()).name == "alt_profanity_check-1.9.1-py3-none-any.whl"


@pytest.mark.slow
def test_documents_depend_on_the_model_that_rated_them(tmp_path: Path) -> None:
    inputs = [SourceConfig(name="s", kind="book", path=str(tmp_path))]

    assert digest_inputs(DocumentsConfig(inputs=inputs)) == {}
    assert digest_inputs(DocumentsConfig(inputs=inputs, rates_sentences=True)) == {"sentence_classifier": PACKAGE.sha256}

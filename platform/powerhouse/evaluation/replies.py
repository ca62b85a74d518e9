"""What a model has answered so far, on disk: a line for each reply, so that nothing is asked twice after a kill."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType

from powerhouse.evaluation.asking import Question, Reply
from powerhouse.telemetry import progress

FILE = "replies.jsonl"


class Replies:
    """Replies by the key of their question. A line that a kill has cut off is forgotten."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        text = self._path.read_text(encoding="utf-8") if self._path.exists() else ""
        lines = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
        self.by_key: dict[str, Reply] = dict(map(json.loads, lines))
        self._file = self._path.open("r+" if text else "w", encoding="utf-8")
        self._file.truncate(len("".join(lines).encode()))
        self._file.seek(0, 2)

    def add(self, key: str, reply: Reply) -> None:
        assert key not in self.by_key, "a question is asked once"
        self.by_key[key] = reply
        self._file.write(json.dumps([key, reply]) + "\n")
        self._file.flush()

    def __enter__(self) -> Replies:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()


def missing(questions: Iterable[Question], known: Mapping[str, Reply]) -> dict[str, Question]:
    """Questions without a reply, by key: each once."""
    return {question.key: question for question in questions if question.key not in known}


def collect(questions: Mapping[str, Question], found: Iterator[tuple[str, Reply]], replies: Replies) -> None:
    """Write down every reply as it comes, behind a progress bar that begins where an earlier run ended."""
    num_known = len(replies.by_key)
    with progress("asking", num_known + len(questions), "question", initial=num_known) as bar:
        for key, reply in found:
            replies.add(key, reply)
            bar.update()

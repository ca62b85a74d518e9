"""What long work shows while it runs: a progress bar, a log of numbers, and gauges. No Ray, no global state."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

Gauge = Callable[[str, float], None]
"""Where a named number goes besides the log: Ray's metrics, or a test's list."""


def progress(name: str, total: float | None, unit: str, initial: int = 0) -> tqdm[Any]:
    """Make a progress bar on standard error: live on a terminal, a line every ten seconds in a job's log.

    `initial` are the units that an earlier run has done; the speed does not count them.
    """
    common: dict[str, Any] = {"desc": name, "total": total, "unit": unit, "unit_scale": True, "initial": initial}
    if sys.stderr.isatty():
        return tqdm(**common, dynamic_ncols=True)
    return tqdm(**common, ncols=120, ascii=" -=#", mininterval=10, file=_Lines())


class _Lines:
    """What is standard error when a line is written; a bar's states are lines too, none is written over the last."""

    def write(self, text: str) -> None:
        if line := text.strip("\r\n "):
            sys.stderr.write(f"{line}\n")

    def flush(self) -> None:
        sys.stderr.flush()


class MetricsLog:
    """A JSON line for each step, and the same numbers to a gauge.

    Reopened after a kill, it forgets the lines at or after `first_step` and a half-written last line, so that a resumed
    run leaves the log that an uninterrupted one would have left.
    """

    def __init__(self, path: Path, first_step: int = 0, gauge: Gauge | None = None) -> None:
        kept = [row for row in read_metrics(path) if row["step"] < first_step]
        path.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self._gauge = gauge

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        if self._gauge:
            for name, value in values.items():
                self._gauge(name, value)

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the whole lines of a MetricsLog; none where the file is missing."""
    return list(_whole_lines(path)) if path.exists() else []


def _whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            yield json.loads(line)


def make_logger(name: str) -> logging.Logger:
    """Return a logger that writes one JSON object a line to standard error; values go in `extra={"fields": {...}}`."""
    logger = logging.getLogger(f"powerhouse.{name}")
    if not logger.handlers:
        handler = logging.StreamHandler(_Lines())
        handler.setFormatter(_JsonFormatter())
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    return logger


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        entry = {
            "time": f"{when}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
        }
        entry.update(getattr(record, "fields", {}))
        if record.exc_info:
            entry["error"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)

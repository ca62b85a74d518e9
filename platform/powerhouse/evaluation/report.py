"""One self-contained HTML page of an evaluation or of a comparison: scores with intervals, drawn, and samples."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure

from powerhouse.artifacts import write_atomically
from powerhouse.evaluation.results import Result, Sample
from powerhouse.evaluation.score import Score
from powerhouse.evaluation.significance import Comparison

FILE = "report.html"
_TEMPLATE = Path(__file__).with_name("report.html.j2")
_NUM_SHOWN = 5
_MAX_CHARS = 1500

Bar = tuple[str, float, tuple[float, float] | None]
"""A name, a value and its interval."""


def write_evaluation(folder: Path, title: str, heldout: Mapping[str, Score], results: Mapping[str, Result]) -> None:
    """Write report.html."""
    tables = {"held-out documents": dict(heldout)} if heldout else {}
    tables |= {name: result.scores for name, result in results.items()}
    drawings = {
        name: draw([(key, score.value, score.interval) for key, score in table.items()]) for name, table in tables.items()
    }
    samples = {name: pick(result.samples) for name, result in results.items()}
    _write(folder, title=title, tables=tables, drawings=drawings, samples=samples, comparisons={})


def write_comparison(
    folder: Path, title: str, comparisons: Mapping[str, Mapping[str, Comparison]], apart: Mapping[str, Any]
) -> None:
    """Write report.html: differences, and the items that the two systems did most unlike."""
    drawings = {
        name: draw([(key, found.difference, found.interval) for key, found in table.items()], zero=True)
        for name, table in comparisons.items()
    }
    _write(folder, title=title, tables={}, drawings=drawings, samples=apart, comparisons=comparisons)


def _write(folder: Path, **values: Any) -> None:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(shorten=_shorten, **values)
    write_atomically(folder / FILE, page)


def pick(samples: Sequence[Sample], num: int = _NUM_SHOWN) -> dict[str, list[Sample]]:
    """The best and the worst; of equal ones, those that come first."""
    ordered = sorted(samples, key=lambda sample: -float(sample["good"]))
    num = min(num, (len(samples) + 1) // 2)
    return {"best": ordered[:num], "worst": ordered[num:][-num:][::-1]}


def draw(bars: Sequence[Bar], *, zero: bool = False) -> Markup:
    """A point for each value with its interval as a line, as SVG; values of unlike size have an axis each."""
    figure = Figure(figsize=(9, 0.5 + 0.34 * len(bars)), layout="constrained")
    axes = figure.subplots()
    for place, (_, value, interval) in enumerate(reversed(bars)):
        if interval:
            axes.plot(interval, [place, place], color="#8fb4d9", linewidth=5, solid_capstyle="round")
        axes.plot([value], [place], "o", color="#1f5c99", markersize=6)
    axes.set_yticks(range(len(bars)), [name for name, _, _ in reversed(bars)])
    if zero:
        axes.axvline(0, color="#5d7083", linewidth=1, linestyle="--")
    largest = max((abs(value) for _, value, _ in bars), default=1.0)
    if not zero and largest > 20 * max(min((abs(value) for _, value, _ in bars), default=1.0), 1e-3):
        axes.set_xscale("symlog")
    axes.grid(axis="x", alpha=0.3)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    return Markup(svg[svg.index("<svg") :])  # drawn here from numbers and names of metrics, which matplotlib escapes


def _shorten(text: object) -> str:
    shown = str(text)
    return shown if len(shown) <= _MAX_CHARS else f"{shown[: _MAX_CHARS // 2]} [...] {shown[-_MAX_CHARS // 2 :]}"

"""report.json as one self-contained HTML page: the funnel, histograms, every section of the steps, pairs, sampled rejects."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

_TEMPLATE = Path(__file__).with_name("page.html.j2")
_OWN = {"sources", "total", "histograms", "pairs", "rejects", "bad_files"}
_WIDTH, _HEIGHT = 300, 90


def render_page(report: Mapping[str, Any]) -> str:
    """Give the page of a report; a section that has no place of its own becomes a table under its name."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(number=format_number, histogram=draw_histogram, title=lambda name: name.replace("_", " "))
    sections = {name: value for name, value in report.items() if name not in _OWN}
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(report=report, sections=sections)


def format_number(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "" if value is None else value
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def draw_histogram(histogram: Mapping[str, Any]) -> Markup:
    """Draw kept and removed documents as stacked bars, and the limits as lines."""
    kept, removed = histogram["kept"], histogram["removed"]
    top = max([one + other for one, other in zip(kept, removed, strict=True)], default=0) or 1
    width = _WIDTH / max(1, len(kept))
    bars = [
        _bar(place * width, width, one / top * _HEIGHT, other / top * _HEIGHT)
        for place, (one, other) in enumerate(zip(kept, removed, strict=True))
    ]
    low, high = histogram["low"], histogram["high"]
    places = [(limit - low) / ((high - low) or 1) * _WIDTH for limit in histogram["limits"] if low <= limit <= high]
    lines = [f'<line class="limit" x1="{place:.1f}" x2="{place:.1f}" y1="0" y2="{_HEIGHT}"/>' for place in places]
    # Numbers only: nothing in it needs escaping.
    return Markup(f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" class="histogram">{"".join(bars + lines)}</svg>')


def _bar(left: float, width: float, kept: float, removed: float) -> str:
    place = f'x="{left:.1f}" width="{width - 0.5:.1f}"'
    low = f'<rect class="kept" {place} y="{_HEIGHT - kept:.1f}" height="{kept:.1f}"/>'
    return f'{low}<rect class="removed" {place} y="{_HEIGHT - kept - removed:.1f}" height="{removed:.1f}"/>'

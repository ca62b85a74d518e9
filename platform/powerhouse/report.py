"""One self-contained HTML page of a whole line: what was made, the corpus' funnel, the loss, the scores, samples."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure

from powerhouse.artifacts import Artifact, write_atomically
from powerhouse.telemetry import read_metrics

_TEMPLATE = Path(__file__).with_name("report.html.j2")


def write_report(path: Path, artifacts: Mapping[str, Path], prompt: str, answer: str) -> None:
    """Write the page; `artifacts` gives the folder of each kind, corpus, model and evaluation among them."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        artifacts=[Artifact.open(folder, kind) for kind, folder in artifacts.items()],
        corpus=_read_json(artifacts["corpus"] / "report.json"),
        scores=_read_json(artifacts["evaluation"] / "scores.json"),
        curves=_draw_curves(read_metrics(artifacts["model"] / "metrics.jsonl")),
        prompt=prompt,
        answer=answer,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, page)


def _draw_curves(rows: list[dict[str, Any]]) -> Markup:
    """Draw loss, gradient norm and learning rate over the steps, as SVG."""
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    steps = [row["step"] + 1 for row in rows]
    for axes, (name, title) in zip(figure.subplots(1, 3), _CURVES.items(), strict=True):
        axes.plot(steps, [row.get(name, float("nan")) for row in rows], linewidth=1.5)
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    return Markup(svg[svg.index("<svg") :])  # drawn here from numbers: nothing in it needs escaping


_CURVES = {"loss": "training loss (nats per token)", "grad_norm": "gradient norm", "lr": "learning rate"}


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))

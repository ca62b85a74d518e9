"""A finished run as one self-contained HTML page with its curves, and the same as JSON."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

import powerhouse
from powerhouse.artifacts import Artifact, write_atomically
from powerhouse.telemetry import read_metrics
from powerhouse.training.config import TrainingConfig
from powerhouse.training.settings import METRICS, SAMPLES, STARTS

PAGE, NUMBERS = "training.html", "training.json"
_TEMPLATE = Path(__file__).with_name("summary.html.j2")
_CURVES = {
    "loss": "loss (nats per predicted token)",
    "heldout_bits_per_byte": "held-out bits per byte",
    "heldout_loss": "held-out loss (nats per predicted token)",
    "lr": "learning rate",
    "grad_norm": "gradient norm, before clipping",
    "tokens_per_s": "tokens per second",
    "mfu": "MFU",
    "memory_gb": "memory of the first worker, GB",
    "energy_wh": "energy, Wh",
}


def write_summary(folder: Path, config: TrainingConfig, tokens: Artifact, parameters: int) -> None:
    """Write training.html and training.json beside the model, from what the run left in its folder."""
    summary = summarise(folder, config, tokens, parameters)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(number=_format, title=lambda name: name.replace("_", " "))
    rows = [row | {"memory_gb": row["memory_bytes"] / 1e9} for row in summary["metrics"]]
    curves = [draw_curve(rows, name, title) for name, title in _CURVES.items() if any(name in row for row in rows)]
    page = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(summary=summary, curves=curves)
    write_atomically(folder / PAGE, page)
    write_atomically(folder / NUMBERS, json.dumps(summary, indent=1) + "\n")


def summarise(folder: Path, config: TrainingConfig, tokens: Artifact, parameters: int) -> dict[str, Any]:
    rows, samples = read_metrics(folder / METRICS), read_metrics(folder / SAMPLES)
    starts = [line for line in read_metrics(folder / STARTS) if "step" in line]
    lost = [line["lines_lost"] for line in read_metrics(folder / STARTS) if "lines_lost" in line]
    last_step = samples[-1]["step"] if samples else None
    return {
        "result": _result(rows, parameters) | {"restarts": len(starts) - 1, "lines_lost_by_trackers": _sum(lost)},
        "how_measured": {
            "mfu": _named(starts, "peak_source", "no peak is known of this device, so there is no MFU"),
            "flops": "6 N + 12 L H D T (Chowdhery et al. 2022, PaLM, appendix B), attention counted whole",
            "energy": _named(
                starts, "energy_source", "no meter (NVML, RAPL) and no watch.declared_watts, so there is no figure"
            ),
            "co2e": _grid(config),
        },
        "starts": starts,
        "samples": [sample for sample in samples if sample["step"] == last_step],
        "settings": config.model_dump(mode="json", exclude_none=True),
        "provenance": {
            "tokens": str(config.tokens),
            "tokens_digest": tokens.manifest.digest,
            "start_from": str(config.start_from) if config.start_from else None,
            "powerhouse": powerhouse.__version__,
        },
        "metrics": rows,
    }


def _result(rows: Sequence[Mapping[str, Any]], parameters: int) -> dict[str, Any]:
    last: dict[str, Any] = {}
    for row in rows:
        last |= row  # the last value of each: not every line has all of them
    speeds = sorted(row["tokens_per_s"] for row in rows)
    shares = sorted(row["mfu"] for row in rows if "mfu" in row)
    return {
        "parameters": parameters,
        "steps": last["step"] + 1,
        "last_loss": last["loss"],
        "heldout_bits_per_byte": last.get("heldout_bits_per_byte"),
        "heldout_loss": last.get("heldout_loss"),
        "median_tokens_per_s": speeds[len(speeds) // 2],
        "median_mfu": shares[len(shares) // 2] if shares else None,
        "skipped_steps": int(sum(row.get("skipped", 0) for row in rows)),
        "energy_wh": last.get("energy_wh"),
        "co2e_g": last.get("co2e_g"),
    }


def _sum(lost: Sequence[Mapping[str, int]]) -> int:
    return sum(number for counts in lost for number in counts.values())


def _named(starts: Sequence[Mapping[str, Any]], name: str, without: str) -> str:
    return next((str(start[name]) for start in reversed(starts) if start.get(name)), without)


def _grid(config: TrainingConfig) -> str:
    grid = config.watch.grid_g_per_kwh
    return "no watch.grid_g_per_kwh, so there is no figure" if grid is None else f"{grid:g} g/kWh, as the config says"


def draw_curve(rows: Sequence[Mapping[str, Any]], name: str, title: str) -> Markup:
    """Draw one figure over the steps, as SVG."""
    from matplotlib.figure import Figure  # here: training workers import this file's neighbours and draw nothing

    figure = Figure(figsize=(5.2, 2.9), layout="constrained")
    axes = figure.subplots()
    points = [(row["step"] + 1, row[name]) for row in rows if name in row]
    axes.plot(*zip(*points, strict=True), linewidth=1.4, marker="o" if len(points) < 30 else None, markersize=3)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("step", fontsize=9)
    axes.grid(alpha=0.3)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    return Markup(svg[svg.index("<svg") :])  # drawn here from numbers: nothing in it needs escaping


def _format(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–" if value is None else value
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"

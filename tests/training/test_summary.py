"""The page of a finished run: its figures, its curves, and its look in a real browser."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from resiliparse.extract.html2text import extract_plain_text

from browser import find_browser
from powerhouse.telemetry import MetricsLog
from powerhouse.training.summary import NUMBERS, PAGE, write_summary
from powerhouse.training.watch import METRICS, SAMPLES, STARTS
from tiny_run import make_config, write_tokens

START = {"time": "2026-01-01T00:00:00Z", "workers": 2, "peak_flops_per_s": 1e12, "peak_source": "a data sheet"}


def write_run(
    folder: Path, energy_source: str | None = "declared: 50 W a worker, not measured", **watch: Any
) -> dict[str, Any]:
    """What a run of forty steps that was started twice leaves, and its summary."""
    tokens = write_tokens(folder / "tokens")
    config = make_config(folder, num_steps=40, watch=watch)
    config.output.mkdir()
    log, samples = MetricsLog(config.output / METRICS), MetricsLog(config.output / SAMPLES)
    for step in range(40):
        line: dict[str, Any] = {"loss": 5 * 0.97**step, "lr": 0.01, "grad_norm": 1 + 0.1 * (step % 3)}
        line |= {"tokens_per_s": 1000.0 + step, "step_s": 0.1, "mfu": 0.3, "memory_bytes": 3e8, "skipped": float(step == 7)}
        line |= {"energy_wh": 0.1 * (step + 1)} if energy_source else {}
        log.write(step, line | ({"heldout_bits_per_byte": 3 - step / 20} if step % 10 == 9 else {}))
    for step in (19, 39):
        samples.write(step, {"number": 0, "prompt": "The <b>king</b>", "text": f" & queen after {step + 1}"})
    log.close()
    samples.close()
    lines = [START | {"step": step, "energy_source": energy_source} for step in (0, 20)] + [{"lines_lost": {"MLflow": 3}}]
    (config.output / STARTS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_summary(config.output, config, tokens, 28_192)
    summary: dict[str, Any] = json.loads((config.output / NUMBERS).read_text())
    return summary


def test_the_numbers_of_a_run_are_the_last_ones_and_the_medians(tmp_path: Path) -> None:
    summary = write_run(tmp_path)

    assert summary["result"] == {
        "parameters": 28_192,
        "steps": 40,
        "last_loss": pytest.approx(5 * 0.97**39),
        "heldout_bits_per_byte": pytest.approx(3 - 39 / 20),
        "heldout_loss": None,
        "median_tokens_per_s": 1020.0,
        "median_mfu": 0.3,
        "skipped_steps": 1,
        "energy_wh": pytest.approx(4.0),
        "co2e_g": None,
        "restarts": 1,
        "lines_lost_by_trackers": 3,
    }
    assert len(summary["metrics"]) == 40
    assert summary["settings"]["optim"]["lr"] == 0.01


def test_what_is_not_measured_is_said_and_has_no_number(tmp_path: Path) -> None:
    summary = write_run(tmp_path, energy_source=None)

    assert summary["result"]["energy_wh"] is None
    assert summary["how_measured"]["energy"] == "no meter (NVML, RAPL) and no watch.declared_watts, so there is no figure"
    assert summary["how_measured"]["co2e"] == "no watch.grid_g_per_kwh, so there is no figure"
    assert summary["how_measured"]["mfu"] == "a data sheet"


def test_the_page_shows_every_curve_the_samples_and_the_settings_with_nothing_unescaped(tmp_path: Path) -> None:
    write_run(tmp_path)
    page = (tmp_path / "model" / PAGE).read_text()

    text = " ".join(str(extract_plain_text(page)).split())
    assert page.count("<svg") == 8
    assert "<b>king</b>" not in page.replace("<b>The &lt;b&gt;king&lt;/b&gt;</b>", "")
    for expected in (
        "Samples after step 40",
        "The <b>king</b> & queen after 40",
        "optim.lr: 0.01",
        "28,192 parameters",
        "declared: 50 W",
    ):
        assert expected in text
    assert "queen after 20" not in text
    assert not re.findall(r'(?:src|href)="(?!#)', page)  # nothing is fetched


@pytest.mark.slow
@pytest.mark.browser
def test_a_browser_shows_the_page(tmp_path: Path) -> None:
    browser = find_browser()
    assert browser
    write_run(tmp_path)
    picture, page = tmp_path / "page.png", tmp_path / "model" / PAGE
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    flags += ["--disable-background-networking", "--disable-component-update", f"--user-data-dir={tmp_path / 'profile'}"]
    command = [browser, *flags, "--window-size=1200,2000", f"--screenshot={picture}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)

    assert picture.exists(), done.stderr
    colours = np.asarray(Image.open(picture).convert("RGB")).reshape(-1, 3)
    line = np.array([0x1F, 0x77, 0xB4])  # matplotlib's first colour
    assert (np.abs(colours.astype(int) - line).max(axis=1) < 8).sum() > 1000
    assert (colours == 255).all(axis=1).mean() > 0.5

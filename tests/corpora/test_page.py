"""The page of a report: its text by a parser, and its look in a real browser."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from resiliparse.extract.html2text import extract_plain_text

from browser import find_browser
from powerhouse.corpora.page import draw_histogram, render_page

FUNNEL = {
    "documents": 1200, "chars": 3_456_789, "removed": {"too_few_words": 150, "near_duplicate": 50},
    "train": {"documents": 950, "chars": 3_000_000}, "heldout": {"documents": 50, "chars": 100_000},
}  # fmt: skip
SIDE = {"source": "web", "path": "a.html", "doc_id": 5, "text": "Some <b>text</b> & more."}
REPORT: dict[str, Any] = {
    "sources": {"web": FUNNEL},
    "total": FUNNEL,
    "histograms": {"num_words": {"low": 0.0, "high": 100.0, "limits": [50.0, 1e5], "kept": [0, 3, 9], "removed": [4, 1, 0]}},
    "bias": {"names women": {"documents": 10, "removed_share": 0.25, "beside_all": "more often"}},
    "personal_data": {"emails": 7, "phones": 0},
    "a_new_step": {"hits": [{"name": "first", "share": 0.123456}], "threshold": 0.8, "note": None},
    "pairs": [{"similarity": 0.81, "reason": "near_duplicate", "kept": SIDE, "removed": SIDE}],
    "rejects": {"too_few_words": [SIDE | {"detail": "4 < 50"}]},
    "bad_files": [{"source": "web", "path": "b.html", "detail": "not UTF-8"}],
}


def test_every_part_of_the_report_is_on_the_page() -> None:
    text = " ".join(str(extract_plain_text(render_page(REPORT))).split())

    for expected in (
        "1,200 documents", "3,456,789", "too few words", "near duplicate, estimated similarity 0.81", "web/a.html", "not UTF-8",
        "names women", "more often", "Personal data", "emails", "A new step", "first", "0.1235", "4 < 50", "num words",
    ):  # fmt: skip
        assert expected in text, expected


def test_text_of_documents_is_escaped() -> None:
    page = render_page(REPORT)

    assert "<b>text</b>" not in page
    assert page.count("Some &lt;b&gt;text&lt;/b&gt; &amp; more.") == 3


def test_the_page_needs_nothing_from_elsewhere() -> None:
    assert re.findall(r"(?:src|href|url)\s*[=(]", render_page(REPORT)) == []


def test_a_histogram_draws_bars_to_scale_and_only_limits_that_lie_inside() -> None:
    svg = str(draw_histogram(REPORT["histograms"]["num_words"]))

    kept = [float(height) for height in re.findall(r'class="kept"[^>]*height="([\d.]+)"', svg)]
    assert kept == [0, 30, 90]
    assert re.findall(r'<line class="limit" x1="([\d.]+)"', svg) == ["150.0"]


def test_an_empty_report_is_a_page() -> None:
    none = {"documents": 0, "chars": None, "removed": {}, "train": {"documents": 0}, "heldout": {"documents": 0}}
    empty = {"sources": {}, "total": none, "histograms": {}, "pairs": [], "rejects": {}, "bad_files": []}

    assert "None was found." in render_page(empty)


@pytest.mark.slow
@pytest.mark.browser
def test_a_browser_shows_the_page(tmp_path: Path) -> None:
    browser = find_browser()
    assert browser
    (tmp_path / "report.html").write_text(render_page(REPORT))
    picture = tmp_path / "report.png"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    flags += ["--disable-background-networking", "--disable-component-update", f"--user-data-dir={tmp_path / 'profile'}"]
    command = [browser, *flags, "--window-size=1200,1600", f"--screenshot={picture}", (tmp_path / "report.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)

    assert picture.exists(), done.stderr
    colours = np.asarray(Image.open(picture).convert("RGB")).reshape(-1, 3)
    for colour in ((0x3F, 0x7F, 0xBF), (0xD9, 0x82, 0x2B)):  # the bars of what was kept and of what was left out
        assert (np.abs(colours.astype(int) - colour).max(axis=1) < 8).sum() > 500
    assert (colours == 255).all(axis=1).mean() > 0.5

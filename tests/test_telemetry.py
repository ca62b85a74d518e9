from __future__ import annotations

import json
from pathlib import Path

import pytest

from powerhouse.telemetry import MetricsLog, make_logger, progress, read_metrics


def test_a_resumed_log_is_the_one_of_an_uninterrupted_run(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step in range(5):
        log.write(step, {"loss": 5.0 - step})
    log.close()
    path.write_text(path.read_text() + '{"step": 5, "lo')  # killed while it wrote

    resumed = MetricsLog(path, first_step=3)
    for step in range(3, 6):
        resumed.write(step, {"loss": 5.0 - step})
    resumed.close()

    assert read_metrics(path) == [{"step": step, "loss": 5.0 - step} for step in range(6)]


def test_numbers_go_to_the_gauge_too(tmp_path: Path) -> None:
    seen: list[tuple[str, float]] = []
    log = MetricsLog(tmp_path / "m.jsonl", gauge=lambda name, value: seen.append((name, value)))
    log.write(0, {"loss": 2.5, "lr": 0.1})
    log.close()

    assert seen == [("loss", 2.5), ("lr", 0.1)]


def test_no_log_is_no_rows(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "none.jsonl") == []


def test_a_log_entry_is_one_json_object_with_its_fields(capfd: pytest.CaptureFixture[str]) -> None:
    logger = make_logger("test")
    logger.warning("stage lost", extra={"fields": {"rank": 1}})
    try:
        raise ValueError("bad")
    except ValueError:
        logger.exception("failed")

    first, second = map(json.loads, capfd.readouterr().err.splitlines())
    assert (first["level"], first["event"], first["rank"]) == ("warning", "stage lost", 1)
    assert "ValueError: bad" in second["error"]


def test_progress_counts_in_its_unit(capfd: pytest.CaptureFixture[str]) -> None:
    with progress("read", 3, "doc") as bar:
        bar.update(3)

    assert "read" in (text := capfd.readouterr().err)
    assert "3.00/3.00" in text

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fakes import write_tiny_model

GUIDE = Path(__file__).parents[2] / "docs" / "engine.md"


def test_the_guides_program_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny_model(tmp_path / "models" / "smollm2")
    monkeypatch.chdir(tmp_path)
    first, second = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, object] = {}
    exec(first, names)
    assert capsys.readouterr().out.splitlines()[-1] in {"red", "green", "blue"}
    exec(second, names)
    assert capsys.readouterr().out

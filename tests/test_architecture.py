"""The shape of the house, held by `ast`: who may import whom, where Ray may stand, how long files and functions are."""

from __future__ import annotations

import ast
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import powerhouse

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "platform" / "powerhouse"
MODULES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = [path for folder in ("jobs", "serve_apps", "benchmarks", "tests") for path in sorted((ROOT / folder).rglob("*.py"))]

COMMON = {"artifacts", "chat", "config", "device", "errors", "heldout", "job", "packages", "session", "telemetry", "tokenizer"}
MAY_IMPORT = {
    "corpora": set(),
    "models": set(),
    "prompting": set(),
    "training": {"models", "corpora.shards", "prompting"},
    "evaluation": {"models", "prompting", "corpora.shards"},
    "compression": {"models"},
    "engine": {"models"},
    "serving": {"engine", "models"},
    "cluster": {"report"},  # the page of a run
}


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def faults(path: Path, text: str) -> list[str]:
    tree = ast.parse(text)
    relative = path.relative_to(PACKAGE)
    found = []
    docstring = (ast.get_docstring(tree) or "").split("\n\n")[0]
    names = list(imports(tree))
    if any(name.split(".")[0] == "ray" for name in names) and not docstring.endswith("[Ray]"):
        found.append(f"{relative} imports ray; its docstring's first paragraph must end with [Ray]")
    room = relative.parts[0] if len(relative.parts) > 1 else None
    if room is None:
        return found
    allowed = COMMON | MAY_IMPORT[room] | {room}
    own = [name.removeprefix("powerhouse.") for name in names if name.startswith("powerhouse.")]
    outside = [name for name in own if not any(name == item or name.startswith(f"{item}.") for item in allowed)]
    return found + [f"{relative} imports {name}; {room} may use only {sorted(allowed)}" for name in outside]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_what_its_room_may(path: Path) -> None:
    assert faults(path, path.read_text()) == []


def test_the_guard_sees_planted_faults() -> None:
    planted = '"""Text."""\nimport ray\nfrom powerhouse.serving import api\n'

    assert [fault.split(";")[0] for fault in faults(PACKAGE / "corpora" / "planted.py", planted)] == [
        "corpora/planted.py imports ray",
        "corpora/planted.py imports serving.api",
    ]


@pytest.mark.parametrize("path", [*MODULES, *SCRIPTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 400
    if path.parent == ROOT / "jobs":
        assert text.count("\n") <= 80
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 60, f"{node.name} is too long"


def test_platform_stays_the_standard_librarys() -> None:
    assert not (ROOT / "platform" / "__init__.py").exists()
    assert platform.python_version().startswith("3.")
    assert Path(powerhouse.__file__).parent == PACKAGE


def test_no_script_takes_a_name_that_python_or_a_dependency_has() -> None:
    taken = set(sys.stdlib_module_names) | {"powerhouse", "ray", "torch", "datasets", "tokenizers", "transformers", "numpy"}

    assert [path.name for path in [*SCRIPTS, *MODULES] if path.stem in taken] == []

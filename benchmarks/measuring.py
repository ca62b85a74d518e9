"""What every benchmark shares: the machine's name, a table, a JSON file beside it, and cases in processes of their own."""

from __future__ import annotations

import json
import platform
import re
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def device_name() -> str:
    """The accelerator, or the processor and the number of cores that torch may use."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text()) if sys.platform == "linux" else None
    return f"{found[1] if found else platform.processor()}, {torch.get_num_threads()} threads"


def peak_rss_mib() -> float:
    """Highest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "linux" else 2**20)


def in_own_process(script: str, case: Mapping[str, Any]) -> dict[str, Any]:
    """Run `script --case JSON`, so that its peak memory is its own; its last line of output is its result as JSON."""
    done = subprocess.run([sys.executable, script, "--case", json.dumps(case)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{script} {case}: exit status {done.returncode}\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def report(name: str, header: Sequence[str], rows: Sequence[Sequence[Any]], notes: Mapping[str, Any] | None = None) -> None:
    """Print the table and write it to results/NAME.json."""
    cells = [[f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(header), *cells]) for i in range(len(header))]
    print(f"{name} on {device_name()}, torch {torch.__version__}")
    for row in [list(header), ["-" * width for width in widths], *cells]:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    for key, value in (notes or {}).items():
        print(f"{key}: {value}")
    RESULTS.mkdir(exist_ok=True)
    kind = re.sub(r"\W+", "-", device_name().split(",")[0]).strip("-").lower()
    content = {
        "benchmark": name,
        "device": device_name(),
        "torch": torch.__version__,
        "date": datetime.now(UTC).date().isoformat(),
        "rows": [dict(zip(header, row, strict=True)) for row in rows],
        **(notes or {}),
    }
    (RESULTS / f"{name}.{kind}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

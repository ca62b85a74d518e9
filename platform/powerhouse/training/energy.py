"""Energy that a training process's device takes, by the best meter there is, which is named.

In this order: NVML's counter of the GPU (NVIDIA; whole board); RAPL's counters of the machine's processors (Linux
powercap sysfs; all processes on them, and often readable by root only); a power that the config declares, times the seconds.
With none of them there is no figure.
"""

from __future__ import annotations

import importlib.util
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

_POWERCAP = Path("/sys/class/powercap")
_MICRO, _MILLI = 1e-6, 1e-3


class Meter(Protocol):
    source: str
    """What is measured, and by what."""

    def joules(self) -> float:
        """Energy of this process's share since the meter was made."""
        ...


def find_meter(device: torch.device, declared_watts: float | None, powercap: Path = _POWERCAP) -> Meter | None:
    """The best meter of this process's device. One process on each node reads the node's processors."""
    if device.type == "cuda" and importlib.util.find_spec("pynvml"):
        return NvmlMeter(device)
    if device.type == "cpu" and (zones := _readable_zones(powercap)):
        return RaplMeter(zones, is_reader=os.environ.get("LOCAL_RANK", "0") == "0")
    return DeclaredMeter(declared_watts) if declared_watts else None


class NvmlMeter:
    """The counter of one GPU; from Volta on (nvmlDeviceGetTotalEnergyConsumption, millijoules)."""

    def __init__(self, device: torch.device) -> None:
        import pynvml  # type: ignore[import-untyped,unused-ignore]

        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        self._read = pynvml.nvmlDeviceGetTotalEnergyConsumption
        self._start = self._read(self._handle)
        self.source = "NVML, the GPUs' boards"

    def joules(self) -> float:
        return float(self._read(self._handle) - self._start) * _MILLI


@dataclass
class _Zone:
    """A processor package's counter of microjoules, which starts again at its range."""

    path: Path
    last: int
    total: int = 0

    def read(self) -> int:
        now = int((self.path / "energy_uj").read_text())
        step = now - self.last
        self.total += step if step >= 0 else step + int((self.path / "max_energy_range_uj").read_text())
        self.last = now
        return self.total


class RaplMeter:
    """The machine's packages; to be read more often than the counters turn over, which takes minutes."""

    source = "RAPL, all work of the machines' processors"

    def __init__(self, zones: list[Path], *, is_reader: bool) -> None:
        self._zones = [_Zone(path, int((path / "energy_uj").read_text())) for path in zones] if is_reader else []

    def joules(self) -> float:
        return sum(zone.read() for zone in self._zones) * _MICRO


def _readable_zones(powercap: Path) -> list[Path]:
    """The packages, without their parts, which they contain."""
    zones = [path for path in sorted(powercap.glob("intel-rapl:*")) if path.name.count(":") == 1]
    return [path for path in zones if os.access(path / "energy_uj", os.R_OK)]


class DeclaredMeter:
    def __init__(self, watts: float) -> None:
        self.source = f"declared: {watts:g} W a worker, not measured"
        self._watts, self._start_s = watts, time.monotonic()

    def joules(self) -> float:
        return self._watts * (time.monotonic() - self._start_s)

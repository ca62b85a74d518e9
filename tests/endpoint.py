"""An endpoint in a process of its own, to be asked and to be killed: python tests/endpoint.py MODEL PORT."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import httpx
import uvicorn

from powerhouse.engine import Engine, EngineConfig
from powerhouse.engine.streaming import EngineLoop
from powerhouse.serving.api import make_api


def environment() -> dict[str, str]:
    """In which a process imports this package, one thread to each."""
    return os.environ | {"PYTHONPATH": str(Path(__file__).parents[1] / "platform"), "OMP_NUM_THREADS": "1"}


class Endpoint:
    """The process; its log has a line for each request."""

    def __init__(self, model: Path, port: int, log: Path) -> None:
        self.url = f"http://127.0.0.1:{port}/v1"
        self._command = [sys.executable, __file__, str(model), str(port)]
        self.start(log)

    def start(self, log: Path) -> None:
        """Start it, or once more after it was killed, with another log."""
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(self._command, stdout=file, stderr=file, env=environment())
        deadline = time.monotonic() + 120
        while not self._answers():
            assert self.process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, "it does not start"
            time.sleep(0.05)

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/models").status_code == 200
        except httpx.TransportError:
            return False

    @property
    def num_completions(self) -> int:
        return self.log.read_text().count("POST /v1/completions")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


if __name__ == "__main__":
    engine = Engine.from_directory(Path(sys.argv[1]), EngineConfig(device="cpu", num_threads=1))
    uvicorn.run(make_api(EngineLoop(engine, lambda name, value: None), "demo"), host="127.0.0.1", port=int(sys.argv[2]))

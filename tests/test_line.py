"""The whole line on a small piece of the real text, as a user runs it: demo, up, README's commands, down, Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from powerhouse.artifacts import Artifact
from powerhouse.cluster.local import STATE_FILE, LocalCluster
from powerhouse.cluster.processes import find_free_port, find_processes
from powerhouse.models.hub import load_decoder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
ROOT = Path(__file__).parents[1]
SMALL: dict[str, list[str]] = {
    "corpus": ["workers.num=1"],
    "tokens": ["workers.num=1", "vocab_size=512", "row_length=65"],
    "evaluation": ["num_actors=1"],
    "model": ["num_steps=12", "global_batch_rows=8", "run.micro_batch_rows=2", "optim.warmup_steps=2", "optim.lr=0.01",
              "model.vocab_size=512", "model.hidden_size=64", "model.intermediate_size=128", "model.num_attention_heads=4",
              "model.head_dim=16", "model.max_position_embeddings=64"],
}  # fmt: skip


class Line:
    """A small demo.yaml in a storage root of its own, on free ports, and the commands of its user."""

    def __init__(self, folder: Path) -> None:
        self.storage = folder / "storage"
        self.http_port, self.dashboard_port = find_free_port(), find_free_port()
        self.environment = os.environ | {
            "POWERHOUSE_STORAGE": str(self.storage),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
        self.config = self._write_configs(folder)

    def _write_configs(self, folder: Path) -> Path:
        demo = self._read("demo")
        texts, corpus = self._read("texts"), self._read("corpus")
        texts["packages"] = [package for package in texts["packages"] if package["source"] == "books"]
        corpus["inputs"] = [{"name": "books", "kind": "book", "path": "demo/texts/books", "glob": "**/*paradise*.txt"}]
        for stage in demo["stages"]:
            stage["overrides"] = SMALL.get(stage["kind"], [])
            for name, values in (("texts", texts), ("corpus", corpus)):
                if stage["kind"] == name:
                    stage["config"] = str(self._write(folder / f"{name}.yaml", values))
        demo |= {"http_port": self.http_port, "cluster": {"dashboard_port": self.dashboard_port}, "max_tokens": 20}
        return self._write(folder / "demo.yaml", demo)

    def _read(self, name: str) -> dict[str, Any]:
        values: dict[str, Any] = yaml.safe_load((ROOT / "jobs" / "configs" / f"{name}.yaml").read_text())
        return values

    def _write(self, path: Path, values: dict[str, Any]) -> Path:
        path.write_text(yaml.safe_dump(values))
        return path

    def command(self, action: str, *overrides: str) -> list[str]:
        options = [] if action == "down" else ["--config", str(self.config), *overrides]
        return [sys.executable, "-m", "powerhouse.cluster.line", action, *options]

    def run(self, action: str, *overrides: str) -> subprocess.CompletedProcess[str]:
        return self.shell(shlex.join(self.command(action, *overrides)))

    def shell(self, command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, shell=True, cwd=ROOT, env=self.environment, capture_output=True, text=True)

    def readme_command(self, word: str) -> str:
        """The README's command with that word in it, on this cluster's ports."""
        blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
        command = next(block for block in blocks if word in block).strip()
        return (
            command.replace(":8265", f":{self.dashboard_port}").replace(":8000", f":{self.http_port}").replace(".venv/bin/", "")
        )


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Line:
    folder = tmp_path_factory.mktemp("line")
    return Line(folder)


def test_demo_runs_the_whole_line_and_leaves_no_process(line: Line) -> None:
    done = line.run("demo")

    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    table = done.stdout.split("\nstage ")[1]
    stages = ["fetch_texts", "curate_corpus", "train_tokenizer", "train_model", "evaluate_model", "serve"]
    assert [name for name in stages if f"\n{name} " in table] == stages
    assert "(kept)" not in table
    assert "20 tokens streamed" in table
    page = (line.storage / "demo" / "report.html").read_text()
    assert "bits_per_byte" in page
    assert "<svg" in page
    assert not (line.storage / STATE_FILE).exists()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{line.http_port}/health")


def test_transformers_gives_the_trained_model_the_same_logits(line: Line) -> None:
    folder = line.storage / "demo" / "model"
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder)("Of Man's first disobedience, and the fruit")["input_ids"]])

    theirs = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
    ours = load_decoder(folder)(ids, torch.arange(ids.shape[1])[None])

    assert (ours - theirs).abs().max() < 1e-4


def test_a_model_can_be_walked_back_to_its_text(line: Line) -> None:
    demo = line.storage / "demo"
    texts, corpus, tokens, model = (Artifact.open(demo / kind, kind) for kind in ("texts", "corpus", "tokens", "model"))

    assert model.manifest.inputs["tokens"] == tokens.manifest.digest
    assert tokens.manifest.inputs["corpus"] == corpus.manifest.digest
    assert corpus.manifest.inputs["books"] == texts.manifest.digest


def test_up_keeps_finished_stages_answers_the_readme_commands_and_down_ends_it(line: Line) -> None:
    up = line.run("up")
    assert up.returncode == 0, up.stdout[-3000:] + up.stderr[-3000:]
    assert up.stdout.count("(kept)") == 5
    cluster_id = json.loads((line.storage / STATE_FILE).read_text())["cluster_id"]
    try:
        second = line.shell(line.readme_command("ray job submit") + " num_actors=1")
        assert second.returncode == 0, second.stdout[-3000:]
        assert Artifact.open(line.storage / "demo" / "evaluation_2", "evaluation").manifest.counts

        asked = line.shell(line.readme_command("curl -N"))
        events = [event.removeprefix("data: ") for event in asked.stdout.splitlines() if event]
        assert events[-1] == "[DONE]"
        assert json.loads(events[0])["choices"][0]["text"]

        again = line.run("demo")
        assert again.returncode == 2
        assert f"port {line.http_port} (the endpoint) is already in use" in again.stderr
    finally:
        processes = find_processes(cluster_id)
        down = line.run("down")
    assert (down.returncode, down.stdout) == (0, "stopped\n")
    assert still_running(cluster_id, processes) == []


def still_running(cluster_id: str, processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those of a cluster's processes, found before it was stopped or now, that have not ended."""
    assert len(processes) > 5, "a head is a dozen processes"
    _, alive = psutil.wait_procs(processes, timeout=5)
    return alive + find_processes(cluster_id)


def test_ctrl_c_stops_everything(line: Line) -> None:
    # In the background of a shell the signal is ignored, and by all that is started there.
    command = ["env", "--default-signal=INT", *line.command("demo")]
    with subprocess.Popen(command, cwd=ROOT, env=line.environment, stdout=subprocess.PIPE) as demo:
        assert demo.stdout is not None
        while b"== serve" not in demo.stdout.readline():
            pass
        cluster = LocalCluster(**json.loads((line.storage / STATE_FILE).read_text()))
        time.sleep(1)  # the endpoint is half up
        processes = find_processes(cluster.cluster_id)
        demo.send_signal(signal.SIGINT)
        demo.stdout.read()

    assert demo.returncode == 130
    assert still_running(cluster.cluster_id, processes) == []
    assert not Path(cluster.temp_dir).exists()
    assert not (line.storage / STATE_FILE).exists()


def test_a_failing_stage_fails_the_demo_and_stops_everything(line: Line, tmp_path: Path) -> None:
    values = yaml.safe_load(line.config.read_text())
    values["stages"] = [values["stages"][0] | {"overrides": ["no_such_key=1"]}]
    (tmp_path / "demo.yaml").write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "powerhouse.cluster.line", "demo", "--config", str(tmp_path / "demo.yaml")]

    done = line.shell(shlex.join(command))

    assert done.returncode == 2
    assert "no_such_key: unknown key" in done.stdout
    assert "error: jobs/fetch_texts.py failed\n  got: exit status 2\n" in done.stderr
    assert not (line.storage / STATE_FILE).exists()

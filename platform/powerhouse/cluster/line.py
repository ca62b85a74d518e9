"""The whole line on a local cluster: submit every stage's job, deploy the endpoint, ask it something, write the report.

    python -m powerhouse.cluster.line demo|up --config jobs/configs/demo.yaml [key=value ...]
    python -m powerhouse.cluster.line down

`demo` stops all that it started, also on Ctrl-C and on failure; `up` leaves it running.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
import yaml
from pydantic import Field

from powerhouse.artifacts import MANIFEST, Artifact
from powerhouse.cluster import local
from powerhouse.cluster.local import LocalCluster, LocalClusterConfig
from powerhouse.cluster.processes import PeakMemory, check_port_is_free
from powerhouse.config import Config, StoragePath, parse_command_line, storage_root
from powerhouse.errors import ClusterError, PowerhouseError

_READY_TIMEOUT_S = 600.0
_PROBE_INTERVAL_S = 0.5
_PROBES_PER_STATUS = 10  # what Serve's controller gathers is worth no more of the core that the starting replica needs


class StageConfig(Config):
    """One job and the artifact it leaves."""

    job: Path
    """Script under jobs/."""
    config: Path
    """Its YAML."""
    overrides: tuple[str, ...] = ()
    """key=value settings laid over it."""
    kind: str
    """Kind of the artifact."""
    artifact: StoragePath
    """Where the job's config puts it."""


class LineConfig(Config):
    """The stages in order, and the endpoint at the end."""

    stages: tuple[StageConfig, ...]
    """Jobs, each of which reads what those before it wrote."""
    serve_app: Path
    """Serve application file to deploy."""
    http_port: int = Field(default=8000, gt=0, lt=65536)
    """Port of the endpoint."""
    prompt: str
    """What the finished endpoint is asked."""
    max_tokens: int = Field(default=80, gt=0)
    """Length of the answer."""
    report: StoragePath
    """Where the HTML report goes."""
    cluster: LocalClusterConfig = LocalClusterConfig()
    """The local head."""


@dataclass(frozen=True)
class StageResult:
    """A row of the closing table."""

    name: str
    artifact: Artifact
    seconds: float
    peak_bytes: int
    was_kept: bool


def run_stage(cluster: LocalCluster, stage: StageConfig) -> StageResult:
    """Submit the stage's job, unless the job itself says that it has nothing to do."""
    name = stage.job.stem
    _say(f"\n== {name}")
    start = time.monotonic()
    arguments = ["--config", str(stage.config), *stage.overrides]
    with PeakMemory(cluster.cluster_id) as memory:
        was_kept = (stage.artifact / MANIFEST).exists() and cluster.is_done(stage.job, arguments)
        if not was_kept:
            cluster.submit(stage.job, arguments)
    artifact = Artifact.open(stage.artifact, stage.kind)
    return StageResult(name, artifact, time.monotonic() - start, memory.peak_bytes, was_kept)


def run_line(cluster: LocalCluster, config: LineConfig) -> None:
    """Bring the line up on the cluster and show that it answers."""
    results = [run_stage(cluster, stage) for stage in config.stages]
    _say("\n== serve")
    start = time.monotonic()
    with PeakMemory(cluster.cluster_id) as memory:
        deploy(cluster, config)
        answer = ask(config)
    serving = f"replica ready and {answer.num_tokens} tokens streamed"
    from powerhouse.report import write_report  # plotting is slow to load, and only a finished line is drawn

    write_report(config.report, {stage.kind: stage.artifact for stage in config.stages}, config.prompt, answer.text)
    rows = [_row(result) for result in results]
    rows.append(("serve", f"http://127.0.0.1:{config.http_port}", serving, f"{time.monotonic() - start:.1f}", _mib(memory)))
    _print_table(("stage", "artifact", "counts", "seconds", "peak MiB"), rows)
    _say(f"\nreport: {config.report}")


def deploy(cluster: LocalCluster, config: LineConfig) -> None:
    """Deploy the application and wait until a completion of one token comes back.

    Raises:
        ClusterError: Serve reports that the deployment failed, or it was not ready in time.
    """
    cluster.deploy(_with_port(config))
    deadline = time.monotonic() + _READY_TIMEOUT_S
    with httpx.Client(timeout=30) as client:
        while time.monotonic() < deadline:
            for _ in range(_PROBES_PER_STATUS):
                if _answers(client, config):
                    return
                time.sleep(_PROBE_INTERVAL_S)
            if failure := _deploy_failure(cluster):
                raise ClusterError("the endpoint did not come up", got=failure)
    raise ClusterError("the endpoint was not ready in time", got=f"{_READY_TIMEOUT_S:.0f} s", do=f"see {cluster.dashboard_url}")


def _answers(client: httpx.Client, config: LineConfig) -> bool:
    """Try a completion of one token: an endpoint that only says it is healthy is not yet ready."""
    with contextlib.suppress(httpx.TransportError, httpx.HTTPStatusError):
        probe = {"model": _model_name(client, config), "prompt": "a", "max_tokens": 1}
        return client.post(_url(config, "completions"), json=probe).is_success
    return False


@dataclass(frozen=True)
class Answer:
    text: str
    num_tokens: int


def ask(config: LineConfig) -> Answer:
    """Stream one completion over HTTP and print it as it comes."""
    _say(f"\n{config.prompt}", end="")
    pieces: list[str] = []
    num_tokens = 0
    with httpx.Client(timeout=120) as client:
        body = {
            "model": _model_name(client, config),
            "prompt": config.prompt,
            "max_tokens": config.max_tokens,
            "temperature": 0.8,
            "top_p": 0.95,
            "seed": 1,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        with client.stream("POST", _url(config, "completions"), json=body) as response:
            response.raise_for_status()
            for event in _events(response):
                pieces.extend(choice["text"] for choice in event["choices"])
                num_tokens = (event.get("usage") or {}).get("completion_tokens", num_tokens)
                for choice in event["choices"]:
                    _say(choice["text"], end="")
    _say("\n")
    return Answer("".join(pieces), num_tokens)


def _events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """Server-sent events up to `[DONE]`."""
    for line in response.iter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


def _url(config: LineConfig, route: str) -> str:
    return f"http://127.0.0.1:{config.http_port}/v1/{route}"


def _model_name(client: httpx.Client, config: LineConfig) -> str:
    """Name of the model that the endpoint serves."""
    models = client.get(_url(config, "models")).raise_for_status().json()
    return str(models["data"][0]["id"])


def _with_port(config: LineConfig) -> Path:
    """Return the application file as it is, or a copy with the port that was asked for."""
    values = yaml.safe_load(config.serve_app.read_text(encoding="utf-8"))
    options = values.setdefault("http_options", {})
    if options.get("port") == config.http_port:
        return config.serve_app
    options["port"] = config.http_port
    copy = config.report.parent / config.serve_app.name
    copy.write_text(yaml.safe_dump(values), encoding="utf-8")
    return copy


def _deploy_failure(cluster: LocalCluster) -> str | None:
    """Return Serve's own message where an application has failed to deploy."""
    applications = cluster.serve_status().get("applications", {})
    return next((str(app["message"]) for app in applications.values() if app["status"] == "DEPLOY_FAILED"), None)


def _row(result: StageResult) -> tuple[str, ...]:
    manifest = result.artifact.manifest
    counts = "  ".join(f"{name} {value:,}" for name, value in list(manifest.counts.items())[:4])
    path = result.artifact.path.relative_to(storage_root())
    seconds = f"{result.seconds:.1f}" + (" (kept)" if result.was_kept else "")
    return (result.name, str(path), counts, seconds, f"{result.peak_bytes / 2**20:,.0f}")


def _mib(memory: PeakMemory) -> str:
    return f"{memory.peak_bytes / 2**20:,.0f}"


def _print_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    for row in [header, tuple("-" * width for width in widths), *rows]:
        _say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _say(text: str, end: str = "\n") -> None:
    print(text, end=end, flush=True)


def demo(config: LineConfig) -> None:
    check_port_is_free(config.http_port, "the endpoint", "http_port=NUMBER")
    with local.running(config.cluster) as cluster:
        run_line(cluster, config)


def up(config: LineConfig) -> None:
    check_port_is_free(config.http_port, "the endpoint", "http_port=NUMBER")
    cluster = local.start(config.cluster, outlives_us=True)
    try:
        run_line(cluster, config)
    except BaseException:
        cluster.stop()
        raise
    url, first = cluster.dashboard_url, config.stages[-1]
    with httpx.Client(timeout=30) as client:
        model = _model_name(client, config)
    _say(f"""
The cluster and the endpoint keep running (storage root {storage_root()}).
dashboard    {url}   (token: .venv/bin/ray get-auth-token)
submit       .venv/bin/ray job submit --address {url} --runtime-env jobs/runtime_env.yaml -- \\
               python {first.job} --config {first.config} output=demo/evaluation_2
ask          curl -N {_url(config, "completions")} -H 'Content-Type: application/json' \\
               -d '{{"model": "{model}", "prompt": "{config.prompt}", "max_tokens": 40, "stream": true}}'
stop         make down""")


def down() -> None:
    cluster = local.read_state()
    if cluster is None:
        _say("no cluster was started here")
        return
    cluster.stop()
    _say("stopped")


def main() -> None:
    """Exit 0, or 2 with one clear error, or 130 on Ctrl-C and SIGTERM, with everything stopped."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    commands = {"demo": demo, "up": up}
    action, arguments = (sys.argv[1] if len(sys.argv) > 1 else "--help"), sys.argv[2:]
    try:
        if action == "down":
            down()
        else:
            config = parse_command_line(LineConfig, arguments if action in commands else ["--help"], __doc__ or "")
            commands[action](config)
    except PowerhouseError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; everything is stopped\n")
        sys.exit(130)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()

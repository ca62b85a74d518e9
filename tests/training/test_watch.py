"""What is seen of a run: lines, TensorBoard, MLflow, looks at the model; and that it changes nothing."""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from distributed import run_on_ranks
from fakes import tiny_tokenizer
from powerhouse.errors import ConfigError, InputError
from powerhouse.evaluation.perplexity import nats_of_documents
from powerhouse.heldout import bits_per_byte
from powerhouse.models.generate import GenerationConfig, generate
from powerhouse.models.hub import load_decoder
from powerhouse.telemetry import read_metrics
from powerhouse.training.checks import check_watch
from powerhouse.training.config import TrainingConfig
from powerhouse.training.energy import DeclaredMeter, RaplMeter, find_meter
from powerhouse.training.trackers import Guarded
from powerhouse.training.watch import METRICS, SAMPLES, STARTS, TENSORBOARD
from tiny_run import HELDOUT_TEXTS, make_config, run_loop, without_times, write_heldout, write_tokens

PROMPT = "It was the best"


def watched(folder: Path, name: str, **watch: Any) -> TrainingConfig:
    shape = {"num_hidden_layers": 2, "max_position_embeddings": 128}
    config = make_config(folder, output=folder / name, watch={"tensorboard": True} | watch)
    return config.model_copy(update={"model": config.shape.model_copy(update=shape)})


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Of all event files, as TensorBoard reads them."""
    events = EventAccumulator(str(folder / TENSORBOARD))
    events.Reload()
    return {name: [(point.step, point.value) for point in events.Scalars(name)] for name in events.Tags()["scalars"]}


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, TrainingConfig]:
    """The same run three times: with all that can be seen, cut off and resumed, and with nothing."""
    folder = tmp_path_factory.mktemp("watched")
    write_tokens(folder / "tokens")
    corpus = write_heldout(folder)
    seen = {"heldout": corpus, "look_every": 2, "prompts": [PROMPT], "sample_tokens": 5, "declared_watts": 100}
    store = {"tracking_uri": f"file://{folder}/mlflow"}
    runs = {
        "whole": watched(folder, "whole", grid_g_per_kwh=400, **seen),
        "resumed": watched(folder, "resumed", grid_g_per_kwh=400, mlflow=store, **seen),
        "bare": watched(folder, "bare", tensorboard=False, log_every=3),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        assert run_on_ranks(2, run_loop, runs["whole"]) == [None, None]
        assert run_on_ranks(2, run_loop, runs["bare"]) == [None, None]
        assert run_on_ranks(2, run_loop, runs["resumed"], 5) == ["StopIteration: "] * 2
        assert run_on_ranks(2, run_loop, runs["resumed"]) == [None, None]
    return runs


@pytest.mark.slow
def test_weights_and_losses_are_to_the_bit_those_of_a_run_that_nobody_watches(everything: Mapping[str, TrainingConfig]) -> None:
    ours, bare = (load_decoder(everything[name].output).state_dict() for name in ("whole", "bare"))
    assert all(torch.equal(ours[name], tensor) for name, tensor in bare.items())

    seen = {row["step"]: row["loss"] for row in read_metrics(everything["whole"].output / METRICS)}
    rows = read_metrics(everything["bare"].output / METRICS)
    assert [row["step"] for row in rows] == [2, 5]  # every third step
    assert [row["loss"] for row in rows] == [seen[2], seen[5]]


@pytest.mark.slow
def test_a_resumed_run_leaves_the_lines_of_an_uninterrupted_one(everything: Mapping[str, TrainingConfig]) -> None:
    whole, resumed = everything["whole"].output, everything["resumed"].output

    for name in (METRICS, SAMPLES):
        assert without_times(read_metrics(resumed / name)) == without_times(read_metrics(whole / name))
    assert [row["step"] for row in read_metrics(resumed / METRICS)] == [0, 1, 2, 3, 4, 5]
    assert [json.loads(line)["step"] for line in (resumed / STARTS).read_text().splitlines()] == [0, 4]
    energies = [row["energy_wh"] for row in read_metrics(resumed / METRICS)]
    assert energies == sorted(energies)
    assert energies[0] > 0


@pytest.mark.slow
def test_tensorboard_reads_every_figure_once(everything: Mapping[str, TrainingConfig]) -> None:
    for name in ("whole", "resumed"):
        rows = read_metrics(everything[name].output / METRICS)
        found = scalars(everything[name].output)
        assert [step for step, _ in found["loss"]] == [0, 1, 2, 3, 4, 5]
        assert [value for _, value in found["loss"]] == pytest.approx([row["loss"] for row in rows])
        assert [step for step, _ in found["heldout_bits_per_byte"]] == [1, 3, 5]
        assert {"lr", "grad_norm", "tokens_per_s", "mfu", "memory_bytes", "energy_wh", "co2e_g"} <= found.keys()
    assert not (everything["bare"].output / TENSORBOARD).exists()


@pytest.mark.slow
def test_mlflow_has_one_run_for_a_resumed_folder_with_every_step_once(
    everything: Mapping[str, TrainingConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow.tracking import MlflowClient

    store = everything["resumed"].watch.mlflow
    assert store is not None
    client = MlflowClient(tracking_uri=store.tracking_uri)
    [found] = client.search_runs([client.get_experiment_by_name("powerhouse").experiment_id])

    history = client.get_metric_history(found.info.run_id, "loss")
    rows = read_metrics(everything["resumed"].output / METRICS)
    assert [(point.step, point.value) for point in history] == [(row["step"], row["loss"]) for row in rows]
    assert found.info.run_name == "resumed"
    assert found.data.params["optim.lr"] == "0.01"
    assert found.info.status == "FINISHED"


@pytest.mark.slow
def test_held_out_bits_per_byte_and_samples_are_those_of_the_finished_model(everything: Mapping[str, TrainingConfig]) -> None:
    config, tokenizer = everything["whole"], tiny_tokenizer()
    model = load_decoder(config.output)
    model.config = model.config.model_copy(update={"max_position_embeddings": 16})  # the rows' length
    nats = sum(nats_of_documents(model, tokenizer.encode_batch(HELDOUT_TEXTS), 0, 4))
    model.config = config.shape

    last = read_metrics(config.output / METRICS)[-1]
    sample = read_metrics(config.output / SAMPLES)[-1]
    [ids] = generate(model, [tokenizer.encode(PROMPT)], GenerationConfig(max_tokens=5), {0})

    expected = bits_per_byte(nats, len("".join(HELDOUT_TEXTS).encode()))
    assert last["heldout_bits_per_byte"] == pytest.approx(expected, rel=1e-5)
    assert sample == {"step": 5, "number": 0, "prompt": PROMPT, "text": tokenizer.decode(ids)}


@pytest.mark.slow
def test_a_tracking_server_that_is_gone_does_not_stop_the_training(tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{taken.getsockname()[1]}"
    config = watched(tmp_path, "model", mlflow={"tracking_uri": nobody}, tensorboard=False)

    assert run_on_ranks(1, run_loop, config) == [None]

    assert len(read_metrics(config.output / METRICS)) == 6
    lost = json.loads((config.output / STARTS).read_text().splitlines()[-1])["lines_lost"]
    assert lost["MLflow"] >= 1


class Broken:
    def log(self, step: int, values: Mapping[str, float], texts: Mapping[str, str]) -> None:
        raise OSError(f"no space left for step {step}")

    def close(self) -> None:
        pass


def test_a_tracker_that_fails_is_told_of_once_and_its_lines_are_counted(capfd: pytest.CaptureFixture[str]) -> None:
    tracker = Guarded("broken", Broken)
    for step in range(3):
        tracker.log(step, {"loss": 1.0}, {})
    tracker.close()

    assert tracker.num_lost == 3
    assert capfd.readouterr().err.count("a tracker loses lines; the training goes on") == 1
    assert not [thread for thread in threading.enumerate() if thread.name == "tracker-broken"]


def write_zone(folder: Path, name: str, microjoules: int) -> Path:
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / "energy_uj").write_text(f"{microjoules}\n")
    (folder / name / "max_energy_range_uj").write_text("1000000\n")
    return folder / name


def test_the_counters_of_all_packages_are_added_also_when_one_starts_again(tmp_path: Path) -> None:
    zones = [write_zone(tmp_path, "intel-rapl:0", 900_000), write_zone(tmp_path, "intel-rapl:1", 0)]
    write_zone(tmp_path, "intel-rapl:0:0", 5)  # a part of the first
    meter = find_meter(torch.device("cpu"), 50.0, tmp_path)
    assert isinstance(meter, RaplMeter)

    write_zone(tmp_path, "intel-rapl:0", 100_000)
    write_zone(tmp_path, "intel-rapl:1", 300_000)

    assert meter.joules() == pytest.approx(0.2 + 0.3)
    assert RaplMeter(zones, is_reader=False).joules() == 0


def test_without_a_counter_the_declared_power_is_taken_and_named_and_without_one_there_is_no_figure(tmp_path: Path) -> None:
    meter = find_meter(torch.device("cpu"), 50.0, tmp_path)

    assert isinstance(meter, DeclaredMeter)
    assert meter.source == "declared: 50 W a worker, not measured"
    assert find_meter(torch.device("cpu"), None, tmp_path) is None


@pytest.mark.parametrize(
    ("watch", "error", "message"),
    [
        ({"prompts": [PROMPT], "sample_tokens": 127}, ConfigError, "'It was the best' and watch.sample_tokens do not fit"),
        ({"prompts": [""]}, ConfigError, "watch.prompts: '' and watch.sample_tokens do not fit"),
        ({"heldout": "nowhere"}, InputError, "nowhere/heldout: no held-out documents"),
        (
            {"mlflow": {"tracking_uri": "http://x"}},
            ConfigError,
            "no MLflow client here\n  do: pip install",
        ),
    ],
)
def test_what_cannot_be_seen_is_refused_before_the_run_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watch: dict[str, Any], error: type[Exception], message: str
) -> None:
    write_tokens(tmp_path / "tokens")
    monkeypatch.setitem(sys.modules, "mlflow", None)  # as where it is not installed

    with pytest.raises(error) as caught:
        check_watch(watched(tmp_path, "model", **watch))

    assert message in str(caught.value)


@pytest.mark.gpu
def test_the_board_of_a_gpu_that_works_takes_energy() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    meter = find_meter(device, None)
    assert meter is not None
    assert meter.source == "NVML, the GPUs' boards"

    square = torch.ones(4096, 4096, device=device)
    end = time.monotonic() + 2
    while time.monotonic() < end:
        square @ square
        torch.cuda.synchronize()

    assert 20 < meter.joules() < 5000  # more than an idle board for two seconds, less than any board could

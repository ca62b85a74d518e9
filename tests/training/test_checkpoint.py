"""Checkpoints over gloo: what is whole, what is kept, who may read them, and what is said when the store fails."""

from __future__ import annotations

import json
import random
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.fs
import pytest
import torch
import torch.distributed as dist

from distributed import run_on_ranks
from powerhouse.cluster.processes import find_free_port
from powerhouse.models.hub import load_decoder
from powerhouse.training.checkpoint import Checkpoints, whole_steps
from powerhouse.training.checkpoint_files import CheckpointStore
from powerhouse.training.config import TrainingConfig
from powerhouse.training.guard import Guard
from powerhouse.training.objectives import Batch
from s3 import S3Server, refuse_all_keys, variables
from tiny_run import losses, make_config, run_loop, sharded_model, write_tokens

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> TrainingConfig:
    """Give a run on two ranks that nothing interrupted."""
    config = config_in(tmp_path_factory.mktemp("whole"))
    assert run_on_ranks(2, run_loop, config) == [None, None]
    return config


def config_in(folder: Path, **run: Any) -> TrainingConfig:
    write_tokens(folder / "tokens")
    return make_config(folder, run={"keep_checkpoints": 1} | run)


def test_a_stopped_run_resumes_at_its_checkpoint_with_the_same_losses_and_weights_to_the_bit(
    whole: TrainingConfig, tmp_path: Path
) -> None:
    config = config_in(tmp_path)

    assert run_on_ranks(2, run_loop, config, 5) == ["StopIteration: "] * 2
    assert whole_steps(config.checkpoints) == [4]
    assert run_on_ranks(2, run_loop, config) == [None, None]

    assert losses(config) == losses(whole)
    expected, got = load_decoder(whole.output).state_dict(), load_decoder(config.output).state_dict()
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


def test_a_run_that_is_asked_to_stop_on_one_rank_saves_at_once_on_all_and_goes_on_from_there(
    whole: TrainingConfig, tmp_path: Path
) -> None:
    config = config_in(tmp_path, checkpoint_every=100)

    messages = run_on_ranks(2, run_loop, config, None, partial(is_asked_on_rank_1, 2))

    assert messages == ["StopRequest: asked to stop; saved after 3 steps"] * 2
    assert whole_steps(config.checkpoints) == [3]
    assert run_on_ranks(2, run_loop, config) == [None, None]
    assert losses(config) == losses(whole)


def is_asked_on_rank_1(at_step: int, step: int, batch: Batch) -> bool:
    return dist.get_rank() == 1 and step == at_step


def test_a_checkpoint_is_the_state_at_its_step_however_long_writing_takes(tmp_path: Path) -> None:
    config = config_in(tmp_path)

    run_on_ranks(2, change_while_saving, config)

    assert whole_steps(config.checkpoints) == [1]


def change_while_saving(config: TrainingConfig) -> None:
    model, optimizer = sharded_model(config)
    before = [parameter.to_local().clone() for parameter in model.parameters()]
    with Checkpoints(config.checkpoints, "this run", keep=1) as checkpoints:
        checkpoints._store = SlowStore(config.checkpoints)
        checkpoints.save(1, model, optimizer, Guard(config.optim))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.to_local().zero_()
        assert whole_steps(config.checkpoints) == []  # it is still being written
    with Checkpoints(config.checkpoints, "this run", keep=1) as checkpoints:
        assert checkpoints.resume(model, optimizer, Guard(config.optim)) == 1
    assert all(torch.equal(parameter.to_local(), old) for parameter, old in zip(model.parameters(), before, strict=True))


class SlowStore(CheckpointStore):
    def writer(self, folder: str) -> Any:
        writer = super().writer(folder)
        write_data = writer.write_data
        writer.write_data = lambda *arguments: (time.sleep(0.5), write_data(*arguments))[1]
        return writer


def test_what_is_not_whole_is_told_of_deleted_and_the_one_before_is_used(
    whole: TrainingConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = config_in(tmp_path, keep_checkpoints=3, checkpoint_every=1)
    run_on_ranks(2, run_loop, config, 3)
    folder = Path(config.checkpoints)
    shutil.copytree(folder / "step_00000003", folder / "step_00000004")
    (folder / "step_00000004" / "complete.json").write_text('{"files": {')  # killed while it was written
    truncate(folder / "step_00000003")
    flip_a_bit(folder / "step_00000002")

    assert whole_steps(config.checkpoints) == [1, 2]  # by their sizes
    assert run_on_ranks(2, run_loop, config) == [None, None]

    said = [json.loads(line) for line in capfd.readouterr().err.splitlines() if "is not whole" in line]
    told = [(line["checkpoint"], line["goes_on_from_step"]) for line in said]
    assert told == [("step_00000003", 2), ("step_00000004", 2), ("step_00000002", 1)]
    assert "has 100 bytes" in said[0]["fault"]
    assert said[2]["fault"] == "__1_0.distcp is not what was written: its CRC-32 is another"
    assert losses(config) == losses(whole)
    assert whole_steps(config.checkpoints) == [4, 5, 6]


def truncate(folder: Path) -> None:
    for path in folder.glob("*.distcp"):
        path.write_bytes(path.read_bytes()[:100])


def flip_a_bit(folder: Path, name: str = "__1_0.distcp") -> None:
    content = bytearray((folder / name).read_bytes())
    content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "messages"),
    [
        (truncate, ("step_00000004: damaged checkpoint, and there is none before it", "bytes, not", "do: delete it")),
        (
            flip_a_bit,
            ("step_00000004: damaged checkpoint, and there is none before it", "__1_0.distcp is not what", "do: delete it"),
        ),
        (partial(flip_a_bit, name=".metadata"), ("step_00000004: damaged checkpoint", ".metadata is not what was written")),
        (lambda folder: (folder / "__1_0.distcp").unlink(), ("__1_0.distcp has no bytes, not", "do: delete it")),
    ],
)
def test_a_damaged_only_checkpoint_is_one_clear_error_and_never_a_start_from_the_first_row(
    whole: TrainingConfig, tmp_path: Path, damage: Any, messages: tuple[str, ...]
) -> None:
    config = whole.model_copy(update={"output": tmp_path / "model", "num_steps": 8})
    target = Path(config.checkpoints)
    shutil.copytree(whole.checkpoints, target)
    (target / "step_00000006").rename(target / "step_00000004")
    damage(target / "step_00000004")

    got = run_on_ranks(2, run_loop, config)

    assert all(part in message for part in messages for message in got), got
    assert len(set(got)) == 1


def test_the_checkpoints_of_another_run_are_refused(whole: TrainingConfig) -> None:
    message = run_on_ranks(2, resume_as_another, whole)[1]

    assert "holds the checkpoints of another run\n  got: step_00000006\n  do: set run.checkpoints" in message


def resume_as_another(config: TrainingConfig) -> str:
    checkpoints = Checkpoints(config.checkpoints, "another run", keep=1)
    try:
        checkpoints.resume(*sharded_model(config), Guard(config.optim))
    except Exception as error:
        return str(error)
    return ""


def test_a_run_whose_checkpoints_are_objects_in_s3_resumes_on_another_number_of_ranks(
    whole: TrainingConfig, tmp_path: Path, s3: S3Server
) -> None:
    config = config_in(tmp_path, checkpoints=f"{s3.uri}/runs/a")

    assert run_on_ranks(2, run_loop, config, 5) == ["StopIteration: "] * 2
    assert not (config.output / "checkpoints").exists()
    assert run_on_ranks(1, run_loop, config) == [None]

    assert losses(config) == pytest.approx(losses(whole), abs=1e-5)
    assert losses(config)[:5] == losses(whole)[:5]
    files, path = pyarrow.fs.FileSystem.from_uri(config.checkpoints)
    names = [item.base_name for item in files.get_file_info(pyarrow.fs.FileSelector(path)) if item.type.name == "Directory"]
    assert names == ["step_00000006"]


def test_a_store_that_refuses_fails_at_the_start_with_one_clear_error(tmp_path: Path, s3: S3Server) -> None:
    config = config_in(tmp_path, checkpoints="s3://no-such-bucket/a")
    refused = config.model_copy(update={"run": config.run.model_copy(update={"checkpoints": f"{s3.uri}/a"})})

    no_bucket = run_on_ranks(2, run_loop, config)
    refuse_all_keys(s3.endpoint)
    no_right = run_on_ranks(2, run_loop, refused)
    refuse_all_keys(s3.endpoint, refuses=False)

    for messages, uri, reason in ((no_bucket, config.checkpoints, "BUCKET"), (no_right, refused.checkpoints, "ACCESS")):
        assert len(set(messages)) == 1
        assert messages[0].startswith(f"ArtifactError: {uri}: the store of the checkpoints fails")
        assert reason in messages[0].upper()
        assert "do: check the name, the network and the rights" in messages[0]


def test_a_store_that_is_lost_halfway_ends_the_run_on_every_rank_and_the_checkpoint_before_is_whole(
    tmp_path: Path, s3: S3Server
) -> None:
    config = config_in(tmp_path, checkpoints=f"{s3.uri}/runs/b")

    messages = run_on_ranks(2, run_loop, config, None, partial(refuse_before, s3.endpoint, 4))
    refuse_all_keys(s3.endpoint, refuses=False)

    assert len(set(messages)) == 1
    assert messages[0].startswith(f"TrainingError: {config.checkpoints}: the checkpoint could not be saved\n  got: ")
    assert "do: see that the store can be written to, and run the job again" in messages[0]
    assert whole_steps(config.checkpoints) in ([2], [4])  # the second was being written
    assert run_on_ranks(2, run_loop, config) == [None, None]


def refuse_before(endpoint: str, at_step: int, step: int, batch: Batch) -> None:
    if step == at_step and dist.get_rank() == 0:
        refuse_all_keys(endpoint)


def test_a_server_that_does_not_answer_is_the_same_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables(f"http://127.0.0.1:{find_free_port()}").items():
        monkeypatch.setenv(name, value)

    messages = run_on_ranks(1, run_loop, config_in(tmp_path, num_workers=1, checkpoints="s3://bucket/a"))

    assert messages[0].startswith("ArtifactError: s3://bucket/a: the store of the checkpoints fails")
    assert "onnect" in messages[0]

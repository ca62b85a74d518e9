"""What is said of workers that failed, from the errors that torch, Python and Ray give."""

from __future__ import annotations

import pytest
import ray.train
import torch

from powerhouse.errors import ClusterError, InputError, PowerhouseError, TrainingError
from powerhouse.training.group import _explain


def error_of_an_allocation() -> Exception:
    try:
        torch.empty(2**50)
    except RuntimeError as error:
        return error
    raise AssertionError("a pebibyte was there")


def failed(error: Exception) -> ray.train.WorkerGroupError:
    message = f"[Rank 1]\nTraceback (most recent call last):\n  ...\n{type(error).__name__}: {error}\n"
    return ray.train.WorkerGroupError(message, {1: error})


KILLED = ray.exceptions.OutOfMemoryError(
    "1 worker(s) were killed due to the node running low on memory. 5.51GB used / 23.54GB limit\nOOM kill reason: usage\n"
    "Refer to the documentation on how to address the out of memory issue: https://docs.ray.io"
)
OUT_OF_MEMORY = r"a worker ran out of memory 3 times\n  got: .*\n  do: lower run\.micro_batch_rows, set run\.recompute=full"


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (failed(error_of_an_allocation()), TrainingError, OUT_OF_MEMORY),
        (failed(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")), TrainingError, OUT_OF_MEMORY),
        (failed(MemoryError()), TrainingError, OUT_OF_MEMORY),
        (failed(KILLED), TrainingError, OUT_OF_MEMORY),
        (
            ray.train.ControllerError(KILLED),
            TrainingError,
            r"a worker ran out of memory while it started\n  got: .*5\.51GB used / 23\.54GB limit\n  do: see what else takes",
        ),
        (failed(InputError("rows-00000.arrow: damaged token shard")), InputError, "^rows-00000.arrow: damaged token shard$"),
        (
            failed(RuntimeError("Connection closed by peer")),
            TrainingError,
            r"workers failed 3 times\n(.|\n)*do: run the job again",
        ),
        (ray.train.ControllerError(ValueError("no room")), ClusterError, r"could not be started\n(.|\n)*no room"),
    ],
    ids=["cpu", "gpu", "python", "ray", "start", "ours", "network", "controller"],
)
def test_why_the_workers_failed_is_told(error: Exception, kind: type[PowerhouseError], message: str) -> None:
    with pytest.raises(kind, match=message):
        raise _explain(error, 2)

"""Checkpoints of a run: `<store>/step_XXXXXXXX`, a file for each rank, loadable by any number of ranks.

The state is copied while the loop waits and written while it goes on, by torch's `async_save`. What makes a checkpoint whole is
its last file, complete.json, which has size and CRC-32 of every other one: object stores cannot rename. A folder without it,
or whose files are not as it says, is never loaded. `<store>/run.json` says whose checkpoints these are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from powerhouse.errors import ArtifactError, TrainingError
from powerhouse.telemetry import make_logger
from powerhouse.training.checkpoint_files import CheckpointStore, checksums_of
from powerhouse.training.guard import Guard
from powerhouse.training.sharding import frozen_names
from powerhouse.training.storage import Store

_PREFIX = "step_"
_COMPLETE = "complete.json"
_RUN = "run.json"
_UNFINISHED = f"it has no whole {_COMPLETE}: the run ended while it was written"
_PART = StateDictOptions(strict=False)
"""What is frozen lies in the directory that the run starts from. A tensor that a checkpoint lacks stops its reading anyway."""


class StopRequest(Exception):
    """This run was asked to stop, and has saved its state: whoever started it may start it again elsewhere."""


class Checkpoints:
    """The checkpoints of one run. Every method is a collective; one save is under way at most."""

    def __init__(
        self, location: str | Path, run_id: str, keep: int, is_asked_to_stop: Callable[[], bool] | None = None
    ) -> None:
        self._store, self._run_id, self._keep = CheckpointStore(location), run_id, keep
        self._is_asked_to_stop = is_asked_to_stop
        # Groups of their own: the loop's collectives go on while a thread saves, and need not be of CPU tensors.
        self._saving, self._asking = dist.new_group(backend="gloo"), dist.new_group(backend="gloo")
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.settle()
        self._thread.shutdown()  # waits for what is being written

    def resume(self, model: nn.Module, optimizer: torch.optim.Optimizer, guard: Guard) -> int:
        """Fill model, optimiser and guard from the newest whole checkpoint; give the steps done, 0 where there is none.

        Raises:
            ArtifactError: there were checkpoints and none is whole, they are another run's, or they cannot be read.
        """
        faults: dict[int, str] = {}
        while step := _from_main(lambda: _choose(self._store, self._run_id, faults), self._asking):
            fault = self._find_fault(step)
            if fault is None:
                self._load(step, model, optimizer, guard)
                break
            faults[step] = fault
        return step

    def _find_fault(self, step: int) -> str | None:
        """Say which file is not as it was written, if any; each rank reads every n-th."""
        found: list[str | ArtifactError | None] = [None] * dist.get_world_size()
        try:
            fault: str | ArtifactError | None = _content_fault(self._store, step, dist.get_rank(), dist.get_world_size())
        except OSError as error:
            fault = _store_fails(self._store, error)
        dist.all_gather_object(found, fault, group=self._asking)
        if failure := next((item for item in found if isinstance(item, ArtifactError)), None):
            raise failure
        return next((item for item in found if isinstance(item, str)), None)

    def _load(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, guard: Guard) -> None:
        """Each rank reads its slices only."""
        state = _state(model, optimizer, guard)
        try:
            state_dict_loader.load(state, storage_reader=self._store.reader(_folder(step)))
        except (CheckpointException, OSError) as error:
            do = "delete it: the run then goes on from the one before it, or from the start"
            raise ArtifactError(f"{self._path(step)}: damaged checkpoint", got=_reason(error), do=do) from error
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=_PART)
        guard.load_state_dict(state["guard"])

    def after_step(self, num_done: int, is_due: bool, model: nn.Module, optimizer: torch.optim.Optimizer, guard: Guard) -> None:
        """Save if it is due or if any rank was asked to stop.

        Raises:
            StopRequest: a rank was asked to stop; the state after `num_done` steps is saved.
            TrainingError: this save, or the one before it, failed.
        """
        is_last = self._is_stopping()
        if is_due or is_last:
            self.save(num_done, model, optimizer, guard)
        if is_last:
            self.settle()
            raise StopRequest(f"asked to stop; saved after {num_done} steps")

    def _is_stopping(self) -> bool:
        if self._is_asked_to_stop is None:
            return False
        asked = torch.tensor(int(self._is_asked_to_stop()))
        dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=self._asking)
        return bool(asked.item())

    def save(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, guard: Guard) -> None:
        """Copy the state after `step` steps and begin to write it, once the save before this one is whole.

        Raises:
            TrainingError: the save before this one failed.
        """
        self.settle()
        writer = self._store.writer(_folder(step))
        written = state_dict_saver.async_save(
            _state(model, optimizer, guard), storage_writer=writer, process_group=self._saving
        )
        self._pending = self._thread.submit(self._commit, step, written, writer)

    def _commit(self, step: int, written: Any, writer: FileSystemWriter) -> None:
        """In the thread: once every rank has written its file, the first one makes the checkpoint whole."""
        written.result()
        checksums: list[dict[str, int]] = [{}] * dist.get_world_size()
        dist.all_gather_object(checksums, checksums_of(writer), group=self._saving)
        if dist.get_rank() != 0:
            return
        crc32 = {name: number for of_rank in checksums for name, number in of_rank.items()}
        sizes = self._store.list_files(_folder(step))
        complete = {"step": step, "files": {name: {"bytes": sizes.get(name), "crc32": crc32[name]} for name in sorted(crc32)}}
        self._store.write(f"{_folder(step)}/{_COMPLETE}", json.dumps(complete, indent=1).encode())
        for old in _whole_steps(self._store)[: -self._keep]:
            self._store.remove(_folder(old))

    def settle(self) -> None:
        """Wait for the save that is under way.

        Raises:
            TrainingError: it failed, on any rank; the checkpoints before it are untouched.
        """
        if self._pending is None:
            return
        error, self._pending = self._pending.exception(), None
        reasons: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(reasons, error and _reason(error), group=self._saving)
        if reason := next(filter(None, reasons), None):
            do = "see that the store can be written to, and run the job again: it goes on from the last checkpoint"
            raise TrainingError(f"{self._store.location}: the checkpoint could not be saved", got=reason, do=do) from error

    def _path(self, step: int) -> str:
        return f"{self._store.location}/{_folder(step)}"


def whole_steps(location: str | Path) -> list[int]:
    """Steps done at each whole checkpoint, rising."""
    return _whole_steps(Store(location))


def _whole_steps(store: Store) -> list[int]:
    return [step for step in _steps(store) if not _fault(store, step)]


def _steps(store: Store) -> list[int]:
    names = (name.removeprefix(_PREFIX) for name in store.list_folders() if name.startswith(_PREFIX))
    return sorted(int(name) for name in names if name.isdigit())


def _choose(store: Store, run_id: str, known: Mapping[int, str]) -> int:
    """The newest step to go on from; what is not whole is told of and deleted, so that nothing of it gets into another.

    `known` are faults of steps that were found before.
    """
    try:
        _claim(store, run_id)
        faults = {step: known.get(step) or _fault(store, step) for step in _steps(store)}
        newest = max((step for step, fault in faults.items() if not fault), default=0)
        damaged = [step for step, fault in faults.items() if fault and fault != _UNFINISHED]
        if damaged and not newest:
            what = f"{store.location}/{_folder(damaged[-1])}: damaged checkpoint, and there is none before it"
            raise ArtifactError(what, got=faults[damaged[-1]], do="delete it to start again from step 0")
        for step in (step for step, fault in faults.items() if fault):
            fields = {"checkpoint": _folder(step), "fault": faults[step], "goes_on_from_step": newest}
            make_logger("training").warning("a checkpoint is not whole and is not used", extra={"fields": fields})
            store.remove(_folder(step))
    except OSError as error:
        raise _store_fails(store, error) from error
    return newest


def _store_fails(store: Store, error: OSError) -> ArtifactError:
    do = "check the name, the network and the rights (AWS_* variables for s3://), and run the job again"
    return ArtifactError(f"{store.location}: the store of the checkpoints fails", got=_reason(error), do=do)


def _claim(store: Store, run_id: str) -> None:
    """Write down whose checkpoints these are, which shows at the start of a run that the store can be written to."""
    mark = json.dumps({"run": run_id}).encode()
    if _RUN in store.list_files("") and store.read(_RUN) != mark and _steps(store):
        what = f"{store.location}: holds the checkpoints of another run"
        raise ArtifactError(what, got=_folder(_steps(store)[-1]), do="set run.checkpoints to a folder of this run's own")
    store.write(_RUN, mark)


def _fault(store: Store, step: int) -> str | None:
    """Say what keeps the checkpoint from being whole, as far as sizes tell, if anything."""
    try:
        files = _files(store, step)
    except (FileNotFoundError, ValueError):
        return _UNFINISHED
    found = store.list_files(_folder(step))
    wrong = (name for name, file in files.items() if found.get(name) != file["bytes"])
    return next((f"{name} has {found.get(name, 'no')} bytes, not {files[name]['bytes']}" for name in wrong), None)


def _content_fault(store: Store, step: int, rank: int, num_ranks: int) -> str | None:
    """Say which of a rank's share of the files has another content than was written, if any."""
    share = sorted(_files(store, step).items())[rank::num_ranks]
    wrong = (name for name, file in share if store.checksum(f"{_folder(step)}/{name}") != file["crc32"])
    return next((f"{name} is not what was written: its CRC-32 is another" for name in wrong), None)


def _files(store: Store, step: int) -> dict[str, dict[str, int]]:
    files: dict[str, dict[str, int]] = json.loads(store.read(f"{_folder(step)}/{_COMPLETE}"))["files"]
    return files


def _from_main(choose: Callable[[], int], group: dist.ProcessGroup) -> int:
    """What `choose` gives or raises on the first rank, on every rank."""
    chosen: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            chosen = [choose()]
        except ArtifactError as error:
            chosen = [error]
    dist.broadcast_object_list(chosen, group=group)
    if isinstance(chosen[0], ArtifactError):
        raise chosen[0]
    return int(chosen[0])


def _folder(step: int) -> str:
    return f"{_PREFIX}{step:08d}"


def _state(model: nn.Module, optimizer: torch.optim.Optimizer, guard: Guard) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(model, optimizer)
    frozen = frozen_names(model)
    model_state = {name: item for name, item in model_state.items() if name not in frozen}
    return {"model": model_state, "optimizer": optimizer_state, "guard": guard.state_dict()}


def _reason(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1]  # the rest is every rank's traceback

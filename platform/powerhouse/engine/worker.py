"""A stage's process: connect, load, compute until the driver hangs up.

Shapes: T tokens of a batch, B of its rows that get a new token, C model width.
"""

from __future__ import annotations

import os
import time
from collections import deque
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but torch does not mark it so

from powerhouse.engine import wire
from powerhouse.engine.batch import ForwardBatch
from powerhouse.engine.cut import cut_layers, measure_head
from powerhouse.engine.settings import EngineConfig
from powerhouse.engine.stage import Stage
from powerhouse.models.hub import read_config

_NEIGHBOUR_TIMEOUT = timedelta(minutes=10)
_TELL_EVERY_S = 1.0


def run_stage(
    rank: int,
    num_stages: int,
    model_path: Path,
    config: EngineConfig,
    address: tuple[str, int],
    store_port: int,
    secret: bytes,
) -> None:
    """Be stage `rank` of the pipeline whose driver listens at `address`; returns when the driver closes it or is gone.

    An error is told to the driver and raised.
    """
    assert num_stages == config.num_stages, f"{num_stages} stages started, {config.num_stages} configured"
    with wire.connect(address, secret) as driver:
        _use_interface_of(driver)
        wire.send(driver, "rank", rank)
        try:
            num_layers = read_config(Path(model_path)).num_hidden_layers
            cut_layers(num_layers, num_stages)  # what cannot be cut is refused before others are waited for
            store = TCPStore(address[0], store_port, is_master=False, timeout=_NEIGHBOUR_TIMEOUT)
            if rank == 0:  # measures, and all do as it says: two measurements are two results
                store.set("head_layers", str(measure_head(Path(model_path), config) if num_stages > 1 else 0.0))
            layers = cut_layers(num_layers, num_stages, float(store.get("head_layers")))[rank]
            stage = Stage.load(Path(model_path), config, layers)
            neighbours = Neighbours(rank, num_stages, stage, store)
        except Exception as error:
            wire.send(driver, "failed", f"{type(error).__name__}: {error}")
            raise
        wire.send(driver, "ready", rank)
        try:
            _compute(stage, neighbours, driver)
        except (EOFError, ConnectionError):
            return  # the driver hung up
        finally:
            neighbours.close()


class Neighbours:
    """The stages before and after this one."""

    def __init__(self, rank: int, num_stages: int, stage: Stage, store: TCPStore) -> None:
        self._rank = rank
        self._width, self._dtype, self._device = stage.width, stage.dtype, stage.device
        self._sending: tuple[dist.Work, Tensor] | None = None
        backend = "nccl" if self._device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=num_stages, timeout=_NEIGHBOUR_TIMEOUT)
        self.tokens = NewTokens(num_stages)

    def receive(self, num_tokens: int) -> Tensor:
        """Wait for [T, C] from the stage before."""
        hidden_TC = torch.empty(num_tokens, self._width, dtype=self._dtype, device=self._device)
        dist.recv(hidden_TC, self._rank - 1)
        return hidden_TC

    def send(self, hidden_TC: Tensor) -> None:
        """Start sending [T, C] to the stage after, when what was sent before has gone."""
        if self._sending:
            self._sending[0].wait()
        work = dist.isend(hidden_TC, self._rank + 1)
        assert work is not None, "this process is a rank of the group"
        self._sending = work, hidden_TC

    def close(self) -> None:
        dist.destroy_process_group()


class NewTokens:
    """From the last stage to the first, in the order of the batches and beside the hidden states.

    At most `num_stages` + 1 batches are in flight, so those before them are on the driver: the first stage takes them without
    waiting, and nothing piles up.
    """

    def __init__(self, num_stages: int) -> None:
        self._num_stages = num_stages
        self._group = dist.new_group(backend="gloo", timeout=_NEIGHBOUR_TIMEOUT)
        self._sending: deque[tuple[dist.Work, Tensor]] = deque()
        self._expected: deque[int] = deque()
        """B of each batch whose tokens have not been received, oldest first."""
        self._latest: list[int] = []

    def send(self, token_ids: list[int]) -> None:
        if not token_ids:
            return
        ids_B = torch.tensor(token_ids)
        work = dist.isend(ids_B, 0, self._group)
        assert work is not None, "this process is a rank of the group"
        self._sending.append((work, ids_B))
        if len(self._sending) > self._num_stages + 1:
            self._sending.popleft()[0].wait()

    def fill(self, batch: ForwardBatch) -> ForwardBatch:
        """Put in the tokens that the batch awaits."""
        num_left = batch.num_back - 1 if batch.num_back else self._num_stages
        while len(self._expected) > num_left:
            self._latest = self._receive(self._expected.popleft())
        self._expected.append(len(batch.sampled_rows))
        return batch.told(self._latest)

    def _receive(self, num_tokens: int) -> list[int]:
        ids_B = torch.empty(num_tokens, dtype=torch.long)
        if num_tokens:
            dist.recv(ids_B, self._num_stages - 1, self._group)
        token_ids: list[int] = ids_B.tolist()
        return token_ids


def _use_interface_of(driver: Connection) -> None:
    """Let the neighbours talk over the network that reaches the driver, unless the environment names another one.

    By default gloo takes the address that the host's name resolves to, which on many machines is a loopback one.
    """
    with wire.socket_of(driver) as channel:
        address = channel.getsockname()[0]
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in entries):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", name)


def _compute(stage: Stage, neighbours: Neighbours, driver: Connection) -> None:
    busy, told_s = _Stopwatch(stage.device), 0.0
    while True:
        batch = ForwardBatch.from_bytes(driver.recv_bytes())
        if stage.is_first and not stage.is_last:
            batch = neighbours.tokens.fill(batch)
        received_TC = None if stage.is_first else neighbours.receive(batch.num_tokens)
        with busy:
            hidden_TC = stage.forward(batch, received_TC)
            result = stage.sample(batch, hidden_TC) if stage.is_last else None
        if result is None:
            neighbours.send(hidden_TC)
        else:
            if not stage.is_first:
                neighbours.tokens.send(result.token_ids)
            wire.send(driver, "tokens", result)
        if time.monotonic() - told_s > _TELL_EVERY_S:
            wire.send(driver, "busy", busy.total_s())
            told_s = time.monotonic()


class _Stopwatch:
    """Adds up the seconds inside `with`, on a GPU by its own clock, which nothing waits for."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._total_s = 0.0
        self._start_s = 0.0
        self._events: deque[tuple[torch.Event, torch.Event]] = deque()

    def __enter__(self) -> None:
        self._start_s = time.perf_counter()
        if self._on_gpu:
            self._events.append((torch.Event("cuda", enable_timing=True), torch.Event("cuda", enable_timing=True)))
            self._events[-1][0].record()

    def __exit__(self, *_: object) -> None:
        if self._on_gpu:
            self._events[-1][1].record()
        else:
            self._total_s += time.perf_counter() - self._start_s

    def total_s(self) -> float:
        while self._events and self._events[0][1].query():
            start, stop = self._events.popleft()
            self._total_s += start.elapsed_time(stop) / 1000
        return self._total_s

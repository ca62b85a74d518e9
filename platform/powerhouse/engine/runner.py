"""Where batches are computed: in this process, or in a pipeline of stage processes that this one drives.

The pipeline has two planes. Control: one TCP connection from each stage to the driver, on which the driver sends every batch
to every stage and the last stage answers with the new tokens; both sides prove that they know the secret. Data: hidden
states go from stage to stage, and new tokens from the last to the first, by torch.distributed, whose rendezvous store the
driver hosts without being a rank. A connection that ends means a process that ended, for both sides: that is all the
supervision there is.
"""

from __future__ import annotations

import secrets
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import NoReturn, Protocol

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but torch does not mark it so

from powerhouse.engine import wire
from powerhouse.engine.batch import BatchResult, ForwardBatch
from powerhouse.engine.stage import Stage
from powerhouse.errors import EngineError

_POLL_S = 0.2


class Runner(Protocol):
    """Computes batches in the order of their submission, up to `num_slots` of them at a time."""

    num_slots: int
    tells_tokens: bool
    """Whether a batch may await tokens that the oldest of those before it is still to choose."""

    def submit(self, batch: ForwardBatch) -> None: ...

    def collect(self) -> BatchResult:
        """Wait for the oldest submitted batch and return its new tokens, one for each sampled row.

        Raises:
            EngineError: a stage is lost; nothing more can be computed.
        """

    def bubbles(self) -> list[float]:
        """Of each pipeline stage, the share of the last second's computing in which it waited for the others."""

    def close(self) -> None: ...


class LocalRunner:
    """One stage, in this process."""

    num_slots = 1
    tells_tokens = False

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._submitted: deque[ForwardBatch] = deque()

    def submit(self, batch: ForwardBatch) -> None:
        self._submitted.append(batch)

    def collect(self) -> BatchResult:
        batch = self._submitted.popleft()
        return self._stage.sample(batch, self._stage.forward(batch))

    def bubbles(self) -> list[float]:
        return []

    def close(self) -> None:
        self._submitted.clear()


class Bubbles:
    """How long each stage waits while there is something to compute; where nothing is in flight, nobody waits in vain."""

    def __init__(self, num_stages: int) -> None:
        self.shares = [0.0] * num_stages
        self._num_in_flight = 0
        self._since_s = self._total_s = 0.0
        self._told = [(0.0, 0.0)] * num_stages

    def begin(self) -> None:
        self._total_s, self._since_s = self._now_s(), time.monotonic()
        self._num_in_flight += 1

    def end(self) -> None:
        self._total_s, self._since_s = self._now_s(), time.monotonic()
        self._num_in_flight -= 1

    def tell(self, rank: int, busy_s: float) -> None:
        """Take what a stage says of the seconds that it has computed in all."""
        total_s, (total_before_s, busy_before_s) = self._now_s(), self._told[rank]
        if total_s > total_before_s:
            share = 1 - (busy_s - busy_before_s) / (total_s - total_before_s)
            self.shares[rank] = min(max(share, 0.0), 1.0)
        self._told[rank] = total_s, busy_s

    def _now_s(self) -> float:
        return self._total_s + (time.monotonic() - self._since_s if self._num_in_flight else 0.0)


class PipelineRunner:
    """The driver's side of a pipeline.

    Make it with `listen`, start the stages with its address, store port and secret (`worker.run_stage`), then `wait_ready`.
    """

    def __init__(self, num_stages: int, server: socket.socket, store: TCPStore) -> None:
        self.num_slots = num_stages
        self.tells_tokens = num_stages > 1
        self.address: tuple[str, int] = server.getsockname()[:2]
        self.store_port = store.port
        self.secret = secrets.token_bytes(32)
        self._server = server
        self._store: TCPStore | None = store
        self._stages: dict[int, Connection] = {}
        self._ready: set[int] = set()
        self._results: deque[BatchResult] = deque()
        self._bubbles = Bubbles(num_stages)

    @classmethod
    def listen(cls, num_stages: int, host: str = "127.0.0.1") -> PipelineRunner:
        """Open both planes on free ports of the address `host`, and of no other; the stages must be able to reach it."""
        server = socket.create_server((host, 0))
        store_server = socket.create_server((host, 0))
        port = store_server.getsockname()[1]
        store = TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=store_server.detach())
        return cls(num_stages, server, store)

    def wait_ready(self, timeout_s: float, check: Callable[[], None] = lambda: None) -> None:
        """Return when every stage has its layers and its neighbours.

        `check` is called a few times a second and may raise: whoever started the stages knows of some ends that no
        connection tells, such as that of a stage that never connected.

        Raises:
            EngineError: a stage failed, or is not ready in time.
        """
        deadline = time.monotonic() + timeout_s
        while len(self._ready) < self.num_slots:
            check()
            if time.monotonic() > deadline:
                missing = sorted(set(range(self.num_slots)) - self._ready)
                raise EngineError(f"pipeline stages are not ready after {timeout_s:g} s", got=f"missing: {missing}")
            channels = wait([self._server, *self._stages.values()], _POLL_S)
            if self._server in channels:
                self._accept()
            self._receive([channel for channel in channels if channel is not self._server])
        self._server.close()

    def submit(self, batch: ForwardBatch) -> None:
        data = batch.to_bytes()
        self._bubbles.begin()
        for rank, connection in self._stages.items():
            try:
                connection.send_bytes(data)
            except OSError:
                self._lose(rank)

    def collect(self) -> BatchResult:
        if not self._stages:
            raise EngineError("the pipeline is closed", do="start the engine again")
        while not self._results:
            self._receive(wait(list(self._stages.values())))
        self._bubbles.end()
        return self._results.popleft()

    def bubbles(self) -> list[float]:
        return list(self._bubbles.shares)

    def close(self) -> None:
        """Hang up, which ends the stages."""
        for connection in self._stages.values():
            connection.close()
        self._stages.clear()
        self._server.close()
        self._store = None

    def _accept(self) -> None:
        connection = wire.accept(self._server, self.secret)
        if connection is None:
            return
        try:
            _, rank = wire.receive(connection)
        except (EOFError, OSError):
            raise EngineError("a pipeline stage is lost: its process ended as it connected") from None
        assert isinstance(rank, int), f"a stage gives its rank first, not {rank!r}"
        assert rank in set(range(self.num_slots)) - set(self._stages), f"a stage of rank {rank} is not expected"
        self._stages[rank] = connection

    def _receive(self, channels: Sequence[object]) -> None:
        for rank, connection in self._stages.items():
            if connection not in channels:
                continue
            try:
                kind, value = wire.receive(connection)
            except (EOFError, OSError):
                self._lose(rank)
            if kind == "failed":
                raise EngineError(f"pipeline stage {rank} failed", got=value, do="start the engine again")
            if kind == "ready":
                self._ready.add(rank)
            elif kind == "busy":
                assert isinstance(value, float), "seconds"
                self._bubbles.tell(rank, value)
            else:
                self._results.append(BatchResult.from_wire(value))

    def _lose(self, rank: int) -> NoReturn:
        raise EngineError(f"pipeline stage {rank} is lost: its process ended", do="start the engine again") from None

"""The engine in a thread of its own, and its outputs on an event loop.

The thread alone touches the engine: what others ask of it goes through an inbox of commands, which it carries out between
two steps and sleeps on while there is nothing to generate. What comes back goes to one asyncio queue per request.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from threading import Thread

from powerhouse.engine.engine import Engine
from powerhouse.engine.params import SamplingParams
from powerhouse.engine.request import Output
from powerhouse.errors import EngineError, RequestError
from powerhouse.telemetry import Gauge, make_logger

_GAUGES = {
    "num_running": "num_requests_running",
    "num_waiting": "num_requests_waiting",
    "kv_cache_usage": "kv_cache_usage_perc",
    "num_preemptions": "num_preemptions",
    "prefix_cache_queries": "prefix_cache_queries",
    "prefix_cache_hits": "prefix_cache_hits",
}
"""Name in the engine's stats -> name as a metric."""


class EngineLoop:
    """Many requests at a time on one engine. Metrics go to `record`, by name."""

    def __init__(self, engine: Engine, record: Gauge = lambda _name, _value: None) -> None:
        self._engine = engine
        self.tokenizer = engine.tokenizer
        self.max_model_len = engine.max_model_len
        """Longest prompt and answer together, in tokens."""
        self.adapters = engine.adapters
        """Names that requests may give, and the tokens of the context that each takes."""
        self._record = record
        self._inbox: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._streams: dict[str, Stream] = {}
        self._failure: Exception | None = None
        self._log = make_logger("serving")
        self.stats = engine.stats()
        """The engine's numbers after its last step."""
        self._thread = Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def submit(
        self, prompt: str | Sequence[int], params: SamplingParams, *, priority: int = 0, adapter: str | None = None
    ) -> Stream:
        """Return once the engine has taken the request; see `Engine.add_request`.

        Raises:
            RequestError: it can never be served, or too many are waiting.
            EngineError: the engine has stopped.
        """
        stream = Stream(self)
        self._inbox.put(partial(self._admit, stream, prompt, params, priority, adapter))
        # The engine notes its failure before it empties the inbox, so a command put after that sees it here.
        self.check()
        try:
            await stream.taken()
        except asyncio.CancelledError:
            self.abort(stream.request_id)
            raise
        return stream

    def abort(self, request_id: str) -> None:
        """Forget a request; one that has ended already is no matter."""
        self._inbox.put(partial(self._drop, request_id))

    def check(self) -> None:
        """Raise EngineError if the engine has stopped."""
        if self._failure is not None:
            raise _stopped(self._failure)

    def stop(self) -> None:
        """End the thread and close the engine; requests that are under way get a EngineError."""
        self._inbox.put(None)
        self._thread.join()

    def _run(self) -> None:
        failure: Exception = EngineError("it was shut down")
        try:
            while self._obey():
                outputs = self._engine.step()
                self._record_stats()
                for output in outputs:
                    self._deliver(output)
        except Exception as error:  # a thread has no caller: the requests, check() and the log learn of it
            self._log.exception("the engine failed")
            failure = error
        self._failure = failure
        self._fail_all(_stopped(failure))
        self._engine.close()

    def _obey(self) -> bool:
        """Carry out what is asked, waiting for it while there is nothing to generate; False is the order to stop."""
        while not (self._inbox.empty() and self._engine.has_unfinished):
            command = self._inbox.get()
            if command is None:
                return False
            command()
            self._record_stats()
        return True

    def _admit(
        self, stream: Stream, prompt: str | Sequence[int], params: SamplingParams, priority: int, adapter: str | None
    ) -> None:
        try:
            self._engine.add_request(prompt, params, stream.request_id, priority, adapter)
        except RequestError as error:
            stream.push(error)
        else:
            self._streams[stream.request_id] = stream
            stream.push(None)

    def _drop(self, request_id: str) -> None:
        if self._streams.pop(request_id, None):
            self._engine.abort(request_id)

    def _deliver(self, output: Output) -> None:
        stream = self._streams.get(output.request_id)
        if stream is None:  # aborted
            return
        self._record_output(stream, output)
        if output.is_last:
            del self._streams[output.request_id]
        stream.push(output)

    def _fail_all(self, error: Exception) -> None:
        for stream in self._streams.values():
            stream.push(error)
        while not self._inbox.empty():
            command = self._inbox.get()
            if isinstance(command, partial) and command.func == self._admit:
                command.args[0].push(error)

    def _record_stats(self) -> None:
        self.stats = self._engine.stats()
        for source, name in _GAUGES.items():
            self._record(name, self.stats[source])
        for name in self.stats:
            if name.startswith("bubble_"):
                self._record(f"pipeline_{name}", self.stats[name])

    def _record_output(self, stream: Stream, output: Output) -> None:
        now_s = time.monotonic()
        if stream.last_token_s is None:
            self._record("prompt_tokens_total", output.num_prompt_tokens)
            self._record("time_to_first_token_seconds", now_s - stream.arrival_s)
        else:
            self._record("inter_token_latency_seconds", now_s - stream.last_token_s)
        self._record("generation_tokens_total", len(output.token_ids))
        stream.last_token_s = now_s
        if output.finish_reason is not None:
            self._record("request_success_total", 1)
            self._record("e2e_request_latency_seconds", now_s - stream.arrival_s)


class Stream:
    """The outputs of one request, in order, for one reader on the event loop on which it was made."""

    def __init__(self, engine_loop: EngineLoop) -> None:
        self.request_id = f"cmpl-{uuid.uuid4().hex}"
        self.arrival_s = time.monotonic()
        self.last_token_s: float | None = None
        self._engine_loop = engine_loop
        self._event_loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Output | Exception | None] = asyncio.Queue()
        self._has_ended = False

    def push(self, item: Output | Exception | None) -> None:
        """Hand over the next output, the error that ends the stream, or None for "taken"; from any thread."""
        with suppress(RuntimeError):  # the event loop is closed: the reader is gone, which must not harm the others
            self._event_loop.call_soon_threadsafe(self._queue.put_nowait, item)

    async def taken(self) -> None:
        if isinstance(item := await self._queue.get(), Exception):
            raise item

    async def outputs(self) -> AsyncIterator[Output]:
        """Yield what is there as soon as it is there.

        Raises:
            EngineError: the engine stopped before the end.
        """
        while not self._has_ended:
            item = await self._queue.get()
            assert item is not None, "a request is taken once"
            self._has_ended = isinstance(item, Exception) or item.is_last
            if isinstance(item, Exception):
                raise item
            yield item

    def close(self) -> None:
        """Abort the request unless its end was read: nobody waits for the rest."""
        if not self._has_ended:
            self._engine_loop.abort(self.request_id)


def _stopped(cause: Exception) -> EngineError:
    return EngineError(
        "the engine of this replica has stopped", got=cause, do="try again: another replica or its successor answers"
    )

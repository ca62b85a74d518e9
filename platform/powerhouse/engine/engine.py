"""Prompts in, tokens out: `step()` is schedule, run, sample, commit, and everything else hangs off it."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from powerhouse.engine.batch import BatchResult, make_batch, scored_places, will_sample
from powerhouse.engine.detokenizer import TextStream
from powerhouse.engine.kv_cache import BlockPool
from powerhouse.engine.logprobs import TokenLogprobs
from powerhouse.engine.request import FinishReason, Output, Request, SamplingParams
from powerhouse.engine.runner import LocalRunner, Runner
from powerhouse.engine.scheduler import Schedule, Scheduler
from powerhouse.engine.settings import EngineConfig
from powerhouse.engine.stage import Stage
from powerhouse.errors import ConfigError, ModelFormatError, QueueFullError, RequestError
from powerhouse.models.decoder import DecoderConfig
from powerhouse.models.hub import read_config
from powerhouse.tokenizer import Tokenizer

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class Completion:
    """A whole answer."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    num_prompt_tokens: int
    logprobs: tuple[TokenLogprobs, ...] | None = None
    """One for each token, if asked for."""
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    """One for each token of the prompt, if asked for; the first is None."""


class Engine:
    """Serves many requests at a time from one model. Not thread-safe: one thread adds, aborts and steps.

    Raises:
        ConfigError: max_model_len is beyond the model's context, or where dynamic rope scaling begins.
        ModelFormatError: the tokenizer has more tokens than the model.
    """

    def __init__(self, model_config: DecoderConfig, tokenizer: Tokenizer, config: EngineConfig, runner: Runner) -> None:
        context = model_config.max_position_embeddings
        if config.max_model_len and config.max_model_len > context:
            raise ConfigError(
                "max_model_len is beyond the model's context", got=config.max_model_len, allowed=f"1 to {context}"
            )
        if tokenizer.vocab_size > model_config.vocab_size:
            raise ModelFormatError(
                "the tokenizer has more tokens than the model", got=tokenizer.vocab_size, allowed=model_config.vocab_size
            )
        scaling, longest = model_config.rope_scaling, config.max_model_len or context
        if scaling and scaling.kind == "dynamic" and longest > (scaling.original_context or longest):
            raise ConfigError(
                "dynamic rope scaling turns all of a batch by its longest request",
                got=f"max_model_len={longest}",
                allowed=f"1 to {scaling.original_context}, where it changes nothing",
            )
        self.tokenizer = tokenizer
        self._end_of_text_id = tokenizer.end_of_text_id
        self._config = config
        self._runner = runner
        self.max_model_len = longest
        self._vocab_size = model_config.vocab_size
        self._pool = BlockPool(config.num_blocks, config.block_size)
        self._scheduler = Scheduler(self._pool, config.max_num_seqs, config.max_num_batched_tokens, runner.num_slots)
        self._requests: dict[str, Request] = {}
        self._in_flight: deque[Schedule] = deque()
        self._outputs: list[Output] = []
        self._num_added = 0

    @classmethod
    def from_directory(cls, path: Path | str, config: EngineConfig | None = None) -> Engine:
        """Load a model directory into this process.

        Raises:
            ModelFormatError: the directory is missing or damaged.
            ConfigError: several stages are asked for; they are processes, which a PipelineRunner drives.
        """
        config = config or EngineConfig()
        if config.num_stages > 1:
            raise ConfigError(
                "one process holds one stage",
                got=f"num_stages={config.num_stages}",
                do="start the stages and give Engine a PipelineRunner",
            )
        path = Path(path)
        tokenizer = Tokenizer.load(path)
        return cls(read_config(path), tokenizer, config, LocalRunner(Stage.load(path, config)))

    @property
    def has_unfinished(self) -> bool:
        """Whether there is anything left for `step`."""
        return bool(self._requests or self._in_flight or self._outputs)

    def add_request(self, prompt: Prompt, params: SamplingParams | None = None, request_id: str | None = None) -> str:
        """Queue a prompt, text or token ids, and return its id.

        Raises:
            RequestError: it can never be served, or its id is in use.
            QueueFullError: too many requests wait.
        """
        params = params or SamplingParams()
        self._num_added += 1
        request_id = request_id if request_id is not None else f"request-{self._num_added}"
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        self._refuse_what_cannot_be_served(request_id, ids, params)
        seed = secrets.randbits(64) if params.seed is None else params.seed
        request = Request(request_id, ids, params, seed, TextStream(self.tokenizer, params.stop))
        self._requests[request_id] = request
        self._scheduler.add(request)
        return request_id

    def abort(self, request_id: str) -> None:
        """End a request; the next step tells it. One that has ended already, or never was, is no error."""
        request = self._requests.get(request_id)
        if request is not None:
            self._finish(request, "abort")
            self._outputs.append(_output(request))

    def step(self) -> list[Output]:
        """Keep the runner's slots full, and commit the oldest batch once they are.

        Raises:
            EngineError: a stage is lost; the engine can only be closed.
        """
        scheduled = self._scheduler.schedule()
        if scheduled:
            self._in_flight.append(scheduled)
            self._runner.submit(make_batch(scheduled, self._config.block_size))
        if self._in_flight and (not scheduled or len(self._in_flight) == self._runner.num_slots):
            result = self._runner.collect()
            self._commit(self._in_flight.popleft(), result)
        outputs, self._outputs = self._outputs, []
        return outputs

    def generate(self, prompts: Iterable[Prompt], params: SamplingParams | None = None) -> Iterator[Completion]:
        """Answer every prompt, many at a time; the completions come in the order of the prompts.

        Raises:
            RequestError: a prompt can never be served; those before it that are not answered yet are aborted.
        """
        assert not self.has_unfinished, "generate() steps the engine itself: add no other requests beside it"
        waiting = iter(prompts)
        pieces: dict[str, list[Output]] = {}
        try:
            while pieces or self._feed(waiting, params, pieces):
                first = next(iter(pieces))
                while not (pieces[first] and pieces[first][-1].finish_reason):
                    for output in self.step():
                        pieces[output.request_id].append(output)
                    self._feed(waiting, params, pieces)
                yield _join(pieces.pop(first))
        finally:
            for request_id in pieces:
                self.abort(request_id)
            while self.has_unfinished:
                self.step()

    def stats(self) -> dict[str, float]:
        """Numbers for gauges, as of now; kv_cache_usage is the share of blocks held."""
        return {
            "num_running": len(self._scheduler.running),
            "num_waiting": len(self._scheduler.waiting),
            "num_in_flight": len(self._in_flight),
            "num_preemptions": self._scheduler.num_preemptions,
            "kv_cache_usage": 1 - self._pool.num_free / self._pool.num_blocks,
        }

    def close(self) -> None:
        self._runner.close()

    def _feed(self, waiting: Iterator[Prompt], params: SamplingParams | None, pieces: dict[str, list[Output]]) -> bool:
        """Queue prompts while there is room in the queue; whether there was one."""
        num_before = len(pieces)
        while self._has_room and (prompt := next(waiting, None)) is not None:
            pieces[self.add_request(prompt, params)] = []
        return len(pieces) > num_before

    @property
    def _has_room(self) -> bool:
        """A burst into an idle engine waits only for the next step: free seats count as room."""
        num_held = len(self._scheduler.running) + len(self._scheduler.waiting)
        return num_held < self._config.max_num_seqs + self._config.max_waiting_requests

    def _refuse_what_cannot_be_served(self, request_id: str, ids: Sequence[int], params: SamplingParams) -> None:
        if request_id in self._requests:
            raise RequestError("the request id is in use", got=request_id, do="choose another, or none")
        if not ids:
            raise RequestError("the prompt is empty", allowed="at least one token")
        if wrong := [item for item in ids if not (isinstance(item, int) and 0 <= item < self._vocab_size)]:
            raise RequestError("a token id is outside the vocabulary", got=wrong[0], allowed=f"0 to {self._vocab_size - 1}")
        got = f"{len(ids)} prompt tokens and max_tokens={params.max_tokens}"
        if len(ids) + params.max_tokens > self.max_model_len:
            raise RequestError(
                "prompt and answer are longer than the context", got=got, allowed=f"{self.max_model_len} together"
            )
        # The last token is given out, and never attended to.
        if self._pool.num_blocks_for(len(ids) + max(params.max_tokens, 1) - 1) > self._pool.num_blocks:
            capacity = self._pool.num_blocks * self._pool.block_size
            raise RequestError("the KV cache is too small for this request", got=got, allowed=f"{capacity + 1} together")
        if not self._has_room:
            seats, waiting = self._config.max_num_seqs, self._config.max_waiting_requests
            raise QueueFullError(
                "too many requests wait",
                got=f"{seats + waiting} under way",
                allowed=f"{waiting} waiting (max_waiting_requests) beside {seats} that compute (max_num_seqs)",
                do="try later",
            )

    def _commit(self, scheduled: Schedule, result: BatchResult) -> None:
        scored = iter(result.scored)
        tokens = iter(zip(result.token_ids, result.logprobs, strict=True))
        chosen = {}
        for request, num_tokens in scheduled.items():
            request.prompt_logprobs += islice(scored, len(scored_places(request, num_tokens)))
            if will_sample(request, num_tokens):
                chosen[request] = next(tokens)
        self._scheduler.land(scheduled)
        for request in scheduled:
            if request.finish_reason is None and request in chosen:
                self._append(request, *chosen[request])
            elif request.finish_reason is None and not request.num_missing:
                self._finish(request, "length")
                self._outputs.append(_output(request))

    def _append(self, request: Request, token_id: int, logprobs: TokenLogprobs | None) -> None:
        request.token_ids.append(token_id)
        text = request.text.push([token_id])
        if reason := self._reason_to_end(request, token_id):
            text += request.text.finish()
            self._finish(request, reason)
        self._outputs.append(_output(request, (token_id,), text, (logprobs,) if logprobs else None))

    def _reason_to_end(self, request: Request, token_id: int) -> FinishReason | None:
        is_end = token_id == self._end_of_text_id and not request.params.ignore_eos
        if is_end or request.text.is_stopped:
            return "stop"
        return "length" if request.num_output_tokens == request.params.max_tokens else None

    def _finish(self, request: Request, reason: FinishReason) -> None:
        self._scheduler.finish(request, reason)
        del self._requests[request.request_id]


def _output(
    request: Request, token_ids: tuple[int, ...] = (), text: str = "", logprobs: tuple[TokenLogprobs, ...] | None = None
) -> Output:
    num_new = request.num_output_tokens
    is_first = num_new == len(token_ids) and request.params.prompt_logprobs is not None
    prompt_logprobs = tuple(request.prompt_logprobs) if is_first else None
    return Output(
        request.request_id,
        token_ids,
        text,
        request.finish_reason,
        request.num_prompt_tokens,
        num_new,
        logprobs,
        prompt_logprobs,
    )


def _join(outputs: Sequence[Output]) -> Completion:
    last = outputs[-1]
    assert last.finish_reason is not None, f"{last.request_id} has not ended"
    token_ids = tuple(token_id for output in outputs for token_id in output.token_ids)
    logprobs = tuple(item for output in outputs for item in output.logprobs or ())
    return Completion(
        "".join(output.text for output in outputs),
        token_ids,
        last.finish_reason,
        last.num_prompt_tokens,
        logprobs if any(output.logprobs is not None for output in outputs) else None,
        outputs[0].prompt_logprobs,
    )

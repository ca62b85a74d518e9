"""Prompts in, tokens out: `step()` is schedule, run, sample, commit, and everything else hangs off it."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import count, islice
from pathlib import Path

from powerhouse.engine.adapters import AdapterTable, Chosen
from powerhouse.engine.batch import BatchResult, make_batch, scored_places, will_sample
from powerhouse.engine.completion import Completion
from powerhouse.engine.constraint import Constrainer
from powerhouse.engine.detokenizer import TextStream
from powerhouse.engine.kv_cache import BlockNames, BlockPool
from powerhouse.engine.logprobs import TokenLogprobs
from powerhouse.engine.params import SamplingParams
from powerhouse.engine.request import FinishReason, Output, Request
from powerhouse.engine.runner import LocalRunner, Runner
from powerhouse.engine.sampler import seed_of
from powerhouse.engine.scheduler import Schedule, Scheduler
from powerhouse.engine.settings import EngineConfig
from powerhouse.engine.speculation import Speculator, make_speculator
from powerhouse.engine.stage import Stage
from powerhouse.engine.submission import check_model, check_request
from powerhouse.errors import ConfigError, QueueFullError, RequestError
from powerhouse.models.decoder import DecoderConfig
from powerhouse.models.hub import read_config
from powerhouse.tokenizer import Tokenizer

Prompt = str | Sequence[int]


class Engine:
    """Serves many requests at a time from one model. Not thread-safe: one thread adds, aborts and steps.

    Raises:
        ConfigError: max_model_len is beyond the model's context, or where dynamic rope scaling begins.
        ModelFormatError: the tokenizer has more tokens than the model.
    """

    def __init__(
        self,
        model_config: DecoderConfig,
        tokenizer: Tokenizer,
        config: EngineConfig,
        runner: Runner,
        speculator: Speculator | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self._end_of_text_id = tokenizer.end_of_text_id
        self._config = config
        self._runner = runner
        self.max_model_len = check_model(model_config, tokenizer, config)
        self._vocab_size = model_config.vocab_size
        self._pool = BlockPool(config.num_blocks, config.block_size)
        self._scheduler = Scheduler(self._pool, config.max_num_seqs, config.max_num_batched_tokens, runner.num_slots)
        self._requests: dict[str, list[Request]] = {}
        """Answers that have not ended, by request."""
        self._in_flight: deque[Schedule] = deque()
        self._outputs: list[Output] = []
        self._num_added = 0
        self._arrivals = count()
        self._adapters = AdapterTable(config.adapters, model_config.vocab_size)
        self._speculator = speculator or make_speculator(model_config, tokenizer, config)
        self._plans_ahead = runner.tells_tokens and not self._speculator  # guesses are made of known text
        self._num_guessed = self._num_guessed_right = 0
        self._constrainer = Constrainer(tokenizer, model_config.vocab_size)

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
    def adapters(self) -> dict[str, int]:
        """Those that requests may name, and how many tokens of the context each takes before the prompt."""
        return self._adapters.num_soft_tokens

    @property
    def has_unfinished(self) -> bool:
        """Whether there is anything left for `step`."""
        return bool(self._requests or self._in_flight or self._outputs)

    def add_request(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        request_id: str | None = None,
        priority: int = 0,
        adapter: str | None = None,
    ) -> str:
        """Queue a prompt, text or token ids, and return its id; of all that wait, the smallest priority goes first.

        Raises:
            RequestError: it can never be served, its id is in use, or there is no such adapter.
            QueueFullError: too many requests wait.
        """
        params = params or SamplingParams()
        self._num_added += 1
        request_id = request_id if request_id is not None else f"request-{self._num_added}"
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        chosen = self._adapters.choose(adapter)
        self._refuse_what_cannot_be_served(request_id, ids, params, chosen)
        self._requests[request_id] = self._make_requests(request_id, ids, params, priority, chosen)
        for request in self._requests[request_id]:
            self._scheduler.add(request)
        return request_id

    def _make_requests(
        self, request_id: str, ids: list[int], params: SamplingParams, priority: int, chosen: Chosen
    ) -> list[Request]:
        seed = secrets.randbits(64) if params.seed is None else params.seed
        end_ids = frozenset(params.stop_token_ids) | (set() if params.ignore_eos else {self._end_of_text_id})
        requests: list[Request] = []
        for index in range(params.n):
            request = Request(
                request_id,
                [*chosen.soft_ids, *ids],
                params,
                seed_of(seed, index),
                TextStream(self.tokenizer, params.stop),
                index=index,
                rank=(priority, next(self._arrivals)),
                names=BlockNames(self._pool.block_size, str(chosen.index).encode()) if self._config.caches_prefixes else None,
                leader=requests[0] if requests and self._config.caches_prefixes else None,
                end_ids=end_ids,
                adapter=chosen.index,
                num_soft=len(chosen.soft_ids),
                matcher=self._constrainer.matcher(params.constraint) if params.constraint else None,
            )
            requests.append(request)
        return requests

    def abort(self, request_id: str) -> None:
        """End a request; the next step tells it. One that has ended already, or never was, is no error."""
        for request in list(self._requests.get(request_id, ())):
            self._finish(request, "abort")
            self._outputs.append(self._output(request))

    def step(self) -> list[Output]:
        """Keep the runner's slots full, and commit the oldest batch once they are.

        A pipeline has the batch after that one by then, and its stages tell each other the tokens which that one awaits: so
        they do not wait for what is done here.

        Raises:
            EngineError: a stage is lost; the engine can only be closed.
        """
        num_slots = self._runner.num_slots
        is_submitted = len(self._in_flight) < num_slots and self._submit()
        if not is_submitted and self._plans_ahead and self._in_flight:
            is_submitted = self._submit(after=self._in_flight[0])
        if self._in_flight and (not is_submitted or len(self._in_flight) == num_slots + self._plans_ahead):
            result = self._runner.collect()
            self._commit(self._in_flight.popleft(), result)
        outputs, self._outputs = self._outputs, []
        return outputs

    def _submit(self, after: Schedule | None = None) -> bool:
        """Schedule and submit a batch, if there is one; `after` is the oldest in flight, whose tokens it may await."""
        if self._speculator:
            self._speculator.plan(self._scheduler.running)
        choosing = [request for request, num in (after or {}).items() if will_sample(request, request.num_computed + num)]
        rows = {request: row for row, request in enumerate(choosing)}
        scheduled = self._scheduler.schedule(rows.keys())
        if scheduled:
            if self._speculator:
                self._speculator.fill(scheduled)
            batch = make_batch(scheduled, self._config.block_size, rows, len(self._in_flight))
            self._in_flight.append(scheduled)
            self._runner.submit(batch)
        return bool(scheduled)

    def generate(
        self, prompts: Iterable[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> Iterator[Completion]:
        """Answer every prompt, many at a time; the completions come in the order of the prompts, n for each.

        `params` are of all prompts, or one for each.

        Raises:
            RequestError: a prompt can never be served; those before it that are not answered yet are aborted. There are not as
                many params as prompts.
        """
        assert not self.has_unfinished, "generate() steps the engine itself: add no other requests beside it"
        waiting, num_answers = _pair(prompts, params)
        pieces: dict[str, list[Output]] = {}
        try:
            while pieces or self._feed(waiting, num_answers, pieces):
                first = next(iter(pieces))
                while not (pieces[first] and pieces[first][-1].is_last):
                    for output in self.step():
                        pieces[output.request_id].append(output)
                    self._feed(waiting, num_answers, pieces)
                yield from Completion.join_all(pieces.pop(first))
        finally:
            for request_id in pieces:
                self.abort(request_id)
            while self.has_unfinished:
                self.step()

    def stats(self) -> dict[str, float]:
        """Numbers for gauges, as of now.

        kv_cache_usage is the share of blocks held; prefix_cache_queries and _hits are tokens; bubble_N is the share of the
        time in which stage N waits for the others.
        """
        return {
            "num_running": len(self._scheduler.running),
            "num_waiting": len(self._scheduler.waiting),
            "num_in_flight": len(self._in_flight),
            "num_preemptions": self._scheduler.num_preemptions,
            "prefix_cache_queries": self._scheduler.num_looked_up,
            "prefix_cache_hits": self._scheduler.num_found,
            "num_guessed": self._num_guessed,
            "num_guessed_right": self._num_guessed_right,
            "kv_cache_usage": 1 - self._pool.num_free / self._pool.num_blocks,
            **{f"bubble_{stage}": share for stage, share in enumerate(self._runner.bubbles())},
        }

    def close(self) -> None:
        self._runner.close()

    def _feed(
        self, waiting: Iterator[tuple[Prompt, SamplingParams]], num_answers: int, pieces: dict[str, list[Output]]
    ) -> bool:
        """Queue prompts while there is room in the queue for so many answers; whether there was one."""
        num_before = len(pieces)
        while self._has_room(num_answers) and (pair := next(waiting, None)) is not None:
            pieces[self.add_request(*pair)] = []
        return len(pieces) > num_before

    @property
    def _num_under_way(self) -> int:
        return len(self._scheduler.running) + len(self._scheduler.waiting)

    def _has_room(self, num_answers: int) -> bool:
        """A burst into an idle engine waits only for the next step: free seats count as room."""
        return self._num_under_way + num_answers <= self._config.max_num_seqs + self._config.max_waiting_requests

    def _refuse_what_cannot_be_served(
        self, request_id: str, ids: Sequence[int], params: SamplingParams, chosen: Chosen
    ) -> None:
        if request_id in self._requests:
            raise RequestError("the request id is in use", got=request_id, do="choose another, or none")
        check_request(ids, params, self._vocab_size, self.max_model_len, self._pool, len(chosen.soft_ids))
        seats, waiting = self._config.max_num_seqs, self._config.max_waiting_requests
        if params.n > seats + waiting:
            raise RequestError("n is more than may be under way", got=params.n, allowed=f"1 to {seats + waiting}")
        if not self._has_room(params.n):
            raise QueueFullError(
                "too many requests wait",
                got=f"{self._num_under_way} under way",
                allowed=f"{waiting} waiting (max_waiting_requests) beside {seats} that compute (max_num_seqs)",
                do="try later",
            )

    def _commit(self, scheduled: Schedule, result: BatchResult) -> None:
        scored = iter(result.scored)
        tokens = iter(zip(result.token_ids, result.logprobs, strict=True))
        chosen = {}
        for request, num_tokens in scheduled.items():
            start, stop = request.num_computed, request.num_computed + num_tokens
            request.prompt_logprobs += islice(scored, len(scored_places(request, start, stop)))
            if will_sample(request, stop):
                chosen[request] = list(islice(tokens, len(request.draft) + 1))
        self._scheduler.land(scheduled)
        for request in scheduled:
            if request.finish_reason is None and request in chosen:
                self._extend(request, chosen[request])
            elif request.finish_reason is None and not request.num_missing and not request.is_in_flight:
                self._finish(request, "length")
                self._outputs.append(self._output(request))

    def _extend(self, request: Request, chosen: Sequence[tuple[int, TokenLogprobs | None]]) -> None:
        """Take the new token, and those after it while what was guessed before them is what was chosen."""
        guesses, request.draft = request.draft, []
        num_right = next((i for i, guess in enumerate(guesses) if guess != chosen[i][0]), len(guesses))
        text, taken = "", []
        for token_id, told in chosen[: num_right + 1]:
            taken.append((token_id, told))
            text += self._append(request, token_id)
            if request.finish_reason:
                break
        request.num_computed += len(taken) - 1
        self._num_guessed += len(guesses)
        self._num_guessed_right += num_right
        logprobs = tuple(told for _, told in taken if told)
        self._outputs.append(self._output(request, tuple(token_id for token_id, _ in taken), text, logprobs or None))

    def _append(self, request: Request, token_id: int) -> str:
        request.token_ids.append(token_id)
        may_stop = request.num_output_tokens >= request.params.min_tokens
        is_end = may_stop and token_id in request.end_ids
        text = "" if is_end else request.text.push([token_id], may_stop=may_stop)
        if request.matcher:
            request.matcher.take(token_id)
        if reason := _reason_to_end(request, is_end):
            text += request.text.finish()
            self._finish(request, reason)
        return text

    def _finish(self, request: Request, reason: FinishReason) -> None:
        self._scheduler.finish(request, reason)
        answers = self._requests[request.request_id]
        answers.remove(request)
        if not answers:
            del self._requests[request.request_id]

    def _output(
        self,
        request: Request,
        token_ids: tuple[int, ...] = (),
        text: str = "",
        logprobs: tuple[TokenLogprobs, ...] | None = None,
    ) -> Output:
        is_first = request.num_output_tokens == len(token_ids) and request.params.prompt_logprobs is not None
        return Output(
            request.request_id,
            token_ids,
            text,
            request.finish_reason,
            request.num_prompt_tokens - request.num_soft,
            request.num_output_tokens,
            logprobs,
            tuple(request.prompt_logprobs[request.num_soft :]) if is_first else None,
            request.index,
            request.request_id not in self._requests,
            max(request.num_cached - request.num_soft, 0),
        )


def _pair(
    prompts: Iterable[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
) -> tuple[Iterator[tuple[Prompt, SamplingParams]], int]:
    """Each prompt with its parameters, and the most answers that one of them asks for."""
    if params is None or isinstance(params, SamplingParams):
        shared = params or SamplingParams()
        return ((prompt, shared) for prompt in prompts), shared.n
    prompts = list(prompts)
    if len(prompts) != len(params):
        raise RequestError("params are of all prompts, or one for each", got=f"{len(params)} for {len(prompts)} prompts")
    return zip(prompts, params, strict=True), max((one.n for one in params), default=1)


def _reason_to_end(request: Request, is_end: bool) -> FinishReason | None:
    matcher = request.matcher
    if is_end or request.text.is_stopped or (matcher and matcher.is_complete):
        return "stop"
    if matcher and matcher.error:
        return "abort"
    return "length" if request.num_output_tokens == request.params.max_tokens else None

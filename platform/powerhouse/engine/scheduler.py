"""Which requests compute next, and how many tokens of each: continuous batching (Yu et al. 2022) with chunked prefill.

There are no phases: a schedule is `{request: num_tokens}`, where a prompt, a part of one, a decode and the recomputation
after a pre-emption are the same arithmetic. A request whose tokens are in flight is not scheduled again until they land,
so with several batches in flight (one per pipeline stage) the batches hold different requests.
"""

from __future__ import annotations

from collections import deque

from powerhouse.engine.kv_cache import BlockPool
from powerhouse.engine.request import FinishReason, Request

Schedule = dict[Request, int]


class Scheduler:
    """Oldest first: running requests, then waiting ones while blocks and the token budget last.

    A waiting request starts when there are blocks for all its tokens so far. When a running one needs a block and none is
    free, the youngest behind it gives up its blocks and waits at the front to be recomputed. So the oldest always goes on,
    and each request gets its turn.
    """

    def __init__(self, pool: BlockPool, max_num_seqs: int, max_num_batched_tokens: int, num_slots: int = 1) -> None:
        self.pool = pool
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.num_preemptions = 0
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._num_slots = num_slots

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def schedule(self) -> Schedule:
        """Choose the next batch; empty when all that could run is in flight. Its tokens count as in flight from now on."""
        num_preemptions = self.num_preemptions
        scheduled = self._schedule_running()
        if self.num_preemptions == num_preemptions:
            self._admit_waiting(scheduled)
        for request, num_tokens in scheduled.items():
            request.num_in_flight = num_tokens
        return scheduled

    def land(self, scheduled: Schedule) -> None:
        """Count the tokens of a batch that came back; blocks of what has ended meanwhile become free only now."""
        for request, num_tokens in scheduled.items():
            request.num_in_flight = 0
            request.num_computed += num_tokens
            if request.finish_reason:
                self._release(request)

    def finish(self, request: Request, reason: FinishReason) -> None:
        """End a waiting or running request."""
        assert request.finish_reason is None, f"{request.request_id} ended before: {request.finish_reason}"
        request.finish_reason = reason
        if request in self.running:
            self.running.remove(request)
        else:
            self.waiting.remove(request)
        if not request.is_in_flight:
            self._release(request)

    def _schedule_running(self) -> Schedule:
        scheduled: Schedule = {}
        budget = self._max_num_batched_tokens
        # Decodes are spread evenly over the batches in flight, prompts are not: a step's time is that of its prompts.
        num_decodes = -(-len(self.running) // self._num_slots)
        for request in list(self.running):
            num_tokens = min(request.num_missing, budget)
            is_decode = request.num_missing == 1
            if request.is_in_flight or request not in self.running or not num_tokens or (is_decode and not num_decodes):
                continue
            if self._make_room(request, request.num_computed + num_tokens, scheduled):
                scheduled[request] = num_tokens
                budget -= num_tokens
                num_decodes -= is_decode
        return scheduled

    def _admit_waiting(self, scheduled: Schedule) -> None:
        budget = self._max_num_batched_tokens - sum(scheduled.values())
        while self.waiting and budget and self._can_admit(self.waiting[0]):
            request = self.waiting.popleft()
            request.blocks = self.pool.allocate(self.pool.num_blocks_for(request.num_tokens))
            self.running.append(request)
            scheduled[request] = min(request.num_missing, budget)
            budget -= scheduled[request]

    def _can_admit(self, request: Request) -> bool:
        has_seat = len(self.running) < self._max_num_seqs
        return has_seat and self.pool.can_allocate(self.pool.num_blocks_for(request.num_tokens))

    def _make_room(self, request: Request, num_tokens: int, scheduled: Schedule) -> bool:
        """Give the request the blocks for that many tokens, by pre-empting younger ones if need be; False if in vain."""
        num_blocks = self.pool.num_blocks_for(num_tokens) - len(request.blocks)
        while not self.pool.can_allocate(num_blocks):
            victim = self._youngest_behind(request, scheduled)
            if victim is None:
                return False
            self._preempt(victim)
        request.blocks += self.pool.allocate(max(num_blocks, 0))
        return True

    def _youngest_behind(self, request: Request, scheduled: Schedule) -> Request | None:
        behind = self.running[self.running.index(request) + 1 :]
        return next((other for other in reversed(behind) if not other.is_in_flight and other not in scheduled), None)

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._release(request)
        request.num_computed = 0
        self.waiting.appendleft(request)
        self.num_preemptions += 1

    def _release(self, request: Request) -> None:
        self.pool.free(request.blocks)
        request.blocks = []

"""Which requests compute next, and how many tokens of each: continuous batching (Yu et al. 2022) with chunked prefill.

There are no phases: a schedule is `{request: num_tokens}`, where a prompt, a part of one, what the prefix cache lacks of one, a
decode and the recomputation after a pre-emption are the same arithmetic. Batches are computed in order, so the next chunk of a
prompt may follow while one is in flight. What decodes waits for its token, and with several batches in flight (one per pipeline
stage) these hold different requests; or it is planned ahead, before its token is known here.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Collection

from powerhouse.engine.kv_cache import BlockPool
from powerhouse.engine.request import FinishReason, Request

Schedule = dict[Request, int]


class Scheduler:
    """By priority, oldest first: running requests, then waiting ones while blocks and the token budget last.

    A waiting request starts when there are blocks for all its tokens so far, those in the prefix cache counted. When a running
    one needs a block and none is free, the last behind it gives up its blocks and waits in its old place to be recomputed. So
    the first always goes on, and among equals each gets its turn.
    """

    def __init__(self, pool: BlockPool, max_num_seqs: int, max_num_batched_tokens: int, num_slots: int = 1) -> None:
        self.pool = pool
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.num_preemptions = 0
        self.num_looked_up = 0
        """Tokens of requests that were looked up in the prefix cache."""
        self.num_found = 0
        """Tokens of these that were there."""
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = -(-max_num_batched_tokens // num_slots)
        self._num_slots = num_slots

    def add(self, request: Request) -> None:
        insort(self.waiting, request, key=_rank)

    def schedule(self, ahead: Collection[Request] = ()) -> Schedule:
        """Choose the next batch; empty when all that could run is in flight. Its tokens count as in flight from now on.

        Requests in `ahead` may decode although their last tokens are still being chosen.
        """
        num_preemptions = self.num_preemptions
        scheduled = self._schedule_running(ahead)
        if self.num_preemptions == num_preemptions:
            self._admit_waiting(scheduled)
        for request, num_tokens in scheduled.items():
            request.num_in_flight += num_tokens
        return scheduled

    def land(self, scheduled: Schedule) -> None:
        """Count the tokens of the oldest batch, which came back. What has ended gives up its blocks with its last batch."""
        for request, num_tokens in scheduled.items():
            request.num_in_flight -= num_tokens
            request.num_computed += num_tokens - len(request.draft)
            self._name_blocks(request)
            if request.finish_reason and not request.is_in_flight:
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

    def _schedule_running(self, ahead: Collection[Request]) -> Schedule:
        scheduled: Schedule = {}
        budget = self._max_num_batched_tokens
        # Decodes are spread evenly over the batches in flight, as the token budget is: unequal batches wait for each other.
        num_decodes = -(-len(self.running) // self._num_slots)
        num_spare = budget - len(self.running)
        for request in list(self.running):
            is_ahead = request in ahead and request.is_foreseeable
            if request not in self.running or not (request.num_missing > 0 or is_ahead):  # pre-empted meanwhile, or in flight
                continue
            self._cut_draft(request, min(num_spare, budget - 1))
            num_tokens = min(1 if is_ahead else request.num_to_compute, budget)
            is_decode = is_ahead or request.num_missing == 1
            if not num_tokens or (is_decode and not num_decodes):
                continue
            if self._make_room(request, request.num_planned + num_tokens, scheduled):
                scheduled[request] = num_tokens
                budget -= num_tokens
                num_spare -= len(request.draft)
                num_decodes -= is_decode
            else:  # what is in flight is nobody's room: let it land
                ahead = ()
        return scheduled

    def _cut_draft(self, request: Request, num_spare: int) -> None:
        """Guesses take no other request's turn and no other request's blocks."""
        if request.draft:
            num_blocks = self.pool.num_blocks_for(request.num_tokens + len(request.draft)) - len(request.blocks)
            has_room = self.pool.can_allocate(num_blocks)
            request.draft = request.draft[: max(num_spare, 0)] if has_room else []

    def _admit_waiting(self, scheduled: Schedule) -> None:
        budget = self._max_num_batched_tokens - sum(scheduled.values())
        for request in [request for request in self.waiting if not request.is_held_back]:
            if not budget or len(self.running) == self._max_num_seqs or not self._start(request):
                return
            scheduled[request] = min(request.num_missing, budget)
            budget -= scheduled[request]

    def _start(self, request: Request) -> bool:
        """Give the request blocks for all its tokens, with what the prefix cache has of them; False if there are too few."""
        names = request.reusable_names
        shared = self.pool.find(names)
        num_new = self.pool.num_blocks_for(request.num_tokens) - len(shared)
        if not self.pool.can_allocate(num_new, shared):
            return False
        self.waiting.remove(request)
        insort(self.running, request, key=_rank)
        request.blocks = self.pool.allocate(num_new, shared)
        request.num_computed = len(shared) * self.pool.block_size
        request.num_named = len(shared)
        if not request.num_output_tokens:
            request.num_cached = request.num_computed
        self.num_looked_up += request.num_tokens if names else 0
        self.num_found += request.num_computed
        return True

    def _make_room(self, request: Request, num_tokens: int, scheduled: Schedule) -> bool:
        """Give the request the blocks for that many tokens, by pre-empting those behind it if need be; False if in vain."""
        num_blocks = self.pool.num_blocks_for(num_tokens) - len(request.blocks)
        while not self.pool.can_allocate(num_blocks):
            victim = self._last_behind(request, scheduled)
            if victim is None:
                return False
            self._preempt(victim)
        request.blocks += self.pool.allocate(max(num_blocks, 0))
        return True

    def _last_behind(self, request: Request, scheduled: Schedule) -> Request | None:
        behind = self.running[self.running.index(request) + 1 :]
        return next((other for other in reversed(behind) if not other.is_in_flight and other not in scheduled), None)

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._release(request)
        request.num_computed = 0
        request.draft = []
        self.add(request)
        self.num_preemptions += 1

    def _name_blocks(self, request: Request) -> None:
        first = request.num_named
        if request.names and first < request.num_computed // self.pool.block_size:
            names = request.computed_names
            for block, name in zip(request.blocks[first : len(names)], names[first:], strict=True):
                self.pool.name(block, name)
            request.num_named = len(names)

    def _release(self, request: Request) -> None:
        self.pool.free(request.blocks)
        request.blocks = []


def _rank(request: Request) -> tuple[int, int]:
    return request.rank

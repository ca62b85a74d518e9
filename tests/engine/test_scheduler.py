from __future__ import annotations

from itertools import count

import pytest

from fakes import tiny_tokenizer
from powerhouse.engine import SamplingParams
from powerhouse.engine.detokenizer import TextStream
from powerhouse.engine.kv_cache import BlockPool
from powerhouse.engine.request import Request
from powerhouse.engine.scheduler import Schedule, Scheduler

TOKENIZER = tiny_tokenizer()
ARRIVALS = count()


def make_scheduler(num_blocks: int = 100, seqs: int = 8, tokens: int = 16, num_slots: int = 1) -> Scheduler:
    return Scheduler(BlockPool(num_blocks, block_size=4), seqs, tokens, num_slots)


def add(scheduler: Scheduler, name: str, num_tokens: int, priority: int = 0, params: SamplingParams | None = None) -> Request:
    rank = (priority, next(ARRIVALS))
    request = Request(name, [1] * num_tokens, params or SamplingParams(), 0, TextStream(TOKENIZER), rank=rank)
    scheduler.add(request)
    return request


def land(scheduler: Scheduler, scheduled: Schedule) -> None:
    """What the engine does with a batch that came back: a token for each request that has all its tokens computed."""
    scheduler.land(scheduled)
    for request in scheduled:
        if request.num_missing == 0 and not request.is_in_flight and not request.finish_reason:
            request.token_ids.append(1)


def run(scheduler: Scheduler) -> dict[str, int]:
    scheduled = scheduler.schedule()
    land(scheduler, scheduled)
    return names(scheduled)


def names(scheduled: Schedule) -> dict[str, int]:
    return {request.request_id: num_tokens for request, num_tokens in scheduled.items()}


def test_a_long_prompt_is_computed_in_chunks_beside_decodes() -> None:
    scheduler = make_scheduler(tokens=16)
    add(scheduler, "short", 3)
    add(scheduler, "long", 30)
    assert [run(scheduler) for _ in range(4)] == [
        {"short": 3, "long": 13},
        {"short": 1, "long": 15},
        {"short": 1, "long": 2},
        {"short": 1, "long": 1},
    ]


def test_no_more_requests_run_than_are_allowed() -> None:
    scheduler = make_scheduler(seqs=2)
    requests = [add(scheduler, name, 2) for name in "abc"]
    assert run(scheduler) == {"a": 2, "b": 2}
    scheduler.finish(requests[0], "stop")
    assert run(scheduler) == {"b": 1, "c": 2}


def test_a_request_waits_until_there_are_blocks_for_all_its_tokens() -> None:
    scheduler = make_scheduler(num_blocks=4)
    first = add(scheduler, "first", 8)
    add(scheduler, "second", 9)
    assert run(scheduler) == {"first": 8}
    assert run(scheduler) == {"first": 1}
    scheduler.finish(first, "stop")
    assert run(scheduler) == {"second": 9}


def test_the_youngest_gives_up_its_blocks_and_is_computed_again_later() -> None:
    scheduler = make_scheduler(num_blocks=4)
    old, young = add(scheduler, "old", 8), add(scheduler, "young", 8)
    assert run(scheduler) == {"old": 8, "young": 8}
    assert run(scheduler) == {"old": 1}, "the ninth token needs a third block"
    assert (scheduler.num_preemptions, young.num_computed, young.blocks) == (1, 0, [])
    assert list(scheduler.waiting) == [young]
    scheduler.finish(old, "stop")
    assert run(scheduler) == {"young": 9}, "the prompt and the token it had"


def test_what_is_in_flight_is_neither_scheduled_again_nor_preempted() -> None:
    scheduler = make_scheduler(num_blocks=4, num_slots=2)
    add(scheduler, "old", 8)
    land(scheduler, scheduler.schedule())
    add(scheduler, "young", 8)
    in_flight = scheduler.schedule()
    assert names(in_flight) == {"old": 1}, "two blocks are not free for the other"
    assert scheduler.schedule() == {}


def test_blocks_of_an_ended_request_stay_taken_while_it_is_in_flight() -> None:
    scheduler = make_scheduler(num_blocks=4)
    request = add(scheduler, "a", 16)
    in_flight = scheduler.schedule()
    scheduler.finish(request, "abort")
    add(scheduler, "b", 4)
    assert scheduler.pool.num_free == 0
    assert scheduler.schedule() == {}
    land(scheduler, in_flight)
    assert scheduler.pool.num_free == 4
    assert run(scheduler) == {"b": 4}


@pytest.mark.parametrize(("num_slots", "sizes"), [(1, [6, 0]), (2, [3, 3, 0]), (4, [2, 2, 2, 0])])
def test_decodes_are_spread_over_the_batches_in_flight(num_slots: int, sizes: list[int]) -> None:
    scheduler = make_scheduler(tokens=12 * num_slots, num_slots=num_slots)
    for name in "abcdef":
        add(scheduler, name, 2)
    assert len(run(scheduler)) == 6, "prompts are spread by their tokens alone"
    assert [len(scheduler.schedule()) for _ in sizes] == sizes


def test_the_batches_in_flight_share_the_token_budget_and_chunks_of_a_prompt_follow_each_other() -> None:
    scheduler = make_scheduler(tokens=23, num_slots=3)
    long = add(scheduler, "long", 17)
    add(scheduler, "short", 3)
    in_flight = [scheduler.schedule() for _ in range(4)]
    assert [names(batch) for batch in in_flight] == [{"long": 8}, {"long": 8}, {"long": 1, "short": 3}, {}]
    land(scheduler, in_flight[0])
    assert (long.num_computed, long.num_in_flight, long.num_missing) == (8, 9, 0)


def test_what_decodes_is_planned_ahead_only_where_its_next_token_is_all_that_is_missing() -> None:
    penal = {"repetition_penalty": 1.1}
    made = {name: SamplingParams(**more) for name, more in {"free": {}, "penalised": penal, "last": {"max_tokens": 1}}.items()}
    scheduler = make_scheduler(tokens=32, num_slots=2)
    requests = [add(scheduler, name, 3, params=params) for name, params in made.items()]
    scheduler.schedule()
    assert names(scheduler.schedule(ahead=requests)) == {"free": 1}
    assert names(scheduler.schedule(ahead=requests)) == {}, "one token at a time"


def test_blocks_of_what_was_planned_ahead_stay_taken_until_its_last_batch_lands() -> None:
    scheduler = make_scheduler(num_blocks=4, num_slots=2)
    request = add(scheduler, "a", 8)
    first = scheduler.schedule()
    ahead = scheduler.schedule(ahead=[request])
    scheduler.finish(request, "abort")
    land(scheduler, first)
    assert scheduler.pool.num_free == 1
    land(scheduler, ahead)
    assert scheduler.pool.num_free == 4


def test_nothing_is_planned_ahead_behind_a_request_that_lacks_room() -> None:
    """It would be in flight each time that its blocks are asked for."""
    scheduler = make_scheduler(num_blocks=5, tokens=32, num_slots=2)
    add(scheduler, "old", 8)
    first = scheduler.schedule()
    young = add(scheduler, "young", 9)
    scheduler.schedule()
    land(scheduler, first)
    assert young.is_foreseeable
    assert scheduler.schedule(ahead=[young]) == {}


def test_a_request_ends_once() -> None:
    scheduler = make_scheduler()
    request = add(scheduler, "a", 2)
    scheduler.finish(request, "abort")
    with pytest.raises(AssertionError, match="a ended before: abort"):
        scheduler.finish(request, "stop")

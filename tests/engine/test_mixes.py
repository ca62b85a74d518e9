"""Random mixes of requests on random engines: nothing that is computed together, in parts, again or not at all changes an
answer, ends it twice or keeps a block.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from answering import Aborts, Requests, check_all, check_found, run
from fakes import tiny_decoder
from powerhouse.engine import Engine, SamplingParams
from powerhouse.errors import QueueFullError

MakeEngine = Callable[..., Engine]

Settings: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {
        "num_slots": st.integers(1, 4),
        "block_size": st.sampled_from([1, 3, 8]),
        "num_blocks": st.sampled_from([32, 40, 100]),
        "max_num_seqs": st.integers(1, 6),
        "max_num_batched_tokens": st.sampled_from([6, 9, 64]),
        "caches_prefixes": st.booleans(),
        "speculation": st.sampled_from([None, {"num_tokens": 3, "ngram": 1}]),
    }
)


@settings(max_examples=4)
@given(Requests, Settings, Aborts)
def test_any_mix_on_any_engine_gives_what_each_request_gives_alone(
    make_engine: MakeEngine,
    requests: list[tuple[list[int], SamplingParams]],
    engine_settings: dict[str, Any],
    aborts: dict[int, int],
) -> None:
    check_mix(make_engine, requests, engine_settings, aborts)


@pytest.mark.slow
@settings(max_examples=12)
@given(Requests, Settings, Aborts)
def test_any_of_many_mixes_on_any_engine_gives_what_each_request_gives_alone(
    make_engine: MakeEngine,
    requests: list[tuple[list[int], SamplingParams]],
    engine_settings: dict[str, Any],
    aborts: dict[int, int],
) -> None:
    check_mix(make_engine, requests, engine_settings, aborts)


def check_mix(
    make_engine: MakeEngine,
    requests: list[tuple[list[int], SamplingParams]],
    engine_settings: dict[str, Any],
    aborts: dict[int, int],
) -> None:
    """Whatever is chunked, pre-empted, in flight, taken from the prefix cache or aborted beside it; and on a second run, when
    the cache is full of the first one.
    """
    engine = make_engine(**engine_settings)
    together = run(engine, requests, aborts)
    check_all(together, make_engine(caches_prefixes=False), requests, aborts)
    for name, again in run(engine, requests).items():
        if int(name[0]) not in aborts:
            check_found(again, together[name])


@pytest.mark.slow
def test_two_thousand_requests_with_random_aborts_on_a_tiny_cache_each_end_once(
    make_engine: MakeEngine,
) -> None:
    """A soak: lengths, parameters and moments of arrival and abort are random; nothing hangs, leaks or ends twice. One layer
    is enough for it: what more of them compute is held to account above.
    """
    rng = random.Random(0)
    engine = make_engine(
        decoder=tiny_decoder(num_hidden_layers=1),
        block_size=4, num_blocks=30, max_num_seqs=24, max_num_batched_tokens=40, max_waiting_requests=16, num_slots=2,
        speculation={"ngram": 1},
    )  # fmt: skip
    num_added = num_refused = 0
    ends: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    open_requests: list[str] = []
    while num_added < 2000 or engine.has_unfinished:
        for _ in range(rng.randrange(9) if num_added < 2000 else 0):
            length = rng.choice([1, 2, 3, 5, 8, 13, 21])
            params = SamplingParams(max_tokens=rng.randrange(1, 12), seed=num_added, top_k=5, ignore_eos=rng.random() < 0.9)
            try:
                prompt = [rng.randrange(4) for _ in range(length)]
                open_requests.append(engine.add_request(prompt, params, str(num_added), priority=rng.randrange(3)))
                num_added += 1
            except QueueFullError:
                num_refused += 1
        if open_requests and rng.random() < 0.3:
            engine.abort(rng.choice(open_requests))
        for output in engine.step():
            if output.finish_reason:
                ends[output.request_id] += 1
                reasons[output.finish_reason] += 1
                open_requests.remove(output.request_id)
    assert ends == Counter({str(i): 1 for i in range(num_added)})
    assert min(reasons["abort"], reasons["stop"], reasons["length"], num_refused) > 0
    stats = engine.stats()
    assert min(stats["num_preemptions"], stats["prefix_cache_hits"], stats["num_guessed_right"]) > 0
    assert [stats[name] for name in ("kv_cache_usage", "num_running", "num_waiting", "num_in_flight")] == [0, 0, 0, 0]

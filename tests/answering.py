"""Requests put to an engine together, and what became of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import strategies as st

from powerhouse.engine import Completion, Engine, Output, SamplingParams

Texts = dict[str, Completion]

Params = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 9),
    temperature=st.sampled_from([0.0, 0.8, 1.5]),
    top_k=st.none() | st.integers(1, 300),
    top_p=st.sampled_from([0.5, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.1]),
    seed=st.integers(0, 3),
    n=st.sampled_from([1, 1, 3]),
    repetition_penalty=st.sampled_from([1.0, 1.2]),
    presence_penalty=st.sampled_from([0.0, 0.5]),
    frequency_penalty=st.sampled_from([0.0, -0.3]),
    logit_bias=st.sampled_from([{}, {3: 2.0, 8: -100.0}]),
    stop_token_ids=st.sampled_from([(), (7, 40, 41, 42)]),
    stop=st.sampled_from([(), ("a",), ("e", "th")]),
    ignore_eos=st.booleans(),
    prompt_logprobs=st.sampled_from([None, None, 0]),
    prompt_logprobs_from=st.sampled_from([0, 1]),
)
Tails = st.lists(st.integers(0, 299), min_size=1, max_size=14)
Prompts = st.builds(
    lambda length, tail: [*range(50, 50 + length), *tail], st.sampled_from([0, 3, 9]), Tails
)  # many begin alike
Requests = st.lists(st.tuples(Prompts, Params), min_size=1, max_size=8)
Aborts = st.dictionaries(st.integers(0, 7), st.integers(0, 20), max_size=4)


def run(
    engine: Engine, requests: Sequence[tuple[Sequence[int], SamplingParams]], aborts: dict[int, int] | None = None
) -> Texts:
    """All requests at once, request i aborted before step aborts[i]; each has ended exactly once and no block is held."""
    pieces: dict[str, list[Output]] = {}
    for i, (prompt, params) in enumerate(requests):
        pieces[engine.add_request(prompt, params, str(i))] = []
    step = 0
    while engine.has_unfinished:
        for i in [i for i, at in (aborts or {}).items() if at == step]:
            engine.abort(str(i))
        for output in engine.step():
            pieces[output.request_id].append(output)
        step += 1
        assert step < 10_000, "the engine goes on for ever"
    assert engine.stats()["kv_cache_usage"] == engine.stats()["num_running"] == engine.stats()["num_waiting"] == 0
    assert sum(output.is_last for outputs in pieces.values() for output in outputs) == len(requests)
    return {
        f"{name}/{index}" if index else name: join([output for output in outputs if output.index == index])
        for name, outputs in pieces.items()
        for index in {output.index for output in outputs}
    }


def join(outputs: list[Output]) -> Completion:
    ends = [output.finish_reason for output in outputs if output.finish_reason]
    assert len(ends) == 1, f"ended {len(ends)} times"
    assert outputs[-1].finish_reason == ends[0], "nothing comes after the end"
    token_ids = tuple(token for output in outputs for token in output.token_ids)
    assert outputs[-1].num_output_tokens == len(token_ids)
    text, first, last = "".join(output.text for output in outputs), outputs[0], outputs[-1]
    return Completion(
        text, token_ids, ends[0], last.num_prompt_tokens, prompt_logprobs=first.prompt_logprobs, index=first.index
    )


def check_all(
    together: Texts, plain: Engine, requests: Sequence[tuple[list[int], SamplingParams]], aborts: dict[int, int]
) -> None:
    """What came out of a mix is what each request gives alone on the plain engine, up to where it was aborted."""
    for i, (prompt, params) in enumerate(requests):
        for alone in plain.generate([prompt], params):
            check_found(together[f"{i}/{alone.index}" if alone.index else str(i)], alone, i in aborts)


def check_found(found: Completion, alone: Completion, may_be_aborted: bool = False) -> None:
    if found.finish_reason != "abort":
        assert replace(found, prompt_logprobs=None) == replace(alone, prompt_logprobs=None)
        assert logprobs_of(found) == pytest.approx(logprobs_of(alone), abs=1e-5)
        return
    assert may_be_aborted
    assert alone.token_ids[: len(found.token_ids)] == found.token_ids
    assert alone.text.startswith(found.text)


def logprobs_of(found: Completion) -> list[float]:
    return [told.logprob if told else 1 for told in found.prompt_logprobs or ()]

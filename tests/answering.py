"""Requests put to an engine together, and what became of each."""

from __future__ import annotations

from collections.abc import Sequence

from powerhouse.engine import Completion, Engine, Output, SamplingParams

Texts = dict[str, Completion]


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

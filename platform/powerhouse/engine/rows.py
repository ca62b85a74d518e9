"""What the choice of a request's next token depends on besides the logits: its parameters, and its text so far where these
look at it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from powerhouse.engine.request import Request
from powerhouse.engine.sampler import Penalties, RowSampling, draw_uniform

_NEVER = float("-inf")


def row_sampling(request: Request, guesses: Sequence[int] = (), num_unknown: int = 0) -> RowSampling:
    """Of the token after the request's text, these guesses and so many tokens that are not known yet."""
    params = request.params
    num_output_tokens = request.num_output_tokens + len(guesses) + num_unknown
    return RowSampling(
        float(params.temperature),
        params.top_k,
        float(params.top_p),
        draw_uniform(request.seed, num_output_tokens),
        params.logprobs,
        float(params.min_p),
        _bias(request, num_output_tokens),
        _penalties(request, guesses),
        request.matcher.mask() if request.matcher else None,
    )


def _bias(request: Request, num_output_tokens: int) -> tuple[tuple[int, float], ...]:
    params = request.params
    bias: dict[int, float] = dict(params.logit_bias)
    if num_output_tokens < params.min_tokens:
        bias.update(dict.fromkeys(request.end_ids, _NEVER))
    return tuple(bias.items())


def _penalties(request: Request, guesses: Sequence[int]) -> Penalties | None:
    params = request.params
    repetition, presence, frequency = params.repetition_penalty, params.presence_penalty, params.frequency_penalty
    if not params.has_penalties:
        return None
    seen = tuple({*request.token_ids[request.num_soft :], *guesses}) if repetition != 1 else ()
    written = Counter([*request.token_ids[request.num_prompt_tokens :], *guesses]) if presence or frequency else Counter[int]()
    return Penalties(float(repetition), float(presence), float(frequency), seen, tuple(written.items()))

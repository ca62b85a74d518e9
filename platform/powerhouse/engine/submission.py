"""What is refused when it is submitted, because it could never be served."""

from __future__ import annotations

from collections.abc import Sequence

from powerhouse.engine.kv_cache import BlockPool
from powerhouse.engine.params import SamplingParams
from powerhouse.errors import RequestError


def check_request(ids: Sequence[int], params: SamplingParams, vocab_size: int, max_model_len: int, pool: BlockPool) -> None:
    """Refuse a prompt that can never be served with these parameters.

    Raises:
        RequestError: with the reason.
    """
    if not ids:
        raise RequestError("the prompt is empty", allowed="at least one token")
    named = {
        "a token id": ids,
        "logit_bias: a token id": params.logit_bias,
        "stop_token_ids: a token id": params.stop_token_ids,
    }
    for what, token_ids in named.items():
        if wrong := [item for item in token_ids if not (isinstance(item, int) and 0 <= item < vocab_size)]:
            raise RequestError(f"{what} is outside the vocabulary", got=wrong[0], allowed=f"0 to {vocab_size - 1}")
    got = f"{len(ids)} prompt tokens and max_tokens={params.max_tokens}"
    if len(ids) + params.max_tokens > max_model_len:
        raise RequestError("prompt and answer are longer than the context", got=got, allowed=f"{max_model_len} together")
    # The last token is given out, and never attended to.
    if pool.num_blocks_for(len(ids) + max(params.max_tokens, 1) - 1) > pool.num_blocks:
        capacity = pool.num_blocks * pool.block_size
        raise RequestError("the KV cache is too small for this request", got=got, allowed=f"{capacity + 1} together")

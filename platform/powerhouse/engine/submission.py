"""What is refused at once, because it could never be served: models, and requests."""

from __future__ import annotations

from collections.abc import Sequence

from powerhouse.engine.kv_cache import BlockPool
from powerhouse.engine.params import SamplingParams
from powerhouse.engine.settings import EngineConfig
from powerhouse.errors import ConfigError, ModelFormatError, RequestError
from powerhouse.models.decoder import DecoderConfig
from powerhouse.tokenizer import Tokenizer


def check_model(model_config: DecoderConfig, tokenizer: Tokenizer, config: EngineConfig) -> int:
    """Give the longest prompt and answer together that the engine will take, in tokens.

    Raises:
        ConfigError: max_model_len is beyond the model's context, or where dynamic rope scaling begins.
        ModelFormatError: the tokenizer has more tokens than the model.
    """
    context = model_config.max_position_embeddings
    if config.max_model_len and config.max_model_len > context:
        raise ConfigError("max_model_len is beyond the model's context", got=config.max_model_len, allowed=f"1 to {context}")
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
    return longest


def check_request(
    ids: Sequence[int], params: SamplingParams, vocab_size: int, max_model_len: int, pool: BlockPool, num_soft: int = 0
) -> None:
    """Refuse a prompt that can never be served with these parameters.

    Raises:
        RequestError: with the reason.
    """
    if not ids:
        raise RequestError("the prompt is empty", allowed="at least one token")
    if params.prompt_logprobs_from > len(ids):
        allowed = f"0 to {len(ids)}"
        raise RequestError("prompt_logprobs_from is beyond the prompt", got=params.prompt_logprobs_from, allowed=allowed)
    named = {
        "a token id": ids,
        "logit_bias: a token id": params.logit_bias,
        "stop_token_ids: a token id": params.stop_token_ids,
    }
    for what, token_ids in named.items():
        if wrong := [item for item in token_ids if not (isinstance(item, int) and 0 <= item < vocab_size)]:
            raise RequestError(f"{what} is outside the vocabulary", got=wrong[0], allowed=f"0 to {vocab_size - 1}")
    num_prompt_tokens = num_soft + len(ids)
    got = f"{num_prompt_tokens} prompt tokens and max_tokens={params.max_tokens}"
    if num_prompt_tokens + params.max_tokens > max_model_len:
        raise RequestError("prompt and answer are longer than the context", got=got, allowed=f"{max_model_len} together")
    # The last token is given out, and never attended to.
    if pool.num_blocks_for(num_prompt_tokens + max(params.max_tokens, 1) - 1) > pool.num_blocks:
        capacity = pool.num_blocks * pool.block_size
        raise RequestError("the KV cache is too small for this request", got=got, allowed=f"{capacity + 1} together")

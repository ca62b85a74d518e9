"""A whole answer, put together from the outputs of the steps that wrote it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from powerhouse.engine.logprobs import TokenLogprobs
from powerhouse.engine.request import FinishReason, Output


@dataclass(frozen=True)
class Completion:
    """One answer to a prompt."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    num_prompt_tokens: int
    logprobs: tuple[TokenLogprobs, ...] | None = None
    """One for each token, if asked for."""
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    """One for each token of the prompt, if asked for; the first is None."""
    index: int = 0
    """Which of the n answers to the prompt."""

    @classmethod
    def join(cls, outputs: Sequence[Output]) -> Completion:
        """Put together the outputs of one answer."""
        first, last = outputs[0], outputs[-1]
        assert last.finish_reason is not None, f"{last.request_id} has not ended"
        has_logprobs = any(output.logprobs is not None for output in outputs)
        return cls(
            "".join(output.text for output in outputs),
            tuple(token_id for output in outputs for token_id in output.token_ids),
            last.finish_reason,
            last.num_prompt_tokens,
            tuple(item for output in outputs for item in output.logprobs or ()) if has_logprobs else None,
            first.prompt_logprobs,
            last.index,
        )

    @classmethod
    def join_all(cls, outputs: Sequence[Output]) -> list[Completion]:
        """Put together the outputs of all answers to one prompt."""
        indices = sorted({output.index for output in outputs})
        return [cls.join([output for output in outputs if output.index == index]) for index in indices]

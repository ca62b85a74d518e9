"""The engine for who has all questions at hand: many rows of token ids scored or continued at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from powerhouse.engine.completion import Completion
from powerhouse.engine.engine import Engine
from powerhouse.engine.params import SamplingParams
from powerhouse.engine.settings import EngineConfig
from powerhouse.models.hub import read_config
from powerhouse.tokenizer import Tokenizer

Ids = list[int]


class OfflineModel:
    """A model directory in an engine of its own.

    Raises:
        ModelFormatError: the directory is missing or damaged.
    """

    def __init__(self, path: Path, config: EngineConfig) -> None:
        self._engine = Engine.from_directory(path, config)
        self.tokenizer = Tokenizer.load(path)
        self.max_length = config.max_model_len or read_config(path).max_position_embeddings

    def score(self, rows: Sequence[Ids], starts: Sequence[int]) -> list[list[tuple[float, bool]]]:
        """Of each row, for every token from its start on: its logprob after all before it, and whether it is the likeliest.

        Raises:
            RequestError: a row is empty, or too long for the context or the cache.
        """
        params = [SamplingParams(max_tokens=0, prompt_logprobs=1, prompt_logprobs_from=start) for start in starts]
        done = self._engine.generate(rows, params)
        return [_scores(completion) for completion in done]

    def write(self, rows: Sequence[Ids], *, max_tokens: int, temperature: float, stop: tuple[str, ...], seed: int) -> list[str]:
        """Continue each row; the text ends before a stop string or the end-of-text token.

        Raises:
            RequestError: a value is out of range, or a row cannot be served.
        """
        params = SamplingParams(max_tokens=max_tokens, temperature=temperature, stop=stop, seed=seed)
        return [completion.text for completion in self._engine.generate(rows, params)]


def _scores(completion: Completion) -> list[tuple[float, bool]]:
    assert completion.prompt_logprobs is not None, "they were asked for"
    return [(token.logprob, token.logprob == token.top[0][1]) for token in completion.prompt_logprobs if token is not None]

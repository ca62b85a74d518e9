"""An engine over the tiny decoder, and the plainest way to generate as its yardstick."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from fakes import tiny_decoder, tiny_tokenizer
from powerhouse.engine import Engine, EngineConfig, LocalRunner
from powerhouse.engine.batch import BatchResult
from powerhouse.engine.stage import Stage
from powerhouse.models.decoder import Decoder
from powerhouse.models.generate import GenerationConfig, generate
from powerhouse.tokenizer import Tokenizer

MakeEngine = Callable[..., Engine]


class SlottedRunner(LocalRunner):
    """As many batches in flight as a pipeline would have, computed here when they are collected."""

    def __init__(self, stage: Stage, num_slots: int) -> None:
        super().__init__(stage)
        self.num_slots = num_slots
        self.tells_tokens = num_slots > 1
        self._chosen: list[list[int]] = []

    def collect(self) -> BatchResult:
        batch = self._submitted.popleft()
        if batch.awaited:
            batch = batch.told(self._chosen[-batch.num_back])
        result = self._stage.sample(batch, self._stage.forward(batch))
        self._chosen.append(result.token_ids)
        return result


@pytest.fixture(scope="session")
def decoder() -> Decoder:
    return tiny_decoder()


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def make_engine(decoder: Decoder, tokenizer: Tokenizer) -> MakeEngine:
    def make(num_slots: int = 1, decoder: Decoder = decoder, **settings: object) -> Engine:
        config = EngineConfig.model_validate(settings)
        return Engine(decoder.config, tokenizer, config, SlottedRunner(Stage(decoder, config), num_slots))

    return make


@pytest.fixture(scope="session")
def greedy_dense(decoder: Decoder) -> Callable[[Sequence[int], int], tuple[int, ...]]:
    """Likeliest tokens by a loop over the whole row with a dense cache: no pages, no batch."""
    return lambda prompt, num_tokens: tuple(generate(decoder, [prompt], GenerationConfig(max_tokens=num_tokens), [])[0])

"""The plain loop that continues prompts: greedy, sampled, or by beam search. The yardstick for the engine.

Shapes: B rows, T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from pydantic import Field
from torch import Tensor

from powerhouse.config import Config
from powerhouse.errors import RequestError
from powerhouse.models.adapters import soft_prompt_of
from powerhouse.models.attention import DenseCache
from powerhouse.models.classic import Classic
from powerhouse.models.decoder import Decoder
from powerhouse.models.encoder_decoder import T5, EncoderDecoder

Generator = Decoder | T5 | Classic


class GenerationConfig(Config):
    """How a continuation is chosen."""

    max_tokens: int = Field(default=64, gt=0)
    """Longest continuation."""
    temperature: float = Field(default=0.0, ge=0)
    """0 takes the likeliest token, 1 samples from the model's distribution."""
    top_k: int | None = Field(default=None, gt=0)
    """Sample from that many likeliest tokens only."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the smallest set of likeliest tokens that has this probability (Holtzman et al. 2020)."""
    num_beams: int = Field(default=1, gt=0)
    """Beams of a beam search; 1 is none."""
    length_penalty: float = 1.0
    """A beam's log-probability is divided by length ** length_penalty (Wu et al. 2016, simplified as in transformers)."""
    seed: int = Field(default=0, ge=0)
    """Of the sampling; a row's text does not depend on the other rows."""


@torch.inference_mode()
def generate(
    model: Generator, prompts: Sequence[Sequence[int]], config: GenerationConfig, stop_ids: Collection[int]
) -> list[list[int]]:
    """Continue each prompt, or, with an encoder-decoder, answer it; the stop token is left out.

    Raises:
        RequestError: a prompt is empty, has ids outside the vocabulary, or is too long for the model; beams that sample.
    """
    _check(model, prompts, config)
    if config.num_beams > 1:
        return [_search(model, prompt, config, stop_ids) for prompt in prompts]
    run, rows = _Run(model, prompts), [[] for _ in prompts]  # type: tuple[_Run, list[list[int]]]
    generators = [torch.Generator().manual_seed(config.seed) for _ in prompts]
    open_rows = set(range(len(prompts)))
    logits_BV = run.start()
    for _ in range(config.max_tokens):
        ids = [choose(logits, config, generator) for logits, generator in zip(logits_BV, generators, strict=True)]
        open_rows -= {row for row in open_rows if ids[row] in stop_ids}
        for row in open_rows:
            rows[row].append(ids[row])
        if not open_rows:
            break
        logits_BV = run.step(ids)
    return rows


def choose(logits_V: Tensor, config: GenerationConfig, generator: torch.Generator) -> int:
    """One token from one row's logits."""
    if config.temperature == 0:
        return int(logits_V.argmax())
    logits_V, order_V = (logits_V.cpu() / config.temperature).sort(descending=True, stable=True)
    probabilities = logits_V[: config.top_k].softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities  # a token stays while those before it have less than top_p
    probabilities = probabilities.masked_fill(before >= config.top_p, 0.0)
    return int(order_V[torch.multinomial(probabilities, 1, generator=generator)])


class _Run:
    """One batch under way, with its cache: gives the logits of every row's next position."""

    def __init__(self, model: Generator, prompts: Sequence[Sequence[int]]) -> None:
        self._model = model
        self._device = next(model.parameters()).device
        self._memory = None
        prompts = [[*soft_prompt_of(model), *prompt] for prompt in prompts]
        if isinstance(model, EncoderDecoder) and model.takes_source:
            self._memory = model.remember(*self._pad(prompts, is_left=False))
            prompts = [[model.config.start_token_id]] * len(prompts)
        self._ids_BT, valid_BT = self._pad(prompts, is_left=True)
        self.cache = DenseCache(valid_BT)
        self._positions_BT = (valid_BT.long().cumsum(dim=1) - 1).clamp(min=0)

    def _pad(self, rows: Sequence[Sequence[int]], *, is_left: bool) -> tuple[Tensor, Tensor]:
        """Ids, 0 at padding, and which are valid."""
        length = max(len(row) for row in rows)
        fill = [[0] * (length - len(row)) for row in rows]
        ids = [[*pad, *row] if is_left else [*row, *pad] for pad, row in zip(fill, rows, strict=True)]
        num_valid = torch.tensor([[len(row)] for row in rows], device=self._device)
        valid_BT = torch.arange(length, device=self._device) < num_valid
        return torch.tensor(ids, device=self._device), valid_BT.flip(1) if is_left else valid_BT

    def start(self) -> Tensor:
        return self._forward(self._ids_BT, self._positions_BT)

    def step(self, ids: Sequence[int]) -> Tensor:
        self._positions_BT = self._positions_BT[:, -1:] + 1
        return self._forward(torch.tensor(ids, device=self._device)[:, None], self._positions_BT)

    def _forward(self, ids_BT: Tensor, positions_BT: Tensor) -> Tensor:
        is_decoder = isinstance(self._model, Decoder)
        inputs = (ids_BT, positions_BT) if is_decoder else (ids_BT, positions_BT, self._memory)
        logits_BTV: Tensor = self._model(*inputs, self.cache)
        return logits_BTV[:, -1]


def _search(model: Generator, prompt: Sequence[int], config: GenerationConfig, stop_ids: Collection[int]) -> list[int]:
    """Beam search over one prompt, with the stopping rule that is transformers' default (`early_stopping=False`).

    So many candidates are looked at that enough of them go on whatever stops; only one of the best `num_beams` may finish.
    """
    num_beams = config.num_beams
    run = _Run(model, [prompt] * num_beams)
    beams: list[list[int]] = [[] for _ in range(num_beams)]
    scores_B = torch.full((num_beams,), float("-inf"))
    scores_B[0] = 0.0  # the beams are one at first
    finished: list[tuple[float, list[int]]] = []
    logits_BV = run.start()
    for length in range(1, config.max_tokens + 1):
        totals_BV = scores_B[:, None] + logits_BV.cpu().log_softmax(dim=-1)
        best, places = totals_BV.flatten().topk(num_beams * max(2, 1 + len(stop_ids)))
        running: list[tuple[float, int, int]] = []
        for rank, (score, place) in enumerate(zip(best.tolist(), places.tolist(), strict=True)):
            beam, token = divmod(place, totals_BV.shape[1])
            if token not in stop_ids and length < config.max_tokens:
                running.append((score, beam, token))
            elif rank < num_beams:
                text = beams[beam] if token in stop_ids else [*beams[beam], token]
                finished.append((score / length**config.length_penalty, text))
        finished = sorted(finished, key=lambda item: -item[0])[:num_beams]
        running = running[:num_beams]
        if not running or (len(finished) == num_beams and running[0][0] / length**config.length_penalty <= finished[-1][0]):
            break
        beams = [[*beams[beam], token] for _, beam, token in running]
        scores_B = torch.tensor([score for score, _, _ in running])
        run.cache.select(torch.tensor([beam for _, beam, _ in running], device=logits_BV.device))
        logits_BV = run.step([token for _, _, token in running])
    return finished[0][1]


def _check(model: Generator, prompts: Sequence[Sequence[int]], config: GenerationConfig) -> None:
    if config.num_beams > 1 and config.temperature > 0:
        raise RequestError("beams do not sample", got=f"temperature={config.temperature}", allowed="0 with num_beams > 1")
    vocab_size, num_soft = model.config.vocab_size, len(soft_prompt_of(model))
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise RequestError(f"prompt {number} is empty", do="give at least one token")
        if outside := [token for token in prompt if not 0 <= token < vocab_size]:
            raise RequestError(
                f"prompt {number} has ids outside the vocabulary", got=outside[:5], allowed=f"0 to {vocab_size - 1}"
            )
        limit = getattr(model.config, "max_position_embeddings", None)
        num_read = num_soft + len(prompt)
        length = max(num_read, config.max_tokens) if _answers(model) else num_read + config.max_tokens
        if limit is not None and length > limit:
            raise RequestError(
                f"prompt {number} is too long",
                got=f"{num_read} tokens and {config.max_tokens} new",
                allowed=f"{limit} in all",
            )


def _answers(model: Generator) -> bool:
    """Whether what is generated stands apart from the prompt."""
    return isinstance(model, EncoderDecoder) and model.takes_source

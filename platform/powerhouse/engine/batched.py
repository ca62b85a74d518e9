"""Encoders and encoder-decoders behind the engine's words: prompts in, vectors or completions out, a batch of like lengths at a
time.

Shapes: N prompts, B of them in a batch, T tokens of the longest of these, C model width.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from powerhouse.device import choose_device, to_dtype
from powerhouse.engine.completion import Completion
from powerhouse.engine.params import SamplingParams
from powerhouse.engine.settings import EngineConfig
from powerhouse.errors import ConfigError, RequestError
from powerhouse.models.encoder import Encoder, pool
from powerhouse.models.encoder_decoder import EncoderDecoder
from powerhouse.models.generate import GenerationConfig, generate
from powerhouse.models.hub import load_model
from powerhouse.models.model import Model
from powerhouse.tokenizer import Tokenizer

Prompt = str | Sequence[int]
_SUPPORTED = {"max_tokens", "temperature", "top_k", "top_p", "seed", "ignore_eos"}


class TextEncoder:
    """One vector for each text, by an encoder. Of the settings it has dtype, device, max_num_seqs and max_num_batched_tokens.

    Raises:
        ModelFormatError: the directory is missing or damaged.
        ConfigError: it holds another kind of model.
    """

    def __init__(self, path: Path | str, config: EngineConfig | None = None, how: Literal["mean", "cls"] = "mean") -> None:
        self._config = config or EngineConfig()
        self._how = how
        model = _load(Path(path), self._config)
        if not isinstance(model, Encoder):
            raise ConfigError("texts are made vectors by an encoder", got=type(model).__name__, do="take a BERT")
        self._model, self._tokenizer = model, Tokenizer.load(Path(path))

    @torch.inference_mode()
    def embed(self, prompts: Iterable[Prompt]) -> Tensor:
        """Vectors [N, C] of unit length, in fp32, in the order of the prompts; a text's does not depend on the others.

        Raises:
            RequestError: a prompt is empty, too long, or has ids outside the vocabulary.
        """
        rows = [_read(prompt, self._tokenizer) for prompt in prompts]
        config = self._model.config
        for number, row in enumerate(rows):
            _check(number, row, config.vocab_size, config.max_position_embeddings)
        vectors_NC = torch.empty(len(rows), config.hidden_size)
        for places in _batches(rows, self._config):
            vectors_NC[places] = self._vectors([rows[i] for i in places]).float().cpu()
        return torch.nn.functional.normalize(vectors_NC, dim=-1)

    def _vectors(self, rows: Sequence[Sequence[int]]) -> Tensor:
        device, length = next(self._model.parameters()).device, max(map(len, rows))
        ids_BT = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows], device=device)
        valid_BT = torch.arange(length, device=device) < torch.tensor([[len(row)] for row in rows], device=device)
        return pool(self._model.encode(ids_BT, valid_BT), valid_BT, self._how)


class AnsweringModel:
    """Answers by an encoder-decoder. Of the settings it has those that TextEncoder has.

    Raises:
        ModelFormatError: the directory is missing or damaged.
        ConfigError: it holds another kind of model.
    """

    def __init__(self, path: Path | str, config: EngineConfig | None = None) -> None:
        self._config = config or EngineConfig()
        model = _load(Path(path), self._config)
        if not (isinstance(model, EncoderDecoder) and model.takes_source):
            raise ConfigError("not an encoder-decoder", got=type(model).__name__, do="give a decoder to Engine")
        self._model, self._tokenizer = model, Tokenizer.load(Path(path))

    def generate(self, prompts: Iterable[Prompt], params: SamplingParams | None = None) -> Iterator[Completion]:
        """Answer every prompt, in their order. An answer's tokens are without the one that ends it.

        Raises:
            RequestError: a parameter has no effect here, or a prompt is empty, too long, or has ids outside the vocabulary.
        """
        params = params or SamplingParams()
        _refuse_what_has_no_effect(params)
        rows = [_read(prompt, self._tokenizer) for prompt in prompts]
        for number, row in enumerate(rows):
            _check(number, row, self._model.config.vocab_size, None)
        answers: dict[int, list[int]] = {}
        for places in _batches(rows, self._config):
            answers.update(zip(places, self._answer([rows[i] for i in places], params), strict=True))
        for i, row in enumerate(rows):
            ids = tuple(answers[i])
            reason: Literal["stop", "length"] = "stop" if len(ids) < params.max_tokens else "length"
            yield Completion(self._tokenizer.decode(ids), ids, reason, len(row))

    def _answer(self, rows: Sequence[Sequence[int]], params: SamplingParams) -> list[list[int]]:
        config = GenerationConfig(
            max_tokens=params.max_tokens,
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            seed=secrets.randbits(63) if params.seed is None else params.seed,
        )
        return generate(self._model, rows, config, [] if params.ignore_eos else [self._model.config.end_token_id])  # type: ignore[arg-type]


def _load(path: Path, config: EngineConfig) -> Model:
    return load_model(path, device=choose_device(config.device), dtype=to_dtype(config.dtype)).eval()


def _read(prompt: Prompt, tokenizer: Tokenizer) -> list[int]:
    """A text gets the special tokens of the model around it; ids are taken as they are."""
    return tokenizer.encode_padded([prompt])[0][0].tolist() if isinstance(prompt, str) else list(prompt)


def _check(number: int, row: Sequence[int], vocab_size: int, longest: int | None) -> None:
    if not row:
        raise RequestError(f"prompt {number} is empty", allowed="at least one token")
    if outside := [item for item in row if not (isinstance(item, int) and 0 <= item < vocab_size)]:
        raise RequestError(
            f"prompt {number}: a token id is outside the vocabulary", got=outside[0], allowed=f"0 to {vocab_size - 1}"
        )
    if longest is not None and len(row) > longest:
        raise RequestError(f"prompt {number} is too long", got=f"{len(row)} tokens", allowed=f"{longest}")


def _refuse_what_has_no_effect(params: SamplingParams) -> None:
    plain = SamplingParams()
    for field in fields(SamplingParams):
        if field.name not in _SUPPORTED and (got := getattr(params, field.name)) != getattr(plain, field.name):
            raise RequestError(f"{field.name} has no effect on an encoder-decoder", got=got, allowed=sorted(_SUPPORTED))


def _batches(rows: Sequence[Sequence[int]], config: EngineConfig) -> Iterator[list[int]]:
    """Places of rows of like lengths, as many together as the settings allow, padding counted; one at least."""
    batch: list[int] = []
    for place in sorted(range(len(rows)), key=lambda place: len(rows[place])):
        num_tokens = (len(batch) + 1) * len(rows[place])
        is_full = len(batch) == config.max_num_seqs or num_tokens > config.max_num_batched_tokens
        if batch and is_full:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch

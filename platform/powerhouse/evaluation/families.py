"""Questions to models held here in plain torch: every family, with soft prompts and LoRA.

The answer's tokens are found by one rule (`slot_row`) and scored where the family writes them: a decoder after the prompt, an
encoder at as many mask tokens in the slot (Schick and Schütze 2021), an encoder-decoder after the sentinel that stands for
the slot (Raffel et al. 2020). Shapes: B rows, T positions, V vocabulary, N tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from powerhouse.errors import InputError
from powerhouse.evaluation.asking import Question, Reply, Respondent, Writing
from powerhouse.evaluation.reading import DecoderRespondent, Ids
from powerhouse.models.adapters import soft_prompt_of
from powerhouse.models.attention import DenseCache
from powerhouse.models.decoder import Decoder
from powerhouse.models.encoder import Encoder
from powerhouse.models.encoder_decoder import T5, EncoderDecoder
from powerhouse.models.generate import GenerationConfig, Generator, generate
from powerhouse.models.hub import load_decoder, load_model
from powerhouse.prompting import Prompt, slot_row
from powerhouse.tokenizer import Tokenizer

SENTINEL = "<extra_id_0>"
_BATCH_ROWS = 16


def open_respondent(
    path: Path, *, adapter: Path | None = None, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Respondent:
    """Load a model of any family, and an adapter into it.

    Raises:
        ModelFormatError: the directory is missing or damaged.
        InputError: a model of this kind answers no questions.
    """
    model, tokenizer = load_model(path, dtype=dtype, device=device, adapter=adapter), Tokenizer.load(path)
    if isinstance(model, Decoder):
        return DecoderRespondent(PlainDecoder(model, tokenizer))
    if isinstance(model, Encoder) and model.config.head == "masked_lm":
        return EncoderRespondent(model, tokenizer)
    if isinstance(model, T5):
        return EncoderDecoderRespondent(model, tokenizer)
    allowed = "a decoder, an encoder with its masked-LM head, or a T5"
    raise InputError(f"{path}: this kind of model answers no questions", got=type(model).__name__, allowed=allowed)


def open_plain_decoder(path: Path) -> PlainDecoder:
    """Load a decoder in float32 on the CPU."""
    return PlainDecoder(load_decoder(path), Tokenizer.load(path))


class PlainDecoder:
    """A decoder without cache or paging: the yardstick for the engine."""

    def __init__(self, model: Decoder, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer
        self._soft_ids = soft_prompt_of(model)
        self.max_length = model.config.max_position_embeddings - len(self._soft_ids)

    @torch.inference_mode()
    def score(self, rows: Sequence[Ids], starts: Sequence[int]) -> list[list[tuple[float, bool]]]:
        """Logprob and greediness of every token of each row from its start on.

        What comes before the last token is computed once for all rows that differ in no other, and what a batch begins with
        once for the batch: answers of one token, and examples that many questions share, cost little more than one.
        """
        by_context: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
        for row in rows:
            by_context.setdefault(tuple(row[:-1]), set()).add(tuple(row))
        contexts = sorted(by_context)  # those that begin alike are neighbours
        scores: dict[tuple[int, ...], list[tuple[float, bool]]] = {}
        for start in range(0, len(contexts), _BATCH_ROWS):
            batch = contexts[start : start + _BATCH_ROWS]
            num_shared = _count_shared(batch[0], batch[-1])
            shared, states = self._run(batch, num_shared)
            for context, states_NC in zip(batch, states, strict=True):
                logprobs_NV = self.model.project(states_NC).log_softmax(dim=-1)
                for text in by_context[context]:
                    scores[text] = shared + _look_up(logprobs_NV, text[max(num_shared, 1) :])
        return [scores[tuple(row)][start - 1 :] for row, start in zip(rows, starts, strict=True)]

    def _run(self, contexts: Sequence[tuple[int, ...]], num_shared: int) -> tuple[list[tuple[float, bool]], list[Tensor]]:
        """Scores of the tokens that all contexts begin with, and of each context the states [N, C] from their last one on."""
        cache, num_soft = DenseCache(), len(self._soft_ids)
        head = [*self._soft_ids, *contexts[0][:num_shared]]
        head_TC = self._transform([head], 0, cache)[0, num_soft:] if head else None
        scores: list[tuple[float, bool]] = []
        if head_TC is not None and num_shared > 1:
            scores = _look_up(self.model.project(head_TC[:-1]).log_softmax(dim=-1), contexts[0][1:num_shared])
        tails = [context[num_shared:] for context in contexts]
        last_TC = [head_TC[-1:]] if head_TC is not None else []
        if not any(tails):
            return scores, [torch.cat(last_TC) for _ in contexts]
        if head:
            cache.select(torch.zeros(len(contexts), dtype=torch.long, device=next(self.model.parameters()).device))
        tails_BTC = self._transform(tails, len(head), cache)  # nothing sees the padding after it
        return scores, [torch.cat([*last_TC, states_TC[: len(tail)]]) for tail, states_TC in zip(tails, tails_BTC, strict=True)]

    def _transform(self, rows: Sequence[Sequence[int]], start: int, cache: DenseCache) -> Tensor:
        ids_BT, _ = _pad(rows, self.model)
        positions_T = torch.arange(start, start + ids_BT.shape[1], device=ids_BT.device)
        return self.model.transform(ids_BT, positions_T.expand_as(ids_BT), cache)

    def write(self, rows: Sequence[Ids], *, max_tokens: int, temperature: float, stop: tuple[str, ...], seed: int) -> list[str]:
        writing = Writing(max_tokens=max_tokens, temperature=temperature, stop=stop, seed=seed)
        return _write(self.model, self.tokenizer, rows, writing)


class EncoderRespondent:
    """A masked language model: every token of an answer at its own mask token, all of them open at once."""

    def __init__(self, model: Encoder, tokenizer: Tokenizer) -> None:
        self._model, self._tokenizer = model, tokenizer
        mask_id = tokenizer.core.token_to_id(tokenizer.special_tokens.get("mask_token", "<mask>"))
        if mask_id is None:
            raise InputError("the tokenizer has no mask token", do="take a model that was trained with one")
        self._mask_id: int = mask_id
        self._soft_ids = soft_prompt_of(model)
        around: Ids = tokenizer.core.encode("", add_special_tokens=True).ids
        self._start_ids = tokenizer.start_of_text_ids
        self._end_ids = around[len(self._start_ids) :]

    @torch.inference_mode()
    def __call__(self, questions: Sequence[Question]) -> list[Reply]:
        for question in questions:
            _refuse(question, "answers", "an encoder fills slots")
        rows, places, answers = [], [], []
        for question in questions:
            for answer in question.answers:
                before, inside, after = slot_row(self._tokenizer.encode_batch, _plain(question.prompt), answer)
                start = [*self._soft_ids, *self._start_ids, *before]
                rows.append([*start, *[self._mask_id] * len(inside), *after, *self._end_ids])
                places.append(len(start))
                answers.append(inside)
        scores = self._score(rows, places, answers)
        return [_join(question, scores) for question in questions]

    def _score(self, rows: Sequence[Ids], places: Sequence[int], answers: Sequence[Ids]) -> Iterator[list[tuple[float, bool]]]:
        longest = max((len(row) - len(self._soft_ids) for row in rows), default=0)
        if longest > self._model.config.max_position_embeddings:
            allowed = f"{self._model.config.max_position_embeddings} tokens"
            raise InputError("a prompt is too long for the model", got=f"{longest} tokens", allowed=allowed)
        scores = {}
        for numbers in _batches(rows):
            ids_BT, valid_BT = _pad([rows[number] for number in numbers], self._model)
            states_BTC = self._model.encode(ids_BT, valid_BT)
            for number, states_TC in zip(numbers, states_BTC, strict=True):
                place, ids = places[number], answers[number]
                scores[number] = _look_up(self._model.project(states_TC[place : place + len(ids)]).log_softmax(dim=-1), ids)
        return iter([scores[number] for number in range(len(rows))])


class EncoderDecoderRespondent:
    """A T5: the source has a sentinel in the slot, and the answer comes after the sentinel in the target."""

    def __init__(self, model: T5, tokenizer: Tokenizer) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._sentinel_id: int | None = tokenizer.core.token_to_id(SENTINEL)

    @torch.inference_mode()
    def __call__(self, questions: Sequence[Question]) -> list[Reply]:
        for question in questions:
            _refuse(question, "read", "an encoder-decoder reads no text by itself", is_allowed=False)
        return [self._answer(item) if item.kind == "answers" else self._continue(item) for item in questions]

    def _answer(self, question: Question) -> Reply:
        if self._sentinel_id is None:
            raise InputError("the tokenizer has no sentinel for a slot", got=f"no {SENTINEL}", do="take a T5's own tokenizer")
        parts = [slot_row(self._tokenizer.encode_batch, _plain(question.prompt), answer) for answer in question.answers]
        before, _, after = parts[0]
        end_id, start_id = self._model.config.end_token_id, self._model.config.start_token_id
        source = [*soft_prompt_of(self._model), *before, self._sentinel_id, *after, end_id]
        source_BS, valid_BS = _pad([source] * len(parts), self._model)
        targets = [[start_id, self._sentinel_id, *part.answer] for part in parts]
        ids_BT, _ = _pad(targets, self._model)
        memory = self._model.remember(source_BS, valid_BS)
        logprobs_BTV = self._model(ids_BT, torch.arange(ids_BT.shape[1], device=ids_BT.device), memory).log_softmax(dim=-1)
        scores = (
            _look_up(row_TV[1 : 1 + len(part.answer)], part.answer) for row_TV, part in zip(logprobs_BTV, parts, strict=True)
        )
        return _join(question, iter(scores))

    def _continue(self, question: Question) -> Reply:
        assert question.writing is not None, "a text is written in some way"
        text = _plain(question.prompt).before.rstrip(" ") + question.prompt.after
        row = [*self._tokenizer.encode(text), self._model.config.end_token_id]
        return {"text": _write(self._model, self._tokenizer, [row], question.writing)[0]}


def _refuse(question: Question, kind: str, what: str, *, is_allowed: bool = True) -> None:
    if (question.kind == kind) != is_allowed:
        do = "take a decoder for this task, or another kind of task"
        raise InputError(what, got=f"a task that lets it {question.kind}", do=do)


def _plain(prompt: Prompt) -> Prompt:
    if prompt.turns:
        raise InputError("this family holds no chats", got=prompt.turns[-1][:60], do="leave `user` out of the template")
    return prompt


def _join(question: Question, scores: Iterator[list[tuple[float, bool]]]) -> Reply:
    tokens = [next(scores) for _ in question.answers]
    return {
        "logprobs": [sum(logprob for logprob, _ in of_answer) for of_answer in tokens],
        "num_tokens": [len(of_answer) for of_answer in tokens],
        "is_greedy": [all(is_likeliest for _, is_likeliest in of_answer) for of_answer in tokens],
    }


def _batches(rows: Sequence[Ids]) -> Iterator[list[int]]:
    """Numbers of rows, those of like length together, the longest first: what does not fit in memory fails at once."""
    order = sorted(range(len(rows)), key=lambda number: -len(rows[number]))
    for start in range(0, len(order), _BATCH_ROWS):
        yield order[start : start + _BATCH_ROWS]


def _pad(rows: Sequence[Sequence[int]], model: torch.nn.Module) -> tuple[Tensor, Tensor]:
    """Ids, 0 at padding on the right, and which are valid."""
    length, device = max(map(len, rows)), next(model.parameters()).device
    ids_BT = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows], device=device)
    valid_BT = torch.arange(length, device=device) < torch.tensor([[len(row)] for row in rows], device=device)
    return ids_BT, valid_BT


def _count_shared(first: Sequence[int], last: Sequence[int]) -> int:
    """Tokens that both begin with: in a sorted list, all between them too."""
    return next(
        (place for place, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), min(len(first), len(last))
    )


def _look_up(logprobs_NV: Tensor, ids: Sequence[int]) -> list[tuple[float, bool]]:
    """Of tokens [N], their logprobs in rows of the same place, and whether they are the likeliest."""
    ids_N = torch.tensor(ids, device=logprobs_NV.device)
    own_N = logprobs_NV.gather(1, ids_N[:, None])[:, 0]
    is_likeliest_N = own_N == logprobs_NV.amax(dim=1)
    return list(zip(own_N.tolist(), is_likeliest_N.tolist(), strict=True))


def _write(model: Generator, tokenizer: Tokenizer, rows: Sequence[Ids], writing: Writing) -> list[str]:
    config = GenerationConfig(max_tokens=writing.max_tokens, temperature=writing.temperature, seed=writing.seed)
    end_id = model.config.end_token_id if isinstance(model, EncoderDecoder) else tokenizer.end_of_text_id
    texts = []
    for numbers in (range(start, min(start + _BATCH_ROWS, len(rows))) for start in range(0, len(rows), _BATCH_ROWS)):
        texts += [tokenizer.decode(ids) for ids in generate(model, [rows[number] for number in numbers], config, {end_id})]
    return [_cut(text, writing.stop) for text in texts]


def _cut(text: str, stop: Sequence[str]) -> str:
    return text[: min((place for word in stop if (place := text.find(word)) >= 0), default=len(text))]

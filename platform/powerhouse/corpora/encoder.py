"""The fastest encoding that is exactly the tokenizer's own: tiktoken on its merges, where that can be shown to be the same.

`tokenizers` merges two neighbours if that very pair was learnt, tiktoken if together they spell a token, and both take the
lowest number first. The two agree on every text if (1) no token is spelt by two merges and tokens are numbered in the order
of their merges, and (2) every token, given alone, is merged to itself. For suppose that both have done the same so far, and
tiktoken now joins x and y to the token t. No merge has crossed the ends of t's bytes, or x and y would not end there. So
within them stands what merging t alone has at this point, all merges before t's done; by (2) that is the pair that was learnt
for t, so `tokenizers` joins x and y too. Both conditions are checked on every token when the encoder is made.

Both split a text at the pattern of GPT-2 first, each with an engine and Unicode tables of its own; a test holds their splits
against one another.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import tiktoken
from tokenizers import pre_tokenizers

from powerhouse.tokenizer import Tokenizer

Encode = Callable[[Sequence[str]], list[list[int]]]

_GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LONG_BLANK = re.compile(r"\s{1000}")
"""tiktoken's pattern looks back over a run of white space, and ends the process on some hundred thousand."""


def make_encoder(tokenizer: Tokenizer) -> Encode:
    """Give the fast encoder, or the tokenizer's own if it is no byte-level BPE for which the two are the same."""
    fast = make_tiktoken(tokenizer)
    return _Fast(fast, tokenizer) if fast else tokenizer.encode_batch


class _Fast:
    def __init__(self, core: tiktoken.Encoding, tokenizer: Tokenizer) -> None:
        self._core = core
        self._tokenizer = tokenizer

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        return [
            self._tokenizer.encode(text) if _LONG_BLANK.search(text) else self._core.encode_ordinary(text) for text in texts
        ]


def make_tiktoken(tokenizer: Tokenizer) -> tiktoken.Encoding | None:
    """Build the same encoding in tiktoken; None where it would differ, or where that cannot be told."""
    description = json.loads(tokenizer.core.to_str())
    if not _is_plain_byte_level(description):
        return None
    products = ["".join(pair) for pair in description["model"]["merges"]]
    vocabulary: dict[str, int] = description["model"]["vocab"]
    special = {token["content"] for token in description["added_tokens"]}
    if not _is_merged_alike(tokenizer, products, vocabulary, special):
        return None
    letters = {letter: byte for byte, letter in enumerate(_letters_of_bytes())}
    ranks = {bytes(letters[letter] for letter in token): place for token, place in vocabulary.items() if token not in special}
    return tiktoken.Encoding("own", pat_str=_GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})


def _is_plain_byte_level(description: dict[str, Any]) -> bool:
    model, splitter = description["model"], description["pre_tokenizer"] or {}
    unusual = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")
    is_plain_model = model["type"] == "BPE" and not any(model.get(name) for name in unusual)
    is_split_as_gpt2 = splitter.get("type") == "ByteLevel" and splitter["use_regex"] and not splitter["add_prefix_space"]
    are_added_special = all(token["special"] for token in description["added_tokens"])
    return bool(is_plain_model and is_split_as_gpt2 and are_added_special and description["normalizer"] is None)


def _is_merged_alike(tokenizer: Tokenizer, products: list[str], vocabulary: dict[str, int], special: set[str]) -> bool:
    ids = [vocabulary[product] for product in products]
    is_ordered = all(one < other for one, other in pairwise(ids))
    tokens = [*products, *_letters_of_bytes()]
    is_whole = set(tokens) == set(vocabulary) - special
    return is_ordered and is_whole and all(len(tokenizer.core.model.tokenize(token)) == 1 for token in tokens)


def _letters_of_bytes() -> list[str]:
    """Give the letter that stands for each byte: itself where it can be printed, else the next from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    letters = [chr(byte if byte in printable else next(others)) for byte in range(256)]
    assert sorted(letters) == sorted(pre_tokenizers.ByteLevel.alphabet()), "not the letters of `tokenizers`"
    return letters

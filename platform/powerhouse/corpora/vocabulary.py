"""Learning a vocabulary from texts: BPE (Sennrich et al. 2016), or a unigram language model (Kudo 2018), both on bytes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from powerhouse.errors import InputError
from powerhouse.tokenizer import END_OF_TEXT, FILE, Tokenizer

Method = Literal["bpe", "unigram"]


def train(method: Method, texts: Iterable[str], vocab_size: int, directory: Path) -> Tokenizer:
    """Learn a vocabulary and save it to the directory; id 0 is the end of a text, and every string has an encoding.

    Raises:
        InputError: the texts cannot give a vocabulary of that size.
    """
    if method == "bpe":
        tokenizer = Tokenizer.train(texts, vocab_size)
    else:
        _train_unigram(texts, vocab_size).save(str(directory / FILE))
        tokenizer = Tokenizer.load(directory)
    tokenizer.save(directory)
    return tokenizer


def _train_unigram(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    core = tokenizers.Tokenizer(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        unk_token=END_OF_TEXT,  # the model wants one; with all bytes in the alphabet it never comes
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    if (found := core.get_vocab_size()) != vocab_size:
        raise InputError(
            "the text cannot give a unigram vocabulary of this size",
            got=f"vocab_size={vocab_size}",
            allowed=f"{found} on this text",
            do="change vocab_size or give more text",
        )
    return core

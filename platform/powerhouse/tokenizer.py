"""Byte-level BPE (Sennrich et al. 2016, on bytes as in GPT-2), through the `tokenizers` library and its `tokenizer.json`.

Every string has an encoding and decodes to itself: the alphabet is all 256 bytes, so there is no unknown token.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from powerhouse.errors import InputError, ModelFormatError

FILE = "tokenizer.json"
END_OF_TEXT = "<|endoftext|>"
_NUM_BYTES = 256


class Tokenizer:
    """Text to token ids and back."""

    def __init__(self, core: tokenizers.Tokenizer, end_of_text: str = END_OF_TEXT) -> None:
        core.encode_special_tokens = True  # a text that spells out "<|endoftext|>" is text
        self.core = core
        self.end_of_text = end_of_text

    @classmethod
    def load(cls, directory: Path) -> Tokenizer:
        """Read `tokenizer.json`, and from `tokenizer_config.json` which token ends a text.

        Raises:
            ModelFormatError: the file is missing or damaged, or the end-of-text token is not in the vocabulary.
        """
        path = directory / FILE
        if not path.is_file():
            raise ModelFormatError(f"{path}: missing", do="give a directory with tokenizer.json")
        try:
            core = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for a file it cannot read
            raise ModelFormatError(f"{path}: damaged", got=error, do="fetch or export the tokenizer again") from None
        config_path = directory / "tokenizer_config.json"
        config = json.loads(config_path.read_text(encoding="utf-8")) if config_path.is_file() else {}
        end_of_text = config.get("eos_token", END_OF_TEXT)
        end_of_text = end_of_text["content"] if isinstance(end_of_text, dict) else end_of_text
        if core.token_to_id(end_of_text) is None:
            raise ModelFormatError(f"{path}: the end-of-text token is not in the vocabulary", got=end_of_text)
        return cls(core, end_of_text)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learn merges from the texts; id 0 is the end of a text.

        Raises:
            InputError: the texts have too few distinct pairs for a vocabulary of that size.
        """
        core = tokenizers.Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        core.train_from_iterator(texts, trainer)
        if (found := core.get_vocab_size()) != vocab_size:
            raise InputError(
                "the vocabulary is larger than the text can give",
                got=f"vocab_size={vocab_size}",
                allowed=f"{_NUM_BYTES + 1} to {found} on this text",
                do="lower vocab_size or give more text",
            )
        return cls(core)

    @property
    def vocab_size(self) -> int:
        return int(self.core.get_vocab_size())

    @property
    def end_of_text_id(self) -> int:
        token_id: int = self.core.get_vocab(with_added_tokens=True)[self.end_of_text]
        return token_id

    def encode(self, text: str) -> list[int]:
        """Give the ids of the text alone: no special token is added, and none is read out of the text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [item.ids for item in self.core.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Give the text of the ids, special tokens left out; an incomplete UTF-8 sequence becomes U+FFFD."""
        return str(self.core.decode(list(ids), skip_special_tokens=True))

    def save(self, directory: Path) -> None:
        """Write the two files by which transformers loads it as a fast tokenizer."""
        directory.mkdir(parents=True, exist_ok=True)
        self.core.save(str(directory / FILE))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self.end_of_text,
            "clean_up_tokenization_spaces": False,
        }
        (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

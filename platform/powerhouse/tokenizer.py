"""Text to token ids and back, through the `tokenizers` library and its `tokenizer.json`: byte-level BPE (Sennrich et al.
2016, on bytes as in GPT-2) of our own, and whatever a model directory brings.

Shapes: B texts, T tokens. A text that spells a special token is text, unless it is said that it is read.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import decoders, models, pre_tokenizers, trainers

from powerhouse.chat import CONFIG_FILE, ChatTemplate, Messages, read_json, read_sources, read_special_tokens
from powerhouse.errors import InputError, ModelFormatError

FILE = "tokenizer.json"
END_OF_TEXT = "<|endoftext|>"
_NUM_BYTES = 256
_SIGN = "\ufdd4"  # a Unicode noncharacter: never in text that is exchanged
_PRIVATE_USE = 0x100000


class Tokenizer:
    """Text to token ids and back.

    `special_tokens` names tokens by their part: `eos_token`, `bos_token`, `pad_token`, ...; `chat_template` is None for a
    model that is not tuned for chat.
    """

    def __init__(
        self,
        core: tokenizers.Tokenizer,
        config: Mapping[str, Any],
        special_tokens: Mapping[str, str],
        chat_template: ChatTemplate | None = None,
    ) -> None:
        core.encode_special_tokens = True  # a text that spells out "<|endoftext|>" is text
        core.no_padding()  # some files are saved with the padding and the length limit of their last use
        core.no_truncation()
        self.core = core
        self.special_tokens = dict(special_tokens)
        self.chat_template = chat_template
        self._config = dict(config)

    @classmethod
    def load(cls, directory: Path) -> Tokenizer:
        """Read `tokenizer.json`, and the special tokens and the chat template from the files beside it.

        Without a file that says which token ends a text it is `<|endoftext|>`, where the vocabulary has that.

        Raises:
            ModelFormatError: the file is missing or damaged, or the end-of-text token is not in the vocabulary.
            InputError: the chat template is not valid.
        """
        path = directory / FILE
        if not path.is_file():
            raise ModelFormatError(f"{path}: missing", do="give a directory with tokenizer.json")
        try:
            core = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for a file it cannot read
            raise ModelFormatError(f"{path}: damaged", got=error, do="fetch or export the tokenizer again") from None
        config = read_json(directory / CONFIG_FILE)
        named = read_special_tokens(directory, config)
        if "eos_token" not in named and core.token_to_id(END_OF_TEXT) is not None:
            named["eos_token"] = END_OF_TEXT
        if "eos_token" in named and core.token_to_id(named["eos_token"]) is None:
            raise ModelFormatError(f"{path}: the end-of-text token is not in the vocabulary", got=named["eos_token"])
        sources = read_sources(directory, config)
        return cls(core, config, named, ChatTemplate(sources, named) if sources else None)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learn merges from the texts; id 0 is the end of a text. Every string has an encoding and decodes to itself: the
        alphabet is all 256 bytes, so there is no unknown token.

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
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        return cls(core, config, {"eos_token": END_OF_TEXT})

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; a model's embedding may have more rows."""
        return int(self.core.get_vocab_size(with_added_tokens=True))

    @property
    def digest(self) -> str:
        """Hash of all that `save` writes."""
        templates = self.chat_template.sources if self.chat_template else {}
        saved = json.dumps([self.core.to_str(), self._saved_config(), templates], sort_keys=True)
        return hashlib.sha256(saved.encode()).hexdigest()

    @property
    def start_of_text_ids(self) -> list[int]:
        """What stands before a text in the model's own training: a llama's <s>, a BERT's [CLS], nothing in a GPT-2."""
        around: list[int] = self.core.encode("", add_special_tokens=True).ids
        return around[:-1] if around[-1:] == [self.end_of_text_id] else around

    @property
    def end_of_text_id(self) -> int:
        """What stands after a text; a BERT, which has no name for it, puts its separator there."""
        has_separator_only = "eos_token" not in self.special_tokens and "sep_token" in self.special_tokens
        return self.id_of("sep_token" if has_separator_only else "eos_token")

    @cached_property
    def special_ids(self) -> dict[str, int]:
        """Every special token, named or not, and its id."""
        added = self.core.get_added_tokens_decoder()
        return {token.content: token_id for token_id, token in sorted(added.items()) if token.special}

    def id_of(self, name: str) -> int:
        """Give the id of a named special token, such as bos_token.

        Raises:
            ModelFormatError: the tokenizer has none of that name, or it is not in the vocabulary.
        """
        token_id: int | None = self.core.token_to_id(self.special_tokens[name]) if name in self.special_tokens else None
        if token_id is None:
            raise ModelFormatError(f"the tokenizer has no {name}", allowed=sorted(self.special_tokens))
        return token_id

    def add_special_tokens(self, tokens: Sequence[str]) -> None:
        """Give each its own id after all there are; one that is known keeps its id."""
        self.core.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in tokens])
        self.__dict__.pop("special_ids", None)
        self.__dict__.pop("_reader", None)

    def encode(self, text: str) -> list[int]:
        """Give the ids of the text alone: no special token is added, and none is read out of the text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [item.ids for item in self.core.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_padded(
        self, texts: Sequence[str], *, side: Literal["left", "right"] = "right", max_length: int | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Give ids_BT and valid_BT of the texts with the special tokens of the model around each ([CLS] .. [SEP], </s>).

        Rows are filled to the longest with the padding token, or where there is none with the one that ends a text.

        Raises:
            InputError: a text has more than `max_length` tokens.
            ModelFormatError: rows differ in length, and there is nothing to fill them with.
        """
        rows = [item.ids for item in self.core.encode_batch_fast(list(texts), add_special_tokens=True)]
        longest = max(map(len, rows), default=0)
        if max_length is not None and longest > max_length:
            raise InputError("a text is too long for the model", got=f"{longest} tokens", allowed=f"up to {max_length}")
        is_ragged = any(len(row) < longest for row in rows)
        fill = self.id_of("pad_token" if "pad_token" in self.special_tokens else "eos_token") if is_ragged else 0
        ids_BT = np.full((len(rows), longest), fill, dtype=np.int64)
        valid_BT = np.zeros((len(rows), longest), dtype=np.bool_)
        for index, row in enumerate(rows):
            place = slice(longest - len(row), longest) if side == "left" else slice(len(row))
            ids_BT[index, place], valid_BT[index, place] = row, True
        return ids_BT, valid_BT

    def encode_rendered(self, text: str) -> list[int]:
        """Give the ids of a rendered text, every special token that it spells read, whoever wrote it there: the ids of
        transformers' tokenizer(text, add_special_tokens=False). Use `encode_chat` for what strangers write.
        """
        return self._reader.encode(text, text)[0]

    def encode_chat(self, messages: Messages, **options: Any) -> list[int]:
        """Give the ids of the rendered conversation; only the special tokens that the template wrote are read.

        A message that spells a special token is text, merged with its neighbours as text is. Options: `ChatTemplate.render`.

        Raises:
            InputError: there is no chat template, or the template refuses the conversation.
        """
        text, guarded = self._template().render_guarded(messages, self.special_ids, **options)
        return self._reader.encode(text, guarded)[0]

    def encode_chat_answers(self, messages: Messages, **options: Any) -> tuple[list[int], list[bool]]:
        """Give `encode_chat`'s ids, and for each whether the assistant writes it: has a character in an answer's range.

        Raises:
            InputError: as `encode_chat`, or the template does not show where answers start and end.
        """
        text, guarded = self._template().render_guarded(messages, self.special_ids, **options)
        _, spans = self._template().render_spans(messages, **options)
        ids, ranges = self._reader.encode(text, guarded)
        return ids, [any(start < last and end > first for first, last in spans) for start, end in ranges]

    def decode(self, ids: Sequence[int]) -> str:
        """Give the text of the ids, special tokens left out; an incomplete UTF-8 sequence becomes U+FFFD."""
        return str(self.core.decode(list(ids), skip_special_tokens=True))

    def save(self, directory: Path) -> None:
        """Write the files by which transformers loads it as a fast tokenizer, the chat template included."""
        directory.mkdir(parents=True, exist_ok=True)
        self.core.save(str(directory / FILE))
        (directory / CONFIG_FILE).write_text(json.dumps(self._saved_config(), indent=2) + "\n", encoding="utf-8")
        if self.chat_template:
            self.chat_template.save(directory)

    def _saved_config(self) -> dict[str, Any]:
        config = {key: item for key, item in self._config.items() if key != "chat_template" and item is not None}
        return self.special_tokens | config

    @cached_property
    def _reader(self) -> _SpecialReader:
        return _SpecialReader(self.core)

    def _template(self) -> ChatTemplate:
        if self.chat_template is None:
            raise InputError("the tokenizer has no chat template", do="take a model tuned for chat, or send plain text")
        return self.chat_template


class _SpecialReader:
    """Encodes a text in which some special tokens are read and others, spelled alike, are text.

    A copy of the tokenizer knows a sign for every special token, of the same length. The text goes through it as one piece
    with signs where tokens are to be read, so whatever stands between two of them is cut and merged as it would be alone.
    """

    def __init__(self, core: tokenizers.Tokenizer) -> None:
        self._core = tokenizers.Tokenizer.from_str(core.to_str())
        self._core.encode_special_tokens = True
        self._core.post_processor = None  # that of GPT-2 takes blanks out of the tokens' ranges
        self._signs: dict[str, str] = {}
        for token in core.get_added_tokens_decoder().values():
            if token.special:
                self._signs[token.content] = self._add_sign(token)
        ids = {token.content: token_id for token_id, token in self._core.get_added_tokens_decoder().items()}
        self._ids = {ids[sign]: ids[content] for content, sign in self._signs.items()}
        longest_first = sorted(self._signs, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def _add_sign(self, token: tokenizers.AddedToken) -> str:
        sign = _SIGN + chr(_PRIVATE_USE + len(self._signs)) + _SIGN * (len(token.content) - 2)
        if len(sign) != len(token.content):
            raise ModelFormatError("a special token of one character is too easily spelled", got=repr(token.content))
        self._core.add_tokens([tokenizers.AddedToken(sign, normalized=False, lstrip=token.lstrip, rstrip=token.rstrip)])
        return sign

    def encode(self, text: str, guarded: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Give the ids of the text and their character ranges; read are the special tokens that `guarded` still spells.

        Raises:
            InputError: the text has a noncharacter that is in use here.
        """
        if (place := text.find(_SIGN)) >= 0:
            raise InputError("a text with the Unicode noncharacter U+FDD4", got=repr(text[max(0, place - 20) : place + 20]))
        pieces, done = [], 0
        for match in self._pattern.finditer(guarded):
            pieces += [text[done : match.start()], self._signs[match.group()]]
            done = match.end()
        encoding = self._core.encode("".join([*pieces, text[done:]]), add_special_tokens=False)
        return [self._ids.get(token_id, token_id) for token_id in encoding.ids], encoding.offsets

"""The byte-level BPE tokenizer inside a GGUF file, as `tokenizer.json` and `tokenizer_config.json`.

A GGUF file names its way of cutting text into words instead of holding it (`tokenizer.ggml.pre`): the patterns of each
name stand in llama.cpp's src/llama-vocab.cpp. A name that is not in the table here is refused, because a wrong pattern
gives other tokens than the model has learned, and nobody notices.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from powerhouse.errors import ModelFormatError
from powerhouse.models.gguf import GGUFWeights

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORD_PATTERNS = {
    "gpt-2": [_GPT2],
    "smollm": [r"\p{N}", _GPT2],
    "qwen2": [_LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")],
    "llama-bpe": [_LLAMA3],
    "default": [r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"],
}
"""`tokenizer.ggml.pre` -> patterns, each cutting the pieces that the one before has left."""

# Kinds of tokens in `tokenizer.ggml.token_type`; those of other kinds are pieces of text.
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4


def write_tokenizer(source: GGUFWeights, directory: Path) -> None:
    """Write the two files by which transformers loads it as a fast tokenizer.

    Raises:
        ModelFormatError: as `build_tokenizer` does.
    """
    core = build_tokenizer(source)
    core.save(str(directory / "tokenizer.json"))
    text = json.dumps(_tokenizer_config(source), indent=2, ensure_ascii=False)
    (directory / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def build_tokenizer(source: GGUFWeights) -> tokenizers.Tokenizer:
    """Build the tokenizer.

    Raises:
        ModelFormatError: it is of another kind, cuts words in an unknown way, is damaged, or disagrees with the embedding.
    """
    words = _word_patterns(source)
    core = tokenizers.Tokenizer(_bpe(source, ignore_merges=_is_llama3(source)))
    if words is WORD_PATTERNS["qwen2"]:
        core.normalizer = normalizers.NFC()  # as in the tokenizer.json of every Qwen; GGUF has no place for it
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in words]
    core.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    core.decoder = decoders.ByteLevel()
    _add_special_tokens(core, source)
    if template := _template(source):
        pieces = [(token, core.token_to_id(token)) for token in template if token != "$A"]
        core.post_processor = processors.TemplateProcessing(single=" ".join(template), special_tokens=pieces)
    return core


def _word_patterns(source: GGUFWeights) -> list[str]:
    model = source.require("tokenizer.ggml.model")
    if model != "gpt2":
        raise ModelFormatError(f"{source.path}: unsupported tokenizer", got=model, allowed="gpt2 (byte-level BPE)")
    name = source.get("tokenizer.ggml.pre", "default")
    if name not in WORD_PATTERNS:
        known = ", ".join(sorted(WORD_PATTERNS))
        raise ModelFormatError(f"{source.path}: unsupported tokenizer.ggml.pre", got=name, allowed=known)
    return WORD_PATTERNS[name]


def _is_llama3(source: GGUFWeights) -> bool:
    return bool(source.get("tokenizer.ggml.pre") == "llama-bpe")


def _bpe(source: GGUFWeights, *, ignore_merges: bool) -> models.BPE:
    tokens = source.require("tokenizer.ggml.tokens")
    vocab = {token: number for number, token in enumerate(tokens)}
    if (num_rows := source.config()["vocab_size"]) != len(vocab):
        what = f"{source.path}: the vocabulary disagrees with the embedding"
        raise ModelFormatError(what, got=f"{len(vocab)} different tokens", allowed=f"{num_rows}, the rows of token_embd")
    merges = [tuple(merge.split(" ")) for merge in source.require("tokenizer.ggml.merges")]
    if odd := next((merge for merge in merges if len(merge) != 2), None):
        raise ModelFormatError(f"{source.path}: damaged merges", got=odd, allowed="two tokens with a space between")
    try:
        return models.BPE(vocab, merges, ignore_merges=ignore_merges)
    except Exception as error:  # the library raises bare Exception for a merge of tokens that are not there
        raise ModelFormatError(f"{source.path}: damaged merges", got=error, do="fetch the file again") from None


def _add_special_tokens(core: tokenizers.Tokenizer, source: GGUFWeights) -> None:
    tokens = source.require("tokenizer.ggml.tokens")
    kinds = source.require("tokenizer.ggml.token_type")
    if len(kinds) != len(tokens):
        what = f"{source.path}: damaged tokenizer.ggml.token_type"
        raise ModelFormatError(what, got=f"{len(kinds)} kinds", allowed=f"{len(tokens)}, one for each token")
    pairs = list(zip(tokens, kinds, strict=True))
    core.add_special_tokens([AddedToken(token, normalized=False) for token, kind in pairs if kind in (_UNKNOWN, _CONTROL)])
    core.add_tokens([AddedToken(token, normalized=False) for token, kind in pairs if kind == _USER_DEFINED])


def _template(source: GGUFWeights) -> list[str]:
    """What an encoded text stands between: ["<bos>", "$A"], or nothing where no token is added."""
    begin = source.get("tokenizer.ggml.add_bos_token", _is_llama3(source))
    end = source.get("tokenizer.ggml.add_eos_token", False)
    if not (begin or end):
        return []
    return [*([_token(source, "bos", needed=True)] * begin), "$A", *([_token(source, "eos", needed=True)] * end)]


def _token(source: GGUFWeights, name: str, *, needed: bool = False) -> str:
    """Text of a special token; "" where the file has none and none is needed."""
    key = f"tokenizer.ggml.{name}_token_id"
    number = source.require(key) if needed else source.get(key)
    if number is None:
        return ""
    tokens = source.require("tokenizer.ggml.tokens")
    if number >= len(tokens):
        raise ModelFormatError(f"{source.path}: {key} is no token", got=number, allowed=f"0 to {len(tokens) - 1}")
    return str(tokens[number])


def _tokenizer_config(source: GGUFWeights) -> dict[str, Any]:
    names = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    special = {name: token for name, key in names.items() if (token := _token(source, key))}
    template = source.get("tokenizer.chat_template")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        **({"chat_template": template} if template else {}),
        "model_max_length": source.config()["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
    }

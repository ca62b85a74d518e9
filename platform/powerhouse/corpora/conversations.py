"""From conversations, and pairs of a prompt and its completion, to packed token rows that tell which tokens are learnt.

A file holds one JSON object a line, a record: `messages` (and `tools`), laid out by the model's chat template, of which what
the assistant writes is learnt; or two plain texts, `prompt` and `completion`, encoded each for itself, of which the completion
and the token that ends it are learnt. A record is never cut in two: rows are packed by best fit and filled up with the token
that ends a text, as a document of its own of which nothing is learnt.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import shutil
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from powerhouse.artifacts import Artifact, produce, write_atomically
from powerhouse.config import Config, StoragePath
from powerhouse.corpora.document import Rejection
from powerhouse.corpora.opening import open_binary
from powerhouse.corpora.pack import documents_of_pieces, pack_whole, shuffle_order
from powerhouse.corpora.rows import write_provenance, write_rows
from powerhouse.errors import InputError
from powerhouse.telemetry import progress
from powerhouse.tokenizer import Tokenizer

_WINDOW = 512
"""Records at once for each process."""


class ConversationsConfig(Config):
    """Settings of jobs/encode_conversations.py."""

    inputs: list[StoragePath] = Field(min_length=1)
    """Files of records, one JSON object a line; .gz, .bz2 and .zst are decompressed."""
    tokenizer: StoragePath
    """Directory of the model that is to be tuned: its tokenizer, and for `messages` its chat template."""
    output: StoragePath
    """Folder of the tokens: tokenizer.json, rows/*.arrow, provenance.parquet, report.json, rejects.jsonl."""
    row_length: int = Field(ge=2)
    """Tokens in a row: the training context and one more for the last label."""
    too_long: Literal["reject", "truncate"] = "reject"
    """What becomes of a record longer than a row: it is left out, or cut at the end of the row. Both are counted."""
    max_rejected_share: float = Field(default=0.1, ge=0, le=1)
    """With more of the records left out than this, the job fails and says why they were."""
    rows_per_shard: int = Field(default=65_536, ge=1)
    """Rows in one file."""
    seed: int = Field(default=0, ge=0)
    """Of the shuffle of the rows."""
    num_processes: int = Field(default=1, ge=1)
    """Processes that encode, on this machine. It changes how long the job takes, never what it writes."""


def encode_conversations(config: ConversationsConfig) -> Artifact:
    """Write the token rows to `config.output`.

    Raises:
        InputError: a file is missing, or too many records, or all, had to be left out.
        ModelFormatError: the tokenizer is missing or damaged.
    """
    inputs: dict[str, Artifact | str] = {"tokenizer": Tokenizer.load(config.tokenizer).digest}
    inputs |= {f"input_{number}": _digest(path) for number, path in enumerate(config.inputs)}
    settings = config.model_dump(mode="json", exclude={"inputs", "tokenizer", "output", "num_processes"})
    return produce(config.output, "tokens", settings, inputs, partial(_make, config))


def _digest(path: Path) -> str:
    if not path.is_file():
        raise InputError(f"{path}: no such file", do="correct `inputs`")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Encoded:
    """A record's tokens, and for each whether it is learnt."""

    ids: list[int]
    is_learned: list[bool]
    is_truncated: bool = False

    @property
    def num_answers(self) -> int:
        """Stretches of learned tokens."""
        return sum(here and not before for before, here in zip([False, *self.is_learned], self.is_learned, strict=False))


def encode_record(line: bytes, tokenizer: Tokenizer, row_length: int, *, truncates: bool) -> Encoded | Rejection:
    """Encode one line, or tell why it cannot be learnt from."""
    try:
        record = json.loads(line.decode())
        if "\\ud" in line.decode().lower():  # an escape may be half a character
            record = json.loads(json.dumps(record, ensure_ascii=False).encode(errors="replace"))
        ids, is_learned = _encode(record, tokenizer)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        return Rejection("not_json", str(error))
    except InputError as error:
        return Rejection("not_a_conversation", str(error))
    is_long = len(ids) > row_length
    if is_long and not truncates:
        return Rejection("too_long", f"{len(ids)} tokens")
    if not any(is_learned[:row_length]):
        return Rejection("no_answer", "nothing in it is learnt" if not is_long else f"none in its first {row_length} tokens")
    return Encoded(ids[:row_length], is_learned[:row_length], is_long)


def _encode(record: object, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    if not isinstance(record, dict):
        raise InputError("a record is a JSON object", got=type(record).__name__)
    if isinstance(messages := record.get("messages"), list):
        return tokenizer.encode_chat_answers(messages, tools=record.get("tools"))
    texts = [record[key] for key in ("prompt", "completion") if isinstance(record.get(key), str)]
    if len(texts) < 2:
        raise InputError("neither `messages`, a list, nor `prompt` and `completion`, two texts", got=", ".join(record))
    prompt, completion = tokenizer.encode_batch(texts)
    asked, answer = [*tokenizer.start_of_text_ids, *prompt], [*completion, tokenizer.end_of_text_id]
    return asked + answer, [False] * len(asked) + [True] * len(answer)


@dataclass
class _Tally:
    lengths: list[int] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    """Of the records that are kept, over all files."""
    num_records: int = 0
    num_learned_tokens: int = 0
    num_answers: int = 0
    num_truncated: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    first_rejections: dict[str, str] = field(default_factory=dict)


def _make(config: ConversationsConfig, folder: Path) -> dict[str, int | float]:
    tokenizer = Tokenizer.load(config.tokenizer)
    tokenizer.save(folder)
    tally = _write_stream(config, tokenizer, folder)
    _check(config, tally)
    lengths_D = np.array(tally.lengths, dtype=np.int64)
    pieces = pack_whole(lengths_D, config.row_length)
    order_N = shuffle_order(pieces.num_rows, config.seed)
    stream_T = np.memmap(folder / "work" / "tokens.bin", dtype=np.int32, mode="r")
    learned_T = np.memmap(folder / "work" / "learned.bin", dtype=np.uint8, mode="r")
    write_rows(folder / "rows", stream_T, pieces, order_N, config.rows_per_shard, learned_T)
    del stream_T, learned_T  # unmaps the files
    shutil.rmtree(folder / "work")
    numbers_P = np.array([*tally.numbers, None], dtype=object)[documents_of_pieces(lengths_D, pieces)]  # padding has none
    write_provenance(folder / "provenance.parquet", numbers_P, pieces, order_N)
    counts = _count(tally, pieces.num_rows, config.row_length)
    report = {"total": counts, "rejected": dict(tally.rejected), "first_rejections": tally.first_rejections}
    write_atomically(folder / "report.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    return {"vocab_size": tokenizer.vocab_size, **counts}


def _write_stream(config: ConversationsConfig, tokenizer: Tokenizer, folder: Path) -> _Tally:
    """Write work/tokens.bin and work/learned.bin, a row of padding at their ends, and rejects.jsonl."""
    (folder / "work").mkdir()
    tally = _Tally()
    with (
        (folder / "work" / "tokens.bin").open("wb") as tokens,
        (folder / "work" / "learned.bin").open("wb") as learned,
        (folder / "rejects.jsonl").open("w", encoding="utf-8") as rejects,
    ):
        for path, number, item in _encode_lines(config):
            if isinstance(item, Rejection):
                tally.rejected[item.reason] += 1
                tally.first_rejections.setdefault(item.reason, f"{path}, line {number}: {item.detail}")
                rejects.write(json.dumps({"path": str(path), "line": number, **asdict(item)}, ensure_ascii=False) + "\n")
            else:
                np.array(item.ids, dtype=np.int32).tofile(tokens)
                np.array(item.is_learned, dtype=np.uint8).tofile(learned)
                _add(tally, item)
            tally.num_records += 1
        np.full(config.row_length, tokenizer.end_of_text_id, dtype=np.int32).tofile(tokens)
        np.zeros(config.row_length, dtype=np.uint8).tofile(learned)
    return tally


def _encode_lines(config: ConversationsConfig) -> Iterator[tuple[Path, int, Encoded | Rejection]]:
    """Give every record's file, line and tokens, or why it is left out; in their order."""
    lines = _read_lines(config.inputs)
    encode = partial(_encode_line, config.tokenizer, config.row_length, config.too_long == "truncate")
    if config.num_processes == 1:
        yield from map(encode, lines)
        return
    with multiprocessing.get_context("spawn").Pool(config.num_processes) as pool:
        while window := list(islice(lines, config.num_processes * _WINDOW)):  # a pool would read all lines at once
            yield from pool.imap(encode, window, chunksize=_WINDOW // 8)


def _encode_line(
    directory: Path, row_length: int, truncates: bool, item: tuple[Path, int, bytes]
) -> tuple[Path, int, Encoded | Rejection]:
    path, number, line = item
    return path, number, encode_record(line, _load(directory), row_length, truncates=truncates)


@lru_cache(maxsize=1)
def _load(directory: Path) -> Tokenizer:
    return Tokenizer.load(directory)


def _read_lines(paths: list[Path]) -> Iterator[tuple[Path, int, bytes]]:
    """Give every line that is not blank, its file and its number from 1."""
    with progress("records encoded", None, "record") as bar:
        for path in paths:
            try:
                with open_binary(path) as file:
                    for number, line in enumerate(file, start=1):
                        if line.strip():
                            yield path, number, line
                            bar.update()
            except (OSError, EOFError, zlib.error) as error:
                raise InputError(f"{path}: truncated or damaged", got=error, do="write the file again") from None


def _add(tally: _Tally, item: Encoded) -> None:
    tally.lengths.append(len(item.ids))
    tally.numbers.append(tally.num_records)
    tally.num_learned_tokens += sum(item.is_learned)
    tally.num_answers += item.num_answers
    tally.num_truncated += item.is_truncated


def _check(config: ConversationsConfig, tally: _Tally) -> None:
    num_rejected = tally.rejected.total()
    if tally.lengths and num_rejected <= config.max_rejected_share * tally.num_records:
        return
    reasons = ", ".join(f"{reason} {count}" for reason, count in tally.rejected.most_common())
    raise InputError(
        f"{num_rejected} of {tally.num_records} records cannot be learnt from: {reasons or 'there is none'}",
        got="\n    ".join(tally.first_rejections.values()) or None,
        allowed=f"a share of {config.max_rejected_share} left out, and at least one record kept",
        do="correct the records, set too_long=truncate or a greater row_length, or raise max_rejected_share",
    )


def _count(tally: _Tally, num_rows: int, row_length: int) -> dict[str, int | float]:
    num_tokens = sum(tally.lengths)
    return {
        "num_rows": num_rows,
        "row_length": row_length,
        "num_documents": len(tally.lengths),
        "num_answers": tally.num_answers,
        "num_tokens": num_tokens,
        "num_learned_tokens": tally.num_learned_tokens,
        "padding_share": round(1 - num_tokens / (num_rows * row_length), 4),
        "num_rejected": tally.rejected.total(),
        "num_truncated": tally.num_truncated,
    }

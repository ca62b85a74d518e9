from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from chats import CHATML, CONVERSATIONS, HEADERS, TOKENS, turns
from fakes import tiny_tokenizer
from powerhouse.artifacts import Artifact
from powerhouse.chat import ChatTemplate
from powerhouse.corpora.conversations import ConversationsConfig, Encoded, Rejection, encode_conversations, encode_record
from powerhouse.corpora.shards import TokenRows
from powerhouse.errors import InputError
from powerhouse.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
CHATS = [CONVERSATIONS[name] for name in ("many turns", "system and answer", "unicode")]
PAIRS = [{"prompt": f"Call me {number}. ", "completion": "some" * number} for number in range(1, 6)]


def chat_tokenizer(source: str | None = CHATML) -> Tokenizer:
    core = tiny_tokenizer().core
    core.add_special_tokens(SPECIAL)
    return Tokenizer(core, {}, TOKENS, ChatTemplate(source, TOKENS) if source else None)


def write_records(path: Path, records: list[Any]) -> Path:
    text = "\n".join(item if isinstance(item, str) else json.dumps(item) for item in records)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def make_config(folder: Path, records: list[Any], **changes: Any) -> ConversationsConfig:
    chat_tokenizer().save(folder / "model")
    inputs = [write_records(folder / "records.jsonl", records)]
    values: dict[str, Any] = {"inputs": inputs, "tokenizer": folder / "model", "output": folder / "tokens", "row_length": 160}
    return ConversationsConfig.model_validate(values | changes)


def encode(record: Any, row_length: int = 1000, *, truncates: bool = False, source: str | None = CHATML) -> Any:
    return encode_record(json.dumps(record).encode(), chat_tokenizer(source), row_length, truncates=truncates)


@pytest.mark.parametrize("source", [CHATML, HEADERS])
def test_of_a_conversation_the_answers_with_their_ends_are_learned_and_nothing_else(source: str) -> None:
    tokenizer, messages = chat_tokenizer(source), turns("one", "two", "three", "four", system="Be brief.")
    messages.insert(3, {"role": "tool", "content": "found"})
    item = encode({"messages": messages}, source=source)

    end = "<|im_end|>" if source == CHATML else "<|eot_id|>"
    learned = [token_id for token_id, is_learned in zip(item.ids, item.is_learned, strict=True) if is_learned]
    assert item.ids == tokenizer.encode_chat(messages)
    assert tokenizer.core.decode(learned, skip_special_tokens=False) == f"two{end}four{end}"
    assert item.num_answers == 2


def test_of_a_pair_the_completion_and_its_end_are_learned() -> None:
    tokenizer = chat_tokenizer(None)
    prompt, completion = tokenizer.encode("Call me "), tokenizer.encode("Ishmael.")

    item = encode({"prompt": "Call me ", "completion": "Ishmael."}, source=None)
    assert item.ids == [*prompt, *completion, tokenizer.end_of_text_id]
    assert item.is_learned == [False] * len(prompt) + [True] * (len(completion) + 1)


def test_a_record_that_is_too_long_is_cut_at_the_rows_end_or_left_out() -> None:
    whole = encode(PAIRS[4])

    assert encode(PAIRS[4], len(whole.ids)) == whole
    assert encode(PAIRS[4], len(whole.ids) - 1) == Rejection("too_long", f"{len(whole.ids)} tokens")
    cut = encode(PAIRS[4], len(whole.ids) - 1, truncates=True)
    assert cut == Encoded(whole.ids[:-1], whole.is_learned[:-1], is_truncated=True)


@pytest.mark.parametrize(
    ("line", "reason", "detail"),
    [
        ("{", "not_json", "Expecting property name"),
        ("\ufffd", "not_json", "Expecting value"),
        ("[" * 100_000, "not_json", "recursion"),
        ("[]", "not_a_conversation", "a record is a JSON object\n  got: list"),
        (
            {"text": "a"},
            "not_a_conversation",
            "neither `messages`, a list, nor `prompt` and `completion`, two texts\n  got: text",
        ),
        ({"prompt": "a", "completion": None}, "not_a_conversation", "got: prompt, completion"),
        ({"messages": []}, "not_a_conversation", "an empty conversation"),
        ({"messages": ["a"]}, "not_a_conversation", "a message is a mapping of role, content and more\n  got: a"),
        ({"messages": [{"role": "user"}]}, "not_a_conversation", "the chat template refuses the conversation"),
        ({"messages": turns("a\ufdd4")}, "not_a_conversation", "noncharacter U+FDD4"),
        ({"messages": turns("only a question")}, "no_answer", "nothing in it is learnt"),
        ({"messages": turns("word " * 400, "b")}, "no_answer", "none in its first 300 tokens"),
    ],
)
def test_a_record_that_cannot_be_learned_from_tells_why(line: Any, reason: str, detail: str) -> None:
    text = line if isinstance(line, str) else json.dumps(line)
    item = encode_record(text.encode(), chat_tokenizer(), 300, truncates=True)

    assert isinstance(item, Rejection)
    assert item.reason == reason
    assert detail in item.detail


def test_half_a_character_in_an_escape_is_replaced() -> None:
    item = encode_record(b'{"prompt": "a", "completion": "\\ud83d!"}', chat_tokenizer(), 300, truncates=False)

    assert isinstance(item, Encoded)
    assert chat_tokenizer().decode(item.ids) == "a?!"


def test_rows_hold_each_record_whole_with_its_marks_and_know_which_it_is(tmp_path: Path) -> None:
    records: list[Any] = [*({"messages": chat} for chat in CHATS), *PAIRS, "", "no json", {"messages": turns("?")}]
    config = make_config(tmp_path, records, max_rejected_share=0.2)
    artifact = encode_conversations(config)

    kept = [encode(record) for record in [*({"messages": chat} for chat in CHATS), *PAIRS]]
    rows, tokenizer = TokenRows(artifact.path / "rows"), Tokenizer.load(artifact.path)
    everything = np.arange(len(rows))
    doc_ids = pq.read_table(artifact.path / "provenance.parquet")["doc_ids"].to_pylist()
    found: dict[int | None, Any] = {}
    for tokens, documents, learned, ids in zip(
        rows.take(everything), rows.take_documents(everything), rows.take_learned(everything), doc_ids, strict=True
    ):
        for number, doc_id in enumerate(ids):
            here = documents == number
            found[doc_id] = Encoded(tokens[here].tolist(), learned[here].tolist())
    padding = found.pop(None)
    assert set(padding.ids) == {tokenizer.end_of_text_id}
    assert not any(padding.is_learned)
    assert found == dict(enumerate(kept))
    assert tokenizer.digest == Tokenizer.load(tmp_path / "model").digest
    counts = artifact.manifest.counts
    assert (counts["num_documents"], counts["num_answers"], counts["num_rejected"]) == (8, 10, 2)
    assert counts["num_learned_tokens"] == sum(sum(item.is_learned) for item in kept)
    assert counts["padding_share"] == pytest.approx(1 - sum(len(item.ids) for item in kept) / (len(rows) * 160), abs=1e-4)
    rejects = [json.loads(line) for line in (artifact.path / "rejects.jsonl").read_text().splitlines()]
    assert [(reject["line"], reject["reason"]) for reject in rejects] == [(10, "not_json"), (11, "no_answer")]
    assert not (artifact.path / "work").exists()


def test_several_files_are_one_stream_of_records_and_may_be_compressed(tmp_path: Path) -> None:
    one = encode_conversations(make_config(tmp_path, PAIRS))
    parts = [write_records(tmp_path / "a.jsonl", PAIRS[:2]), write_records(tmp_path / "b.jsonl.gz", PAIRS[2:])]
    two = encode_conversations(make_config(tmp_path, [], inputs=parts, output=tmp_path / "two"))

    assert (one.path / "rows/rows-00000.arrow").read_bytes() == (two.path / "rows/rows-00000.arrow").read_bytes()


@pytest.mark.parametrize(
    ("records", "changes", "message"),
    [
        (
            [*PAIRS, "{", "["],
            {},
            r"(?s)2 of 7 records cannot be learnt from: not_json 2.*jsonl, line 6: Expecting.*share of 0\.1",
        ),
        (PAIRS, {"row_length": 8}, r"(?s)cannot be learnt from: too_long \d.*too_long=truncate or a greater row_length"),
        ([], {}, "0 of 0 records cannot be learnt from: there is none"),
        ([], {"inputs": ["nothing.jsonl"]}, r"nothing\.jsonl: no such file"),
    ],
)
def test_too_few_usable_records_are_one_error(tmp_path: Path, records: list[Any], changes: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        encode_conversations(make_config(tmp_path, records, **changes))
    assert not (tmp_path / "tokens" / "manifest.json").exists()


def test_a_damaged_compressed_file_is_named(tmp_path: Path) -> None:
    path = write_records(tmp_path / "cut.jsonl.gz", PAIRS)
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(InputError, match=r"cut\.jsonl\.gz: truncated or damaged"):
        encode_conversations(make_config(tmp_path, [], inputs=[path]))


@pytest.mark.slow
def test_the_number_of_processes_changes_nothing(tmp_path: Path) -> None:
    records = [*PAIRS, "no json", *({"messages": chat} for chat in CHATS)] * 20
    one = encode_conversations(make_config(tmp_path, records, max_rejected_share=0.2))
    two = encode_conversations(make_config(tmp_path, records, max_rejected_share=0.2, num_processes=2, output=tmp_path / "two"))

    assert one.manifest.digest == two.manifest.digest
    for name in ("rows/rows-00000.arrow", "rejects.jsonl", "report.json", "provenance.parquet"):
        assert (one.path / name).read_bytes() == (two.path / name).read_bytes()


@pytest.mark.slow
def test_the_job_tells_what_it_kept_and_where_it_lies(tmp_path: Path) -> None:
    config = make_config(tmp_path, PAIRS)
    overrides = [f"{key}={json.dumps(value)}" for key, value in config.model_dump(mode="json").items()]
    command = [sys.executable, str(ROOT / "jobs" / "encode_conversations.py"), *overrides]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "platform")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)

    assert done.returncode == 0, done.stderr
    assert "num_documents=5  num_answers=5" in done.stdout
    assert Artifact.open(tmp_path / "tokens", "tokens").manifest.counts["num_rejected"] == 0

"""Sources in a bucket, behind a server that speaks the protocol."""

from __future__ import annotations

from pathlib import Path

import pyarrow.fs
import pytest

from powerhouse.corpora import sources
from powerhouse.corpora.process import read_files
from powerhouse.corpora.sources import SourceConfig, list_files
from powerhouse.errors import InputError
from s3 import S3Server, refuse_all_keys
from tiny_corpus import write_inputs

pytestmark = pytest.mark.slow


def upload(folder: Path, uri: str) -> None:
    files, root = pyarrow.fs.FileSystem.from_uri(uri)
    for path in folder.rglob("*.*"):
        with files.open_output_stream(f"{root}/{path.relative_to(folder)}", compression=None) as file:
            file.write(path.read_bytes())


def source_at(place: Path | str) -> SourceConfig:
    return SourceConfig(name="s", kind="other", path=str(place))


def test_a_bucket_gives_the_documents_of_the_folder_that_was_put_there(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_inputs(tmp_path / "in", [])
    text = "".join(f"Line {number} of a table or of a text.\n" for number in range(20_000))
    (folder / "large.txt").write_text(text)
    (folder / "large.jsonl").write_text("".join(f'{{"text": "{line}"}}\n' for line in text.splitlines()))
    upload(folder, f"{s3.uri}/texts")
    monkeypatch.setattr(sources, "PIECE_BYTES", 300_000)
    here, there = list_files([source_at(folder)]), list_files([source_at(f"{s3.uri}/texts/")])

    assert [(file.relative, file.size_bytes, file.first, file.last) for file in there] == [
        (file.relative, file.size_bytes, file.first, file.last) for file in here
    ]
    assert len(there) > 7
    assert [table.to_pylist() for table in read_files(there, 1000)] == [table.to_pylist() for table in read_files(here, 1000)]


def test_a_changed_object_is_another_source(s3: S3Server, tmp_path: Path) -> None:
    upload(write_inputs(tmp_path / "in", []), s3.uri)
    before = sources.identify(source_at(s3.uri))
    assert sources.identify(source_at(s3.uri)) == before
    (tmp_path / "in" / "books" / "a.txt").write_text("Another.")
    upload(tmp_path / "in", s3.uri)
    assert sources.identify(source_at(s3.uri)) != before


def test_a_missing_bucket_a_missing_folder_and_a_refused_key_are_one_error_each(s3: S3Server, tmp_path: Path) -> None:
    upload(write_inputs(tmp_path / "in", ["web/1.html"]), s3.uri)
    for place, told in (
        (f"{s3.uri}x", "(?s)cannot be listed.*NO_SUCH_BUCKET"),
        (f"{s3.uri}/nowhere", "(?s)nowhere cannot be listed"),
    ):
        with pytest.raises(InputError, match=told):
            list_files([source_at(place)])
    files = list_files([source_at(s3.uri)])
    refuse_all_keys(s3.endpoint)
    try:
        with pytest.raises(InputError, match=r"(?s)cannot be listed.*ACCESS"):
            list_files([source_at(s3.uri)])
        (row,) = (row for table in read_files(files, 1000) for row in table.to_pylist())
        assert row["reason"] == "bad_file"
        assert "web/1.html: not there, or no right to read it" in row["detail"]
    finally:
        refuse_all_keys(s3.endpoint, refuses=False)


def test_a_lost_server_is_one_error(s3: S3Server, tmp_path: Path) -> None:
    upload(write_inputs(tmp_path / "in", ["books/b.txt.gz"]), s3.uri)
    files = list_files([source_at(s3.uri)])
    s3.kill()
    (row,) = (row for table in read_files(files, 1000) for row in table.to_pylist())
    assert row["reason"] == "bad_file"
    assert "b.txt.gz: not there, or no right to read it" in row["detail"]

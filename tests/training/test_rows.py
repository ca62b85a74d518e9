"""Rows that lie in an object store: a real server of its protocol on the loopback."""

from __future__ import annotations

import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.fs
import pytest
import torch

from powerhouse.corpora.shards import write_shard
from powerhouse.errors import ConfigError, InputError
from powerhouse.training.data import read_batches
from powerhouse.training.rows import check_rows, rows_folder
from s3 import S3Server
from tiny_run import ROW_LENGTH, make_config, write_tokens

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _own_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "disk"))


def put(folder: Path, uri: str) -> None:
    files, root = pyarrow.fs.FileSystem.from_uri(uri)
    pyarrow.fs.copy_files(str(folder), root, destination_filesystem=files)


@pytest.mark.slow
def test_rows_of_an_object_store_are_fetched_once_and_are_the_same_batches(s3: S3Server, tmp_path: Path) -> None:
    tokens = write_tokens(tmp_path / "tokens")
    put(tmp_path / "tokens" / "rows", f"{s3.uri}/rows")
    config = make_config(tmp_path, run={"rows": f"{s3.uri}/rows"})
    check_rows(config, tokens)
    with ThreadPoolExecutor(4) as pool:
        [folder] = set(pool.map(rows_folder, [config] * 4))
    [shard] = folder.glob("*.arrow")
    fetched = shard.stat().st_mtime_ns

    remote, local = read_batches(config, 2, 1, 2, CPU), read_batches(make_config(tmp_path), 2, 1, 2, CPU)
    for ours, expected in zip(remote, local, strict=True):
        assert all(torch.equal(ours[name], expected[name]) for name in expected)
    assert shard.stat().st_mtime_ns == fetched

    write_shard(tmp_path / "rows-00000.arrow", np.full((41, ROW_LENGTH), 7, dtype=np.int32))
    files, root = pyarrow.fs.FileSystem.from_uri(f"{s3.uri}/rows")
    pyarrow.fs.copy_files(str(tmp_path / "rows-00000.arrow"), f"{root}/rows-00000.arrow", destination_filesystem=files)
    assert (next(read_batches(config, 0, 0, 1, CPU))["inputs"] == 7).all(), "other rows under the same name"
    pyarrow.fs.copy_files(str(tmp_path / "rows-00000.arrow"), f"{root}/rows-00001.arrow", destination_filesystem=files)
    with pytest.raises(InputError, match=r"not the rows of .*tokens\n  got: 2 shards of \d+ bytes\n  allowed: 1 shards of"):
        check_rows(config, tokens)


@pytest.mark.slow
def test_a_store_that_cannot_be_read_is_named(s3: S3Server, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"s3://no-such-bucket/rows: the rows cannot be fetched"):
        rows_folder(make_config(tmp_path, run={"rows": "s3://no-such-bucket/rows"}))


def test_a_name_that_is_no_uri_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.rows: no store is known by this name\n  got: ftp://somewhere/rows"):
        rows_folder(make_config(tmp_path, run={"rows": "ftp://somewhere/rows"}))

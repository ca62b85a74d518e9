"""The server that stands for an object store in the tests behaves as one."""

from __future__ import annotations

import pyarrow.fs
import pytest

from s3 import S3Server, refuse_all_keys

pytestmark = pytest.mark.slow


def test_what_is_written_in_parts_is_read_back_and_listed(s3: S3Server) -> None:
    files, path = pyarrow.fs.FileSystem.from_uri(f"{s3.uri}/folder")
    content = bytes(range(256)) * 2**16  # 16 MiB: several parts
    with files.open_output_stream(f"{path}/a") as file:
        file.write(content)

    with files.open_input_file(f"{path}/a") as file:
        assert file.read() == content
    assert [item.path for item in files.get_file_info(pyarrow.fs.FileSelector(path))] == [f"{path}/a"]


def test_a_missing_bucket_and_a_refused_key_are_errors(s3: S3Server) -> None:
    files, path = pyarrow.fs.FileSystem.from_uri(f"{s3.uri}/a")
    with pytest.raises(OSError, match="NO_SUCH_BUCKET"):
        files.open_output_stream("no-such-bucket/a")

    refuse_all_keys(s3.endpoint)
    with pytest.raises(OSError, match="ACCESS_KEY"):
        files.open_output_stream(path)
    refuse_all_keys(s3.endpoint, refuses=False)

    files.open_output_stream(path).close()

"""Where the rows of a run are: in the tokens' folder, or in an object store, from which a machine fetches them once.

Every epoch takes the rows in an order of its own, so that a reader wants them all, and one at a time: they are mapped from a
disk of its machine. An object store is found by the usual AWS_* variables.
"""

from __future__ import annotations

import fcntl
import hashlib
import tempfile
from pathlib import Path

import pyarrow as pa
from pyarrow import fs

from powerhouse.errors import ConfigError, InputError
from powerhouse.training.config import TrainingConfig

ROWS = "rows"


def rows_folder(config: TrainingConfig) -> Path:
    """The folder of shards, on this machine or on a file system that it sees.

    Raises:
        ConfigError: no store is known by the name in `run.rows`.
        InputError: the store cannot be read, or has no shards there.
    """
    if config.run.rows is None:
        return config.tokens / ROWS
    return _fetch(config.run.rows)


def _fetch(uri: str) -> Path:
    """Copy the shards that are not here yet, in the size that they have there; the machine's processes wait for one another."""
    try:
        files, root = fs.FileSystem.from_uri(uri)
    except (pa.ArrowInvalid, OSError) as error:
        raise ConfigError(
            "run.rows: no store is known by this name", got=f"{uri} ({error})", allowed="s3://bucket/rows"
        ) from None
    try:
        shards = [item for item in files.get_file_info(fs.FileSelector(root)) if item.path.endswith(".arrow")]
        # Other shards under the same name are another folder: the store's times tell them apart.
        names = "".join(sorted(f"{item.base_name} {item.size} {item.mtime_ns}\n" for item in shards))
        folder = Path(tempfile.gettempdir()) / f"powerhouse-rows-{hashlib.sha256((uri + names).encode()).hexdigest()[:16]}"
        folder.mkdir(exist_ok=True)
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for item in shards:
                _copy(files, item, folder / item.base_name)
    except OSError as error:
        raise InputError(f"{uri}: the rows cannot be fetched", got=error, do="check run.rows and the AWS_* variables") from None
    return folder


def _copy(files: fs.FileSystem, item: fs.FileInfo, path: Path) -> None:
    if path.exists():
        return
    partial = path.with_suffix(".partial")
    fs.copy_files(item.path, str(partial), source_filesystem=files, destination_filesystem=fs.LocalFileSystem())
    partial.rename(path)

"""Where the rows of a run are: in the tokens' folder, or in an object store, from which a machine fetches them once.

Every epoch takes the rows in an order of its own, so that a reader wants them all, and one at a time: they are mapped from a
disk of its machine. An object store is found by the usual AWS_* variables.
"""

from __future__ import annotations

import fcntl
import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
from pyarrow import fs

from powerhouse.artifacts import Artifact
from powerhouse.errors import ConfigError, InputError
from powerhouse.training.config import TrainingConfig

ROWS = "rows"


def check_rows(config: TrainingConfig, tokens: Artifact) -> None:
    """Hold the shards of an object store against those of the tokens: their names and sizes.

    Raises:
        ConfigError, InputError: as `rows_folder`; or the shards are others.
    """
    if config.run.rows is None:
        return
    there = {f"{ROWS}/{item.base_name}": item.size for item in _list(config.run.rows)[1]}
    here = {name: size for name, size in tokens.manifest.files.items() if name.startswith(f"{ROWS}/")}
    if there != here:
        raise InputError(
            f"{config.run.rows}: not the rows of {config.tokens}",
            got=f"{len(there)} shards of {sum(there.values())} bytes",
            allowed=f"{len(here)} shards of {sum(here.values())} bytes",
            do="copy the tokens' rows/ there again",
        )


def rows_folder(config: TrainingConfig) -> Path:
    """The folder of shards, on this machine or on a file system that it sees; what is not here yet is fetched.

    Raises:
        ConfigError: no store is known by the name in `run.rows`.
        InputError: the store cannot be read.
    """
    uri = config.run.rows
    if uri is None:
        return config.tokens / ROWS
    files, shards = _list(uri)
    # Other shards under the same name are another folder: the store's times tell them apart.
    names = "".join(sorted(f"{item.base_name} {item.size} {item.mtime_ns}\n" for item in shards))
    folder = Path(tempfile.gettempdir()) / f"powerhouse-rows-{hashlib.sha256((uri + names).encode()).hexdigest()[:16]}"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock, _refused(uri):
        fcntl.flock(lock, fcntl.LOCK_EX)  # the machine's processes wait for one another
        for item in shards:
            _copy(files, item, folder / item.base_name)
    return folder


def _list(uri: str) -> tuple[fs.FileSystem, list[fs.FileInfo]]:
    try:
        files, root = fs.FileSystem.from_uri(uri)
    except (pa.ArrowInvalid, OSError) as error:
        what = "run.rows: no store is known by this name"
        raise ConfigError(what, got=f"{uri} ({error})", allowed="s3://bucket/rows") from None
    with _refused(uri):
        return files, [item for item in files.get_file_info(fs.FileSelector(root)) if item.path.endswith(".arrow")]


@contextmanager
def _refused(uri: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        do = "check run.rows and the AWS_* variables"
        raise InputError(f"{uri}: the rows cannot be fetched", got=error, do=do) from None


def _copy(files: fs.FileSystem, item: fs.FileInfo, path: Path) -> None:
    if path.exists():
        return
    partial = path.with_suffix(".partial")
    fs.copy_files(item.path, str(partial), source_filesystem=files, destination_filesystem=fs.LocalFileSystem())
    partial.rename(path)

"""A stage's output folder: its files, then `manifest.json` last.

The manifest names the inputs by hash, the settings, the counts and the files, so that from any model one can walk back to
the text. Same inputs and same settings: the stage is skipped. A folder without a manifest is unfinished work: it is resumed
or redone, never trusted. A folder that Powerhouse did not write is never touched.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

import powerhouse
from powerhouse.config import Config
from powerhouse.errors import ArtifactError

MANIFEST = "manifest.json"
UNFINISHED = "unfinished.json"

Counts = Mapping[str, int | float]

_is_checking: ContextVar[bool] = ContextVar("is_checking", default=False)


class NotDoneError(ArtifactError):
    """The artifact is not there, or is of other inputs or settings; raised only inside `checking()`."""


@contextlib.contextmanager
def checking() -> Iterator[None]:
    """Inside, `produce` does no work: it returns what is done already, or raises NotDoneError. Like `make --question`."""
    token = _is_checking.set(True)
    try:
        yield
    finally:
        _is_checking.reset(token)


class Manifest(Config):
    """What a finished folder says of itself."""

    kind: str
    """The stage that wrote it: texts, corpus, tokens, model, evaluation."""
    fingerprint: str
    """Hash of kind, settings and inputs: the same one means the same work."""
    inputs: dict[str, str]
    """Name of each input and the digest of its manifest."""
    settings: dict[str, Any]
    """The stage's config without its paths."""
    counts: dict[str, int | float]
    """Numbers of the result, for people and for the closing table."""
    files: dict[str, int]
    """Relative path and size in bytes of every file."""
    version: str
    """Package version that wrote it."""
    seconds: float
    """Wall time of the run that finished it."""

    @property
    def digest(self) -> str:
        """Identity of the content; how long it took is not part of it."""
        return _hash(self.model_dump(exclude={"seconds", "version"}))


@dataclass(frozen=True)
class Artifact:
    """A finished folder."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: Path, kind: str) -> Artifact:
        """Open a finished folder of that kind.

        Raises:
            ArtifactError: it is missing, unfinished, of another kind, or a file of it is missing or has changed size.
        """
        if not path.is_dir():
            raise ArtifactError(f"{path}: no such {kind} folder", do="run the stage that writes it first")
        manifest = _read_manifest(path)
        if manifest is None:
            raise ArtifactError(f"{path}: {kind} is unfinished (it has no {MANIFEST})", do="run its stage again")
        if manifest.kind != kind:
            raise ArtifactError(f"{path}: not a {kind} folder", got=manifest.kind, allowed=kind)
        if damaged := _damaged_file(path, manifest):
            raise ArtifactError(f"{path}: {damaged}", do="delete the folder and run its stage again")
        return cls(path, manifest)


def identify(path: Path, kind: str) -> Artifact | str:
    """The artifact that a folder is, or, for one that Powerhouse did not write, the hash of its files.

    Raises:
        ArtifactError: the folder is unfinished work, or an artifact of another kind.
    """
    if (path / MANIFEST).exists() or (path / UNFINISHED).exists():
        return Artifact.open(path, kind)
    digest = hashlib.sha256()
    for item in sorted(item for item in path.iterdir() if item.is_file()):
        with item.open("rb") as file:
            digest.update(f"{item.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def produce(
    path: Path,
    kind: str,
    settings: Mapping[str, Any],
    inputs: Mapping[str, Artifact | str],
    make: Callable[[Path], Counts],
    *,
    can_resume: bool = False,
) -> Artifact:
    """Return the artifact at `path`, calling `make(path)` only where it is not there already.

    `inputs` are artifacts, or a hash for data that Powerhouse did not write. With `can_resume`, unfinished files of the
    same work are left for `make` to go on from; else it always finds an empty folder.

    Raises:
        ArtifactError: the folder holds files that Powerhouse did not write.
    """
    digests = {name: item if isinstance(item, str) else item.manifest.digest for name, item in inputs.items()}
    plain = json.loads(json.dumps(dict(settings), default=str))
    fingerprint = _hash({"kind": kind, "settings": plain, "inputs": digests})
    done = _read_manifest(path)
    if done is not None and done.fingerprint == fingerprint and not _damaged_file(path, done):
        return Artifact(path, done)
    if _is_checking.get():
        raise NotDoneError(f"{path}: there is no {kind} of these inputs and settings", do="run the job without --check")
    _prepare(path, fingerprint, keep=can_resume and done is None)
    start = time.monotonic()
    counts = make(path)
    manifest = Manifest(
        kind=kind,
        fingerprint=fingerprint,
        inputs=digests,
        settings=plain,
        counts=dict(counts),
        files=_list_files(path),
        version=powerhouse.__version__,
        seconds=round(time.monotonic() - start, 3),
    )
    write_atomically(path / MANIFEST, manifest.model_dump_json(indent=1))
    (path / UNFINISHED).unlink()
    return Artifact(path, manifest)


def write_atomically(path: Path, text: str) -> None:
    """A reader sees the old file or the whole new one, also after a power cut."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a name to write a file under; without an error the file is then at `path`, whole, also after a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # two processes may write the same file at a time
    yield temporary
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def _prepare(path: Path, fingerprint: str, *, keep: bool) -> None:
    """Make the folder ready for work: marked as unfinished, and empty unless the same work is to be resumed."""
    path.mkdir(parents=True, exist_ok=True)
    marker = path / UNFINISHED
    is_ours = marker.exists() or (path / MANIFEST).exists()
    if not is_ours and any(path.iterdir()):
        raise ArtifactError(
            f"{path}: holds files that Powerhouse did not write", do="choose another output folder, or empty this one"
        )
    is_same_work = marker.exists() and marker.read_text(encoding="utf-8") == fingerprint
    # The marker stands before the manifest goes: a kill between the two leaves unfinished work, not a foreign folder.
    write_atomically(marker, fingerprint)
    (path / MANIFEST).unlink(missing_ok=True)
    is_kept = keep and is_same_work
    for item in path.glob(".*.tmp" if is_kept else "*"):  # a kill may leave half a file under the name that `replacing` gave
        if item != marker:
            shutil.rmtree(item) if item.is_dir() else item.unlink()


def _read_manifest(path: Path) -> Manifest | None:
    try:
        return Manifest.model_validate_json((path / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValidationError, UnicodeDecodeError) as error:
        raise ArtifactError(
            f"{path / MANIFEST}: damaged",
            got=str(error).splitlines()[0],
            do="delete the folder and run its stage again",
        ) from None


def _list_files(path: Path) -> dict[str, int]:
    files = (item for item in sorted(path.rglob("*")) if item.is_file() and item.name not in (MANIFEST, UNFINISHED))
    return {str(item.relative_to(path)): item.stat().st_size for item in files}


def _damaged_file(path: Path, manifest: Manifest) -> str | None:
    """Say which file of the manifest is gone or has another size, if any."""
    for name, size in manifest.files.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if (found := (path / name).stat().st_size) != size:
            return f"{name} has {found} bytes; its manifest says {size}"
    return None


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()

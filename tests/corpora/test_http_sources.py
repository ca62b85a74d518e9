"""Sources behind a web server: a page of links is a folder, and some servers give no part of a file."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from powerhouse.corpora import sources
from powerhouse.corpora.process import read_files
from powerhouse.corpora.sources import InputFile, SourceConfig, list_files
from powerhouse.errors import InputError
from raw_files import parquet
from tiny_corpus import write_inputs


class Folder(http.server.SimpleHTTPRequestHandler):
    """The standard library's server; as `Parts` one that gives parts of files, as most do."""

    def log_message(self, *_: object) -> None:
        pass


class Parts(Folder):
    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if "private" in self.path:
            self.send_error(403)
        elif path.is_dir() or "Range" not in self.headers:
            super().do_GET()
        else:
            first, last = (int(number) for number in self.headers["Range"].removeprefix("bytes=").split("-"))
            content = path.read_bytes()
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
            self.end_headers()
            self.wfile.write(content[first : last + 1])

    def end_headers(self) -> None:
        self.send_header("Accept-Ranges", "bytes")
        super().end_headers()


def serve(handler: Any, folder: Path) -> http.server.ThreadingHTTPServer:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


@pytest.fixture(params=[Parts, Folder])
def server(request: pytest.FixtureRequest, folder: Path) -> Iterator[http.server.ThreadingHTTPServer]:
    with serve(request.param, folder.parent) as server:
        yield server
        server.shutdown()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = write_inputs(tmp_path / "in", [])
    lines = [f"Line {number} of a table or of a text.\n" for number in range(3000)]
    (folder / "large.txt").write_text("".join(lines))
    (folder / "large.jsonl").write_text("".join(f'{{"text": "{line.strip()}"}}\n' for line in lines))
    return folder


def source_at(place: Path | str) -> SourceConfig:
    return SourceConfig(name="s", kind="other", path=str(place))


def address(server: http.server.ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{server.server_port}/in"


def documents(files: list[InputFile]) -> dict[int, Any]:
    rows = [row for table in read_files(files, 1000) for row in table.to_pylist()]
    return {row["doc_id"]: {name: row[name] for name in ("path", "offset", "content", "reason")} for row in rows}


def test_a_web_server_gives_the_documents_of_the_folder_that_it_shows(
    server: http.server.ThreadingHTTPServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "PIECE_BYTES", 50_000)
    here, there = list_files([source_at(folder)]), list_files([source_at(address(server))])
    gives_parts = server.RequestHandlerClass.func is Parts  # type: ignore[attr-defined]
    assert {file.relative for file in there} == {file.relative for file in here}
    assert sum(file.size_bytes for file in there) > 0
    assert (len(there) == len(here)) == gives_parts, "a large file is read in pieces where it can be"
    assert documents(there) == documents(here)


def test_a_changed_file_is_another_source(server: http.server.ThreadingHTTPServer, folder: Path) -> None:
    before = sources.identify(source_at(address(server)))
    assert sources.identify(source_at(address(server))) == before
    (folder / "large.txt").write_text("Another.")
    assert sources.identify(source_at(address(server))) != before


def test_what_cannot_be_had_is_one_error_or_a_bad_file(folder: Path) -> None:
    for name in ("private.txt", "lost.txt"):
        (folder / "web" / name).write_text("Some words.")
    with serve(Parts, folder.parent) as server:
        with pytest.raises(InputError, match=r"(?s)nowhere cannot be listed.*FileNotFoundError"):
            list_files([source_at(f"{address(server)}/nowhere")])
        files = list_files([source_at(f"{address(server)}/web")])
        (folder / "web" / "lost.txt").unlink()
        rows = [row for table in read_files(files, 1000) for row in table.to_pylist()]
        told = {row["path"]: row["detail"] for row in rows if row["reason"] == "bad_file"}
        server.shutdown()
    assert told.keys() == {"private.txt", "lost.txt"}
    assert all("not there, or no right to read it" in detail for detail in told.values())
    rows = [row for table in read_files(files, 1000) for row in table.to_pylist()]
    assert {row["reason"] for row in rows} == {"bad_file"}, "the server is gone"
    with pytest.raises(InputError, match="cannot be listed"):
        list_files([source_at(address(server))])


def test_a_kind_of_file_that_is_not_read_from_its_beginning_tells_that_the_server_gives_no_parts(folder: Path) -> None:
    (folder / "web" / "a.parquet").write_bytes(parquet(["one"]))
    with serve(Folder, folder.parent) as server:
        files = list_files([source_at(f"{address(server)}/web")])
        rows = [row for table in read_files(files, 1000) for row in table.to_pylist()]
        server.shutdown()
    (told,) = (row["detail"] for row in rows if row["path"] == "a.parquet")
    assert "truncated or damaged" in told
    assert "not seekable" in told

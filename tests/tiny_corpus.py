"""A corpus small enough for a test: its raw files, its settings, and a Ray to make it on."""

from __future__ import annotations

import bz2
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from powerhouse.corpora.filters import QualityConfig
from powerhouse.corpora.pipeline import CurateConfig

ROOT = Path(__file__).parents[1]
LOOSE = {name: 100 for name in QualityConfig.model_fields if name.startswith("max_") and "gram" in name} | {
    f"max_repeated_{length}gram_char_share": 1 for length in range(5, 11)
}
"""The sentences of these tests repeat themselves."""
NOUNS = [
    "garden",
    "river",
    "captain",
    "letter",
    "window",
    "mountain",
    "servant",
    "lantern",
    "horse",
    "daughter",
    "kingdom",
    "storm",
]
VERBS = ["watched", "followed", "remembered", "crossed", "painted", "carried", "opened", "forgot"]


def prose(seed: int, num_sentences: int) -> str:
    """English sentences, a blank line after every fourth."""
    rng = np.random.default_rng(seed)
    out = []
    for number in range(num_sentences):
        one, other, third = rng.choice(NOUNS, 3, replace=False)
        text = (
            f"The {one} of year {rng.integers(1500, 1900)} {rng.choice(VERBS)} the {other}, and it was with the {third} that "
        )
        out.append(text + f"they had to be.{chr(10) * 2 if number % 4 == 3 else ' '}")
    return "".join(out)


def write_inputs(folder: Path, names: list[str]) -> Path:
    """Write a book in two editions, web pages and a Wikipedia dump, in the order of the names."""
    book = prose(1, 600)
    page = "<html><body><main><h1>A page</h1><p>{}</p></main></body></html>"
    pages = "".join(
        f"<page><title>T{number}</title><ns>0</ns><id>{number}</id>"
        f"<revision><text>'''T''' {prose(50 + number, 30)}</text></revision></page>" for number in range(1, 20)
    )  # fmt: skip
    contents = {
        "books/a.txt": book.encode(),
        "books/b.txt.gz": gzip.compress(("A preface by a friend.\n\n" + book).encode(), mtime=0),
        "web/1.html": page.format(prose(2, 40) + " Write to ada@example.com.").encode(),
        "web/2.html": page.format("too short").encode(),
        "wiki/w.xml.bz2": bz2.compress(f"<mediawiki>{pages}</mediawiki>".encode()),
    }
    for name in names or list(contents):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(contents[name])
    return folder


def curate_config(folder: Path, output: Path, **changes: object) -> CurateConfig:
    inputs = [
        {"name": "books", "kind": "book", "path": folder / "books"},
        {"name": "web", "kind": "web", "path": folder / "web"},
        {"name": "wikipedia", "kind": "wikipedia", "path": folder / "wiki"},
    ]
    values: dict[str, object] = {
        "inputs": inputs, "output": output, "chunk_chars": 1500, "heldout_share": 0.2, "num_documents_per_file": 40,
        "quality": LOOSE, "workers": {"num": 1, "num_cpus": 1},
    }  # fmt: skip
    return CurateConfig.model_validate(values | changes)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the manifest, which tells the time taken; of that, the identity."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    manifest = json.loads(files.pop("manifest.json"))
    return files | {"fingerprint": manifest["fingerprint"].encode()}


def read_split(corpus: Path, split: str) -> pa.Table:
    return pa.concat_tables([pq.read_table(path) for path in sorted((corpus / split).glob("*.parquet"))])


def start_job(
    script: str, *overrides: str, storage: Path, address: str = "local", temporary: str = "/tmp"
) -> subprocess.Popen[str]:
    """Start a job as a user does: a process of its own, with a Ray of its own unless it is given another's address."""
    environment = os.environ | {
        "POWERHOUSE_STORAGE": str(storage), "RAY_ADDRESS": address, "RAY_TMPDIR": temporary,
        "PYTHONPATH": str(ROOT / "platform"),
    }  # fmt: skip
    command = [sys.executable, str(ROOT / "jobs" / script), *overrides]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def job_overrides(config: CurateConfig) -> list[str]:
    values = config.model_dump(mode="json", exclude_unset=True)
    keys = ("inputs", "output", "chunk_chars", "heldout_share", "num_documents_per_file", "quality")
    return [f"{key}={json.dumps(values[key])}" for key in keys]

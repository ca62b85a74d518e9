from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fakes import write_tiny_model
from gguf_files import tiny_model, write_gguf
from powerhouse.artifacts import Artifact, produce
from powerhouse.config import parse_command_line
from powerhouse.errors import ArtifactError, ConfigError, InputError
from powerhouse.models.catalog import CATALOG
from powerhouse.models.fetch import FetchModelConfig, fetch_model


def fetch(name: object, output: Path) -> Artifact:
    return fetch_model(FetchModelConfig(name=str(name), output=output))


def test_a_gguf_file_becomes_a_directory_that_transformers_loads(tmp_path: Path) -> None:
    model = tiny_model("llama")
    path = write_gguf(tmp_path / "some.gguf", model)
    artifact = fetch(path, tmp_path / "out")

    again, report = AutoModelForCausalLM.from_pretrained(artifact.path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ids_BT = torch.arange(12)[None]
    assert torch.equal(again.eval()(ids_BT).logits, model(ids_BT).logits)
    assert again.generation_config.eos_token_id == 0
    assert AutoTokenizer.from_pretrained(artifact.path).eos_token == "<|endoftext|>"
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    assert artifact.manifest.counts == {"num_tensors": 21, "num_parameters": num_parameters}


@pytest.mark.parametrize("address", ["{}", "file://{}", "memory:/{}"])
def test_a_directory_is_copied_from_a_path_or_a_uri_without_its_pickles(tmp_path: Path, address: str) -> None:
    source = write_tiny_model(tmp_path / "source")
    (source / "pytorch_model.bin").write_bytes(b"never opened")
    (source / "chat_template.jinja").write_text("{{ 1 }}")
    fsspec.filesystem("memory").put(str(source), str(source), recursive=True)
    artifact = fetch(address.format(source), tmp_path / "out")

    wanted = {path.name: path.read_bytes() for path in source.iterdir() if path.suffix != ".bin"}
    assert {path.name: path.read_bytes() for path in artifact.path.iterdir() if path.name != "manifest.json"} == wanted
    AutoModelForCausalLM.from_pretrained(artifact.path)


def test_a_gguf_file_at_a_uri_is_converted(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny_model("qwen2"))
    fsspec.filesystem("memory").put(str(path), "/bucket/m.gguf")

    near, far = fetch(path, tmp_path / "near"), fetch("memory://bucket/m.gguf", tmp_path / "far")
    assert near.manifest.files == far.manifest.files
    state = load_file(near.path / "model.safetensors")
    assert all(torch.equal(tensor, state[name]) for name, tensor in load_file(far.path / "model.safetensors").items())


def test_the_same_model_is_not_made_again_and_a_changed_one_is(tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "source")
    first = fetch(source, tmp_path / "out")
    assert fetch(source, tmp_path / "out") == first
    write_tiny_model(source, seed=1)
    assert fetch(source, tmp_path / "out").manifest.fingerprint != first.manifest.fingerprint


def test_a_model_of_our_own_is_named_as_the_input(tmp_path: Path) -> None:
    def make(folder: Path) -> dict[str, int]:
        write_tiny_model(folder)
        return {}

    trained = produce(tmp_path / "trained", "model", {}, {}, make)
    copied = fetch(tmp_path / "trained", tmp_path / "out")
    assert copied.manifest.inputs == {"source": trained.manifest.digest}
    (tmp_path / "trained" / "manifest.json").rename(tmp_path / "trained" / "unfinished.json")
    with pytest.raises(ArtifactError, match="unfinished"):
        fetch(tmp_path / "trained", tmp_path / "other")


def test_a_bare_word_is_the_name_and_the_output_has_a_default(tmp_path: Path) -> None:
    config = parse_command_line(FetchModelConfig, ["minilm-l6"], "")
    assert (config.name, config.folder) == ("minilm-l6", tmp_path / "models" / "minilm-l6")
    assert parse_command_line(FetchModelConfig, ["s3://b/llama.gguf", "output=x"], "").folder == tmp_path / "x"
    assert parse_command_line(FetchModelConfig, ["s3://b/llama.gguf"], "").folder == tmp_path / "models" / "llama"
    with pytest.raises(ConfigError, match="name: missing"):
        parse_command_line(FetchModelConfig, [], "")


def test_the_job_names_the_whole_catalog() -> None:
    job = Path(__file__).parents[2] / "jobs" / "fetch_model.py"
    assert f"Names of the catalog: {', '.join(CATALOG)}." in job.read_text(encoding="utf-8")


def only_a_pickle(source: Path) -> None:
    (source / "model.safetensors").rename(source / "pytorch_model.bin")


def truncated(source: Path) -> None:
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def a_missing_shard(source: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))


def damaged(name: str) -> Callable[[Path], None]:
    return lambda source: (source / name).write_text("{") and None


BAD: list[tuple[Callable[[Path], None], str]] = [
    (
        shutil.rmtree,
        r"no such model\n  got: nothing at /.*source\n  allowed: minilm-l6, smollm2-135m-instruct, t5-small-titles, or",
    ),
    (only_a_pickle, r"no safetensors\n  got: pytorch_model.bin \(a pickle can run code when it is opened\)"),
    (truncated, "model.safetensors: damaged or truncated"),
    (a_missing_shard, "model-00002-of-00002.safetensors: missing, though the index names it"),
    (damaged("model.safetensors.index.json"), "model.safetensors.index.json: damaged"),
    (damaged("config.json"), "config.json: damaged"),
    (lambda source: (source / "config.json").unlink(), "config.json: missing"),
]


@pytest.mark.parametrize(("damage", "message"), BAD)
def test_a_bad_model_is_refused(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    source = write_tiny_model(tmp_path / "source")
    damage(source)
    with pytest.raises(InputError, match=message):
        fetch(source, tmp_path / "out")


UNREACHED = "s3://b/x?endpoint_override=127.0.0.1:9&scheme=http&region=us-east-1"
ADDRESSES = ["nosuchscheme://x/y", "file://host/x", pytest.param(UNREACHED, marks=pytest.mark.slow)]


@pytest.mark.parametrize("address", ADDRESSES)
def test_a_uri_that_cannot_be_read_is_refused(tmp_path: Path, address: str) -> None:
    with pytest.raises(InputError, match=f"{re.escape(address)}: cannot be read"):
        fetch(address, tmp_path / "out")

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ray import serve
from ray.serve.exceptions import RayServeException

from fakes import write_tiny_adapter, write_tiny_model
from powerhouse.models.adapters import LoRAConfig
from powerhouse.serving.app import build


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "model")


def args(model: Path, **changes: Any) -> dict[str, Any]:
    return {"model": str(model), "model_name": "demo"} | changes


def test_an_application_is_built_without_a_cluster(model: Path) -> None:
    assert isinstance(build(args(model)), serve.Application)


def test_a_relative_model_lies_under_the_storage_root(model: Path) -> None:
    assert isinstance(build(args(Path("model"))), serve.Application)


def test_a_mistake_in_the_args_names_itself(model: Path) -> None:
    with pytest.raises(
        RayServeException, match=r"^ConfigError: args of the Serve application: engine\.num_stages: got 0; allowed:"
    ):
        build(args(model, engine={"num_stages": 0}))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("config.json", None, "config.json: missing"),
        ("config.json", b"{", "config.json: damaged"),
        ("model.safetensors", None, "no model.safetensors"),
        ("model.safetensors", b"", "model.safetensors: damaged or truncated"),
        ("tokenizer.json", None, "tokenizer.json: missing"),
        ("tokenizer.json", b"{", "tokenizer.json: damaged"),
    ],
)
def test_a_damaged_model_is_refused_before_anything_starts(model: Path, name: str, damage: bytes | None, message: str) -> None:
    (model / name).unlink() if damage is None else (model / name).write_bytes(damage)
    with pytest.raises(RayServeException, match=rf"^ModelFormatError: .*{message}"):
        build(args(model))


def test_a_damaged_adapter_and_one_of_another_model_are_refused_before_anything_starts(model: Path, tmp_path: Path) -> None:
    def build_with_adapter() -> None:
        build(args(model, engine={"adapters": {"formal": str(tmp_path / "formal")}}))

    with pytest.raises(RayServeException, match=r"^ModelFormatError: .*adapter_config\.json: missing"):
        build_with_adapter()
    write_tiny_adapter(tmp_path / "formal", model, LoRAConfig(rank=2))
    build_with_adapter()
    write_tiny_model(model, hidden_size=40)
    with pytest.raises(RayServeException, match=r"^ModelFormatError: .*formal: "):
        build_with_adapter()


def test_a_truncated_weight_file_and_one_of_another_shape_are_refused(model: Path, tmp_path: Path) -> None:
    weights = model / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    with pytest.raises(RayServeException, match=r"^ModelFormatError: .*damaged or truncated"):
        build(args(model))
    weights.write_bytes((write_tiny_model(tmp_path / "wider", hidden_size=40) / "model.safetensors").read_bytes())
    with pytest.raises(RayServeException, match=r"^ModelFormatError: .*has the wrong shape"):
        build(args(model))


def test_a_missing_model_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RayServeException, match=r"^ModelFormatError: .*no such model directory"):
        build(args(tmp_path / "nowhere"))

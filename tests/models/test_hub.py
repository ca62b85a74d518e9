from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fakes import tiny_config, tiny_decoder, write_tiny_model
from powerhouse.errors import ModelFormatError
from powerhouse.models import weights
from powerhouse.models.hub import load_decoder, read_config, save_model


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "model")


def shard_weights(directory: Path) -> None:
    """Rewrite the weights as two shards and an index, as big models have them."""
    tensors = load_file(directory / "model.safetensors")
    weight_map = {name: f"model-{1 + index % 2:05d}-of-00002.safetensors" for index, name in enumerate(sorted(tensors))}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / "model.safetensors").unlink()


def set_config(**changes: object) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def change_tensor(name: str, tensor: torch.Tensor | None) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        tensors = load_file(directory / "model.safetensors")
        tensors.pop(name)
        save_file(tensors if tensor is None else tensors | {name: tensor}, directory / "model.safetensors")

    return change


def truncate(name: str) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        path = directory / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return change


def lose_a_shard(directory: Path) -> None:
    shard_weights(directory)
    (directory / "model-00002-of-00002.safetensors").unlink()


def keep_only_a_pickle(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def remove(name: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).unlink()


def write(name: str, text: str) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        (directory / name).write_text(text)

    return change


@pytest.mark.parametrize("is_tied", [True, False])
def test_what_is_saved_is_what_is_loaded(tmp_path: Path, is_tied: bool) -> None:
    model = tiny_decoder(seed=1, tie_word_embeddings=is_tied)
    save_model(tmp_path, model.config, model.state_dict())

    loaded = load_decoder(tmp_path)

    assert loaded.config == model.config
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, atol=0, rtol=0)
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) is not is_tied


def test_a_directory_in_shards_is_the_same_model(directory: Path) -> None:
    ids_BT, positions = torch.arange(10)[None], torch.arange(10)
    expected = load_decoder(directory)(ids_BT, positions)
    shard_weights(directory)

    torch.testing.assert_close(load_decoder(directory)(ids_BT, positions), expected, atol=0, rtol=0)


def test_weights_are_loaded_in_the_type_asked_for(directory: Path) -> None:
    assert {parameter.dtype for parameter in load_decoder(directory, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


def test_weights_in_their_stored_type_are_the_mapped_file_and_others_a_copy(directory: Path) -> None:
    def is_mapped() -> bool:
        return str(directory / "model.safetensors") in Path("/proc/self/maps").read_text()

    stored = load_decoder(directory)
    assert is_mapped()
    expected = {name: tensor.bfloat16() for name, tensor in stored.state_dict().items()}
    del stored
    assert not is_mapped()
    converted = load_decoder(directory, dtype=torch.bfloat16)
    assert not is_mapped()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in converted.state_dict().items())


def test_a_tensor_larger_than_a_piece_is_converted_whole(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_BUFFER_BYTES", 48)
    expected = load_decoder(directory).state_dict()

    for name, tensor in load_decoder(directory, dtype=torch.float64).state_dict().items():
        torch.testing.assert_close(tensor, expected[name].double(), atol=0, rtol=0)


def test_a_config_of_older_transformers_is_understood(tmp_path: Path) -> None:
    directory = write_tiny_model(tmp_path / "model", num_key_value_heads=4)
    path = directory / "config.json"
    values = json.loads(path.read_text())
    for name in ("head_dim", "num_key_value_heads", "rope_parameters"):
        values.pop(name)
    path.write_text(json.dumps(values | {"rope_theta": 1234.0, "rope_scaling": None}))

    assert read_config(directory) == tiny_config(num_key_value_heads=4, rope_theta=1234.0)


BAD_DIRECTORIES: list[tuple[str, Callable[[Path], None], str]] = [
    ("no config", remove("config.json"), r"config\.json: missing"),
    ("config not JSON", write("config.json", "{"), r"config\.json: damaged"),
    ("config not an object", write("config.json", "[]"), "allowed: a JSON object"),
    (
        "unknown architecture",
        set_config(model_type="mamba"),
        r"unknown architecture\n  got: mamba\n  allowed: bert, llama, marian",
    ),
    ("rope scaling", set_config(rope_scaling={"rope_type": "yarn", "factor": 4.0}), r"rope scaling\n  got: yarn"),
    ("rope of the new kind", set_config(rope_parameters={"rope_type": "longrope"}), r"rope scaling\n  got: longrope"),
    ("biases that are not there", set_config(attention_bias=True), r"self_attn\.q_proj\.bias is missing"),
    ("a tensor too many", set_config(num_hidden_layers=3), r"tensor model\.layers\.3\.\S+ has no place in a DecoderConfig"),
    ("another activation", set_config(hidden_act="gelu"), r"hidden_act is not supported\n  got: gelu"),
    ("heads do not divide", set_config(num_key_value_heads=3), "not 4 and 3"),
    ("config lacks a size", set_config(intermediate_size=None), "intermediate_size: missing"),
    ("no weights", remove("model.safetensors"), r"no model\.safetensors"),
    ("only a pickle", keep_only_a_pickle, r"pytorch_model\.bin \(a pickle can run code when it is opened\)"),
    ("cut weights", truncate("model.safetensors"), "damaged or truncated"),
    ("weights are text", write("model.safetensors", "hello"), "damaged or truncated"),
    ("missing tensor", change_tensor("model.norm.weight", None), r"tensor model\.norm\.weight is missing"),
    ("wrong shape", change_tensor("model.norm.weight", torch.ones(31)), r"wrong shape\n  got: \(31,\)\n  allowed: \(32,\)"),
    ("missing shard", lose_a_shard, "missing, though the index names it"),
    ("more layers than weights", set_config(num_hidden_layers=5), r"model\.layers\.4\.\S+ is missing"),
]


@pytest.mark.parametrize(
    ("damage", "message"), [case[1:] for case in BAD_DIRECTORIES], ids=[case[0] for case in BAD_DIRECTORIES]
)
def test_a_damaged_directory_is_one_clear_error(directory: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(directory)

    with pytest.raises(ModelFormatError, match=message):
        load_decoder(directory)


def test_a_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match="nowhere: no such model directory"):
        load_decoder(tmp_path / "nowhere")

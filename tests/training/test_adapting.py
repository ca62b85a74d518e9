"""Adapters in the one loop: two ranks as one, resumed as never stopped, the base untouched; what a run begins with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from torch.distributed.checkpoint import FileSystemReader

from distributed import run_on_ranks
from fakes import TEXTS, tiny_decoder, tiny_tokenizer, write_tiny_model
from powerhouse.artifacts import Artifact
from powerhouse.config import load, validate
from powerhouse.corpora.shards import TokenRows
from powerhouse.errors import ConfigError
from powerhouse.models.adapters import AdapterConfig, LoRAConfig, PromptConfig, adapter_parameters, add_adapter, soft_prompt_of
from powerhouse.models.hub import load_decoder, load_model
from powerhouse.training.adapting import first_prompt, first_tensors, insert_prompt
from powerhouse.training.config import TrainingConfig, check, read_shape
from powerhouse.training.empty import empty_model
from powerhouse.training.methods import method_of
from powerhouse.training.plan import PlanConfig, make_plan
from tiny_run import losses, make_config, run_loop, write_tokens

LORA = {"kind": "lora", "rank": 2, "dropout": 0.3, "merges": True}
PROMPT = {"kind": "prompt", "num_tokens": 3}
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tokens(tmp_path / "tokens")
    write_tiny_model(tmp_path / "base", num_hidden_layers=2)
    return tmp_path


def config_of(folder: Path, adapter: dict[str, Any], name: str = "adapter", **changes: Any) -> TrainingConfig:
    values = {"model": None, "start_from": folder / "base", "output": folder / name, "adapter": adapter, **changes}
    return read_shape(make_config(folder, **values))


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [LORA, PROMPT], ids=["lora", "prompt"])
def test_two_ranks_train_an_adapter_as_one_does_and_a_stopped_run_ends_with_the_same_bits(
    folder: Path, adapter: dict[str, Any]
) -> None:
    alone, joined, stopped = (config_of(folder, adapter, name) for name in ("alone", "joined", "stopped"))
    base = (folder / "base" / "model.safetensors").read_bytes()

    run_on_ranks(1, run_loop, alone)
    run_on_ranks(2, run_loop, joined)
    assert run_on_ranks(2, run_loop, stopped, 5) == ["StopIteration: "] * 2
    assert run_on_ranks(2, run_loop, stopped) == [None, None]

    assert len(losses(alone)) == 6
    assert losses(alone)[-1] < losses(alone)[0]
    assert losses(joined) == pytest.approx(losses(alone), abs=1e-5)
    assert losses(stopped) == losses(joined)
    assert trained(stopped, exactly=trained(joined))
    for name, tensor in trained(alone).items():
        torch.testing.assert_close(trained(joined)[name], tensor, atol=1e-4, rtol=1e-3)
    assert (folder / "base" / "model.safetensors").read_bytes() == base
    saved = FileSystemReader(Path(joined.checkpoints) / "step_00000006").read_metadata().state_dict_metadata
    assert {name.removeprefix("model.") for name in saved if name.startswith("model.")} == trained(joined).keys()


def trained(config: TrainingConfig, exactly: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    model = load_model(folder_of(config), adapter=config.output)
    tensors = {name: parameter.data for name, parameter in adapter_parameters(model).items()}
    assert exactly is None or all(torch.equal(tensors[name], tensor) for name, tensor in exactly.items())
    return tensors


def folder_of(config: TrainingConfig) -> Path:
    assert config.start_from is not None
    return config.start_from


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [LORA, PROMPT], ids=["lora", "prompt"])
def test_peft_loads_what_was_trained_and_transformers_the_merged_model(folder: Path, adapter: dict[str, Any]) -> None:
    config = config_of(folder, adapter)
    run_on_ranks(1, run_loop, config)
    ids_BT = torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(0))
    ours = load_model(folder / "base", adapter=config.output)
    prompted_BT = torch.cat([torch.tensor(soft_prompt_of(ours), dtype=torch.long).expand(2, -1), ids_BT], dim=1)
    logits = ours(prompted_BT, torch.arange(prompted_BT.shape[1]))[:, -16:]

    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    assert not torch.allclose(base(ids_BT).logits, logits, atol=0.1)
    theirs = peft.PeftModel.from_pretrained(base, config.output)
    torch.testing.assert_close(
        theirs(ids_BT, attention_mask=torch.ones_like(ids_BT)).logits[:, -16:], logits, atol=1e-5, rtol=1e-5
    )
    if adapter is LORA:
        merged = transformers.AutoModelForCausalLM.from_pretrained(config.output / "merged", dtype=torch.float32)
        torch.testing.assert_close(merged(ids_BT).logits, logits, atol=1e-4, rtol=1e-4)
        assert transformers.AutoTokenizer.from_pretrained(config.output / "merged").vocab_size == 300


def test_a_soft_prompt_begins_as_common_tokens_of_the_rows_or_as_a_text_and_the_seed_decides(folder: Path) -> None:
    tokenizer, rows = tiny_tokenizer(), folder / "tokens" / "rows"
    counts = np.bincount(TokenRows(rows).take(np.arange(40)).ravel(), minlength=300)
    commonest = set(np.argsort(-counts, kind="stable")[:10])

    def draw(seed: int, **settings: Any) -> list[int]:
        return first_prompt(PromptConfig(**settings), folder / "tokens", rows, seed)

    drawn = draw(0, num_tokens=8, num_common=10)
    assert len(set(drawn)) == 8
    assert set(drawn) <= commonest
    assert drawn != draw(1, num_tokens=8, num_common=10)
    text = tokenizer.encode(TEXTS[1][:12])
    assert draw(0, num_tokens=2, text=TEXTS[1][:12]) == text[:2]
    assert draw(0, num_tokens=2 * len(text) + 1, text=TEXTS[1][:12]) == [*text, *text, text[0]]

    config = config_of(folder, {"kind": "prompt", "num_tokens": 2, "text": TEXTS[1][:12]})
    [prompt_KC] = first_tensors(config, empty_model(config)).values()
    assert torch.equal(prompt_KC, load_decoder(folder / "base").model.embed_tokens.weight[text[:2]])


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (
            {"inputs": [[1, 2, 3]], "labels": [[2, 3, 4]]},
            {"inputs": [[90, 91, 1, 2, 3]], "labels": [[-100, -100, 2, 3, 4]]},
        ),
        (
            {"sources": [[1, 2]], "inputs": [[0, 5]], "labels": [[5, 1]]},
            {"sources": [[90, 91, 1, 2]], "inputs": [[0, 5]], "labels": [[5, 1]]},
        ),
        (
            {"inputs": [[1, 2, 3], [4, 5, 6]], "labels": [[2, -100, 4], [5, 6, 7]], "documents": [[0, 0, 1], [0, 0, 0]]},
            {
                "inputs": [[90, 91, 1, 2, 90, 91, 3], [90, 91, 4, 5, 6, 0, 0]],
                "labels": [[-100, -100, 2, -100, -100, -100, 4], [-100, -100, 5, 6, 7, -100, -100]],
                "documents": [[0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 2, 2]],
            },
        ),
    ],
)
def test_a_soft_prompt_stands_before_every_document_that_is_read(
    batch: dict[str, list[list[int]]], expected: dict[str, list[list[int]]]
) -> None:
    changed = insert_prompt({name: torch.tensor(rows) for name, rows in batch.items()}, [90, 91])

    assert {name: tensor.tolist() for name, tensor in changed.items()} == expected


def test_documents_packed_in_a_row_have_the_loss_that_each_has_alone_after_its_own_soft_prompt(folder: Path) -> None:
    model = tiny_decoder()
    add_adapter(model, PromptConfig(num_tokens=3))
    model.model.embed_tokens.prompt.data.normal_(generator=torch.Generator().manual_seed(0))
    texts = [[5, 6, 7, 8], [9, 10, 11], [12, 13]]

    def loss_of(documents: list[list[int]]) -> torch.Tensor:
        rows = {
            "inputs": [token for ids in documents for token in ids[:-1]],
            "labels": [token for ids in documents for token in ids[1:]],
            "documents": [number for number, ids in enumerate(documents) for _ in ids[1:]],
        }
        batch = {name: torch.tensor([row]) for name, row in rows.items()}
        loss, num_tokens = method_of(model.config).objective(model, insert_prompt(batch, soft_prompt_of(model)))
        assert num_tokens == len(rows["labels"])
        return loss

    torch.testing.assert_close(loss_of(texts), sum(loss_of([ids]) for ids in texts), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start_from": None}, "`start_from`, a model directory that the adapter belongs to"),
        ({"adapter": {"kind": "ia3"}}, "adapter: got {'kind': 'ia3'}; allowed: a kind of lora, prompt"),
        ({"adapter": {"rank": 3}}, "adapter: got {'rank': 3}; allowed: a kind of lora, prompt"),
        ({"adapter": {"kind": "lora", "rank": 0}}, r"adapter\.rank: got 0; allowed: input should be greater than 0"),
        ({"precision": "float8"}, "precision: layers with LoRA do not multiply in 8 bits\n  got: float8\n  allowed: bfloat16"),
        ({"adapter": {"kind": "lora", "rnk": 1}}, r"adapter\.rnk: unknown key; did you mean rank\? allowed: alpha"),
        (
            {"adapter": {"kind": "prompt", "num_tokens": 113}},
            r"max_position_embeddings: .*\n  got: 128\n  allowed: 129 or more",
        ),
    ],
)
def test_settings_of_an_adapter_that_do_not_fit_name_what_would(folder: Path, changes: dict[str, Any], message: str) -> None:
    values = make_config(folder, model=None, start_from=folder / "base", adapter=LORA).model_dump() | changes

    with pytest.raises(ConfigError, match=message):
        check(read_shape(validate(TrainingConfig, values, "test")), Artifact.open(folder / "tokens", "tokens"))


def test_an_adapter_is_not_decayed_unless_it_is_asked_for(folder: Path) -> None:
    assert config_of(folder, LORA).optim_of_trained.weight_decay == 0
    assert config_of(folder, LORA | {"weight_decay": 0.2}).optim_of_trained.weight_decay == 0.2
    assert make_config(folder).optim_of_trained.weight_decay == 0.1


@pytest.mark.parametrize(("name", "config_class"), [("lora", LoRAConfig), ("prompt_tuning", PromptConfig)])
def test_a_preset_is_valid(name: str, config_class: type[AdapterConfig]) -> None:
    config = load(TrainingConfig, Path(__file__).parents[2] / "jobs" / "configs" / f"{name}.yaml")

    assert isinstance(config.adapter, config_class)
    assert validate(TrainingConfig, config.model_dump(mode="json"), "again") == config


def test_the_plan_counts_gradients_and_optimiser_state_of_what_is_trained_alone(folder: Path) -> None:
    config = config_of(folder, LORA)
    model = empty_model(config)
    num_trained = sum(parameter.numel() for parameter in adapter_parameters(model).values())

    plan = make_plan(PlanConfig.model_validate(config.model_dump()), row_length=17)

    assert plan.trained_parameters == num_trained < plan.parameters / 10

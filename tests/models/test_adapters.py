"""LoRA and soft prompts beside peft's own, on the same weights; merging; what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from families import DECODER, ENCODER, T5_SHAPE, VOCAB, build, export
from powerhouse.errors import ConfigError, ModelFormatError
from powerhouse.models.adapters import (
    Adapter,
    AdapterConfig,
    LoRAConfig,
    PromptConfig,
    adapter_parameters,
    add_adapter,
    fresh_tensors,
    merge,
    soft_prompt_of,
    unmerge,
)
from powerhouse.models.decoder import DecoderConfig
from powerhouse.models.encoder import EncoderConfig
from powerhouse.models.encoder_decoder import T5Config
from powerhouse.models.generate import GenerationConfig, generate
from powerhouse.models.hub import format_of, load_model
from powerhouse.models.hugging_face.adapter import save_adapter
from powerhouse.models.model import Model

# peft asks transformers by a name that this one is about to give up
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

IDS = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(3))
LABELS = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(4))
LORA = LoRAConfig(rank=3, alpha=5)
PROMPT = PromptConfig(num_tokens=4)
FAMILIES: dict[str, tuple[Any, dict[str, Any], Any]] = {
    "decoder": (DecoderConfig, DECODER, transformers.AutoModelForCausalLM),
    "qwen3": (DecoderConfig, DECODER | {"architecture": "qwen3", "has_qk_norm": True}, transformers.AutoModelForCausalLM),
    "encoder": (EncoderConfig, ENCODER, transformers.AutoModelForMaskedLM),
    "t5": (T5Config, T5_SHAPE | {"is_gated": True}, transformers.AutoModelForSeq2SeqLM),
}
KINDS = {"lora": LORA, "prompt": PROMPT}


def adapted(model: Model, config: AdapterConfig) -> Model:
    """With an adapter of which no tensor is zero."""
    fresh(model, config, torch.zeros(PROMPT.num_tokens, model.config.hidden_size))
    generator = torch.Generator().manual_seed(2)
    for parameter in adapter_parameters(model).values():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def fresh(model: Model, config: AdapterConfig, prompt_KC: Tensor | None = None) -> Model:
    """With an adapter as a run begins with it."""
    add_adapter(model, config)
    for name, tensor in fresh_tensors(model, 0, prompt_KC).items():
        model.get_parameter(name).data.copy_(tensor)
    return model


def logits_of(model: Model, ids: Tensor = IDS) -> Tensor:
    """Of the text's own tokens; the soft prompt stands before them."""
    soft = soft_prompt_of(model)
    whole = torch.cat([torch.tensor(soft, dtype=torch.long).expand(len(ids), -1), ids], dim=1)
    if isinstance(model.config, T5Config):
        return model(ids, torch.arange(ids.shape[1]), model.remember(whole))
    inputs = (whole,) if isinstance(model.config, EncoderConfig) else (whole, torch.arange(whole.shape[1]))
    logits: Tensor = model(*inputs)[:, len(soft) :]
    return logits


def their_logits(model: peft.PeftModel, family: str) -> Tensor:
    if family == "t5":
        logits: Tensor = model(input_ids=IDS, decoder_input_ids=IDS).logits
        return logits
    logits = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    return logits[:, -IDS.shape[1] :]


def write(model: Model, config: AdapterConfig, folder: Path) -> Path:
    """Write the frozen model, put an adapter into it and write that; give the adapter's folder."""
    export(model, folder / "base")
    adapter = Adapter(config, {name: item.data for name, item in adapter_parameters(adapted(model, config)).items()})
    save_adapter(folder / "adapter", adapter, format_of(model.config), model.config, folder / "base")
    return folder / "adapter"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_loads_what_is_written_and_gives_the_same_logits_and_gradients(tmp_path: Path, family: str, kind: str) -> None:
    config_class, values, auto_class = FAMILIES[family]
    model = build(config_class, values)
    directory = write(model, KINDS[kind], tmp_path)

    base = auto_class.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, directory, is_trainable=kind == "lora").eval()
    if kind == "prompt":  # peft loads none to go on with
        theirs.requires_grad_(False)
        theirs.prompt_encoder.requires_grad_(True)

    logits, expected = logits_of(model), their_logits(theirs, family)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    for each in (logits, expected):
        torch.nn.functional.cross_entropy(each.flatten(0, 1), LABELS.flatten()).backward()
    names = {name: item for name, item in theirs.named_parameters() if item.requires_grad}
    ours = {name: item.grad for name, item in model.named_parameters() if item.grad is not None}
    assert ours.keys() == adapter_parameters(model).keys()
    form = format_of(model.config)
    for name, gradient in ours.items():
        layer, _, part = name.rpartition(".")
        layer_there = form.name(f"{layer}.weight", model.config).removesuffix(".weight")
        there = (
            "prompt_encoder.default.embedding.weight"
            if part == "prompt"
            else f"base_model.model.{layer_there}.{part}.default.weight"
        )
        torch.testing.assert_close(gradient, names.pop(there).grad, atol=1e-5, rtol=1e-4, msg=name)
    assert names == {}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_is_read_as_it_was_written(tmp_path: Path, family: str, kind: str) -> None:
    config_class, values, _ = FAMILIES[family]
    model = build(config_class, values)
    directory = write(model, KINDS[kind], tmp_path)

    again = load_model(tmp_path / "base", adapter=directory)

    assert torch.equal(logits_of(again), logits_of(model))


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"target_modules": ["k_proj", "layers.1.mlp.down_proj"]}])
def test_a_lora_that_peft_wrote_is_read(tmp_path: Path, options: dict[str, Any]) -> None:
    base = export(build(DecoderConfig, DECODER), tmp_path / "base")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = {"r": 2, "lora_alpha": 3, "init_lora_weights": False, "task_type": "CAUSAL_LM", **options}
    wrapped = peft.get_peft_model(theirs, peft.LoraConfig(**settings)).eval()
    wrapped.save_pretrained(tmp_path / "adapter")

    ours = load_model(base, adapter=tmp_path / "adapter")

    torch.testing.assert_close(logits_of(ours), their_logits(wrapped, "decoder"), atol=1e-5, rtol=1e-5)
    merge(ours)
    merged = wrapped.merge_and_unload()
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor, atol=1e-6, rtol=1e-6, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_merging_keeps_the_outputs_and_unmerging_brings_back_every_bit(family: str) -> None:
    config_class, values, _ = FAMILIES[family]
    model = adapted(build(config_class, values), LORA)
    before, state = logits_of(model), {name: item.clone() for name, item in model.state_dict().items()}

    merge(model)
    torch.testing.assert_close(logits_of(model), before, atol=1e-4, rtol=1e-4)
    assert not torch.equal(model.get_submodule(some_layer(model)).weight, state[f"{some_layer(model)}.weight"])
    unmerge(model)

    assert torch.equal(logits_of(model), before)
    assert all(torch.equal(model.state_dict()[name], item) for name, item in state.items())


def some_layer(model: Model) -> str:
    return next(iter(adapter_parameters(model))).rpartition(".")[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_lora_changes_nothing_and_only_it_has_gradients(family: str) -> None:
    config_class, values, _ = FAMILIES[family]
    model = build(config_class, values)
    before = logits_of(model)

    after = logits_of(fresh(model, LORA))
    after.sum().backward()

    assert torch.equal(after, before)
    assert {n for n, p in model.named_parameters() if p.grad is not None} == adapter_parameters(model).keys()


def test_dropout_hides_inputs_of_the_change_alone_and_only_in_training() -> None:
    model = adapted(build(DecoderConfig, DECODER), LoRAConfig(rank=3, dropout=0.5))
    plain = logits_of(model)
    model.train()

    assert not torch.allclose(logits_of(model), plain)
    assert torch.equal(logits_of(model.eval()), plain)


def test_a_soft_prompt_stands_before_what_is_generated_from_as_the_words_it_began_with() -> None:
    model, words = build(DecoderConfig, DECODER), [5, 7, 11]
    config = GenerationConfig(max_tokens=5)
    expected = generate(model, [[*words, 1, 2], [*words, 3]], config, [])

    fresh(model, PromptConfig(num_tokens=3), model.model.embed_tokens.weight[words])

    assert generate(model, [[1, 2], [3]], config, []) == expected
    assert generate(model, [[1, 2]], config.model_copy(update={"num_beams": 2}), []) == generate(
        build(DecoderConfig, DECODER), [[*words, 1, 2]], config.model_copy(update={"num_beams": 2}), []
    )


def edit(name: str, **changes: object) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        path = directory / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def rename_a_tensor(directory: Path) -> None:
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.other.lora_A.weight"] = tensors.pop(min(tensors))
    save_file(tensors, path)


def truncate(directory: Path) -> None:
    path = directory / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (edit("adapter_config.json", peft_type="IA3"), "unknown kind of adapter\n  got: IA3\n  allowed: LORA, PROMPT_TUNING"),
        (edit("adapter_config.json", use_dora=True), "use_dora is not supported\n  got: True\n  allowed: False"),
        (edit("adapter_config.json", rank_pattern={"q_proj": 2}), "rank_pattern is not supported"),
        (
            edit("adapter_config.json", r=4),
            r"lora_A.weight is missing or has the wrong shape\n  got: \(3, 32\)\n  allowed: \(4, 32\)",
        ),
        (rename_a_tensor, "the adapter belongs to another model\n  got: base_model.model.other.lora_A.weight"),
        (truncate, "damaged or truncated"),
        (lambda directory: (directory / "adapter_model.safetensors").unlink(), "adapter_model.safetensors: missing"),
        (lambda directory: (directory / "adapter_config.json").unlink(), "adapter_config.json: missing"),
        (lambda directory: (directory / "adapter_config.json").write_text("{"), "adapter_config.json: damaged"),
        (
            edit("adapter_config.json", r="three"),
            "adapter_config.json: rank: got 'three'; allowed: input should be a valid integer",
        ),
    ],
)
def test_a_damaged_or_foreign_adapter_is_one_clear_error(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    directory = write(build(DecoderConfig, DECODER), LORA, tmp_path)
    damage(directory)

    with pytest.raises(ModelFormatError, match=message):
        load_model(tmp_path / "base", adapter=directory)


@pytest.mark.parametrize("target", ["lm_head", "k_prj", "embed_tokens"])
def test_a_layer_that_cannot_be_changed_is_refused_with_those_that_can(target: str) -> None:
    allowed = r"\['down_proj', 'gate_proj', 'k_proj', 'o_proj', 'q_proj', 'up_proj', 'v_proj'\]"

    with pytest.raises(ConfigError, match=rf"got: \['{target}'\]\n  allowed: {allowed}"):
        add_adapter(build(DecoderConfig, DECODER), LoRAConfig(targets=("q_proj", target)))

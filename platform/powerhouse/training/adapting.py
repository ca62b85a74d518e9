"""What a run needs to train an adapter: its first tensors, the soft prompt's place in a batch, dropout that can be repeated.

Shapes: B rows, T positions, K tokens of a soft prompt, C model width, D documents of all rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from powerhouse.corpora.shards import TokenRows
from powerhouse.models.adapters import Adapter, LoRAConfig, PromptConfig, fresh_tensors, merge
from powerhouse.models.hub import format_of, load_model, open_checkpoint, save_model
from powerhouse.models.hugging_face.adapter import save_adapter
from powerhouse.models.model import Model
from powerhouse.tokenizer import Tokenizer
from powerhouse.training.config import TrainingConfig
from powerhouse.training.noise import IGNORED, Indices
from powerhouse.training.objectives import Batch, Objective
from powerhouse.training.rows import rows_folder

MERGED = "merged"
"""Folder in the output of the model with its LoRA merged."""
_PLACES = "places"
_NUM_COUNTED_ROWS = 4096


def first_tensors(config: TrainingConfig, model: Model) -> dict[str, Tensor]:
    """What the adapter in the model begins with, in float32; nothing without one. A function of the settings and the tokens."""
    if config.adapter is None:
        return {}
    assert config.start_from is not None, "an adapter has a model to start from"
    prompt_KC = None
    if isinstance(config.adapter, PromptConfig):
        checkpoint = open_checkpoint(config.start_from)
        table = next(theirs for ours, theirs in checkpoint.names().items() if ours.endswith("embed_tokens.weight"))
        ids = first_prompt(config.adapter, config.tokens, rows_folder(config), config.seed)
        prompt_KC = checkpoint.weights.read(table, torch.float32)[torch.tensor(ids)]
    return fresh_tensors(model, config.seed, prompt_KC)


def first_prompt(config: PromptConfig, tokens: Path, rows: Path, seed: int) -> list[int]:
    """Tokens as whose embeddings the soft prompt begins: its text's, or K drawn from the commonest of the training rows."""
    tokenizer = Tokenizer.load(tokens)
    if config.text is not None:
        return list(islice(cycle(tokenizer.encode(config.text)), config.num_tokens))
    packed = TokenRows(rows)
    counted_NR = packed.take(np.arange(min(len(packed), _NUM_COUNTED_ROWS)))
    counts_V = np.bincount(counted_NR.ravel(), minlength=tokenizer.vocab_size)
    counts_V[list(tokenizer.special_ids.values())] = 0
    common = np.argsort(-counts_V, kind="stable")[: min(config.num_common, np.count_nonzero(counts_V))]
    drawn = np.random.default_rng(seed).choice(common, config.num_tokens, replace=len(common) < config.num_tokens)
    return [int(token_id) for token_id in drawn]


def adapt_batch(config: TrainingConfig, batch: Batch, places_B: Indices) -> Batch:
    """A batch of these places of the stream, as the run's adapter wants it: with the soft prompt, or told what to draw from."""
    if isinstance(config.adapter, PromptConfig):
        first = config.shape.vocab_size
        return insert_prompt(batch, list(range(first, first + config.adapter.num_tokens)))
    return {**batch, _PLACES: torch.from_numpy(places_B)} if _has_dropout(config) else batch


def insert_prompt(batch: Batch, prompt: list[int]) -> Batch:
    """Put the soft prompt before each document that the model reads: before each row, where its documents are not told.

    Its tokens are no labels. Rows with fewer documents than others are filled up with what is a document of its own.
    """
    if not prompt:
        return batch
    name, documents_name = ("sources", "source_documents") if "sources" in batch else ("inputs", "documents")
    documents_BT = batch.get(documents_name, torch.zeros_like(batch[name]))
    begins_BT = documents_BT != documents_BT.roll(1, dims=1)
    begins_BT[:, 0] = True
    places_BT = torch.arange(begins_BT.shape[1], device=begins_BT.device) + len(prompt) * begins_BT.cumsum(dim=1)
    length = int(places_BT[:, -1].max()) + 1
    rows_D, columns_D = begins_BT.nonzero(as_tuple=True)
    prompt_places_DK = places_BT[rows_D, columns_D, None] - torch.arange(len(prompt), 0, -1, device=places_BT.device)

    def spread(values_BT: Tensor, fill: int) -> Tensor:
        return values_BT.new_full((len(values_BT), length), fill).scatter_(1, places_BT, values_BT)

    changed = {name: spread(batch[name], 0)}
    changed[name][rows_D[:, None], prompt_places_DK] = torch.tensor(prompt, device=places_BT.device)
    if documents_name in batch:
        changed[documents_name] = spread(documents_BT, int(documents_BT.max()) + 1)
        changed[documents_name][rows_D[:, None], prompt_places_DK] = documents_BT[rows_D, columns_D, None]
    if name == "inputs":
        changed["labels"] = spread(batch["labels"], IGNORED)
    return {**batch, **changed}


def repeatable(config: TrainingConfig, objective: Objective) -> Objective:
    """Draw a micro-batch's dropout from (seed, place of its first row): a resumed run, or one of more workers, draws alike."""
    if not _has_dropout(config):
        return objective

    def seeded(model: object, batch: Batch) -> tuple[Tensor, Tensor]:
        torch.manual_seed(config.seed << 32 | int(batch[_PLACES][0]))
        return objective(model, {name: tensor for name, tensor in batch.items() if name != _PLACES})

    return seeded


def _has_dropout(config: TrainingConfig) -> bool:
    return isinstance(config.adapter, LoRAConfig) and config.adapter.dropout > 0


def save_trained(folder: Path, config: TrainingConfig, state: Mapping[str, Tensor], *, writes: bool) -> None:
    """Write what was trained: the model directory, or the adapter's, with the merged model in it if that is asked for.

    Taking a tensor out of `state` may be a collective: every rank calls this, and one writes.
    """
    if config.adapter is None:
        save_model(folder, config.shape, state, writes=writes)
        return
    state = {name: tensor.to("cpu") for name, tensor in state.items()}
    if not writes:
        return
    assert config.start_from is not None, "an adapter has a model to start from"
    adapter = Adapter(config.adapter, state)
    save_adapter(folder, adapter, format_of(config.shape), config.shape, config.start_from)
    if isinstance(config.adapter, LoRAConfig) and config.adapter.merges:
        model = load_model(config.start_from, adapter=folder)
        merge(model)
        Tokenizer.load(config.start_from).save(folder / MERGED)
        save_model(folder / MERGED, config.shape, {n: t for n, t in model.state_dict().items() if n not in state})

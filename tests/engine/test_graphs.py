from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fakes import tiny_config, tiny_decoder
from powerhouse.engine import Engine, EngineConfig, LocalRunner, SamplingParams, graphs
from powerhouse.engine.attention import PagedAttention, PagedCache
from powerhouse.engine.batch import ForwardBatch
from powerhouse.engine.graphs import CudaGraphs, GraphedAttention, Inputs, Run, buckets
from powerhouse.engine.stage import Stage
from powerhouse.errors import ConfigError
from powerhouse.models.decoder import Decoder
from powerhouse.tokenizer import Tokenizer

BLOCK, NUM_BLOCKS = 4, 48
SPARE = NUM_BLOCKS
CONFIG = EngineConfig(block_size=BLOCK, num_blocks=NUM_BLOCKS, device="cpu", max_num_seqs=6, max_num_batched_tokens=8)


def again(run: Run) -> Run:
    """What capturing is where a computation can only be done again: as on a GPU, it is done once at the start."""
    run()
    return run


def plainly(piece: Callable[..., Any]) -> Callable[..., Any]:
    return piece


def graphed_stage(decoder: Decoder, **changes: Any) -> Stage:
    """Its cache has the spare block, which no request of an engine with `CONFIG` has."""
    stage = Stage(decoder, CONFIG.model_copy(update={"num_blocks": NUM_BLOCKS + 1}))
    seams = {"capture": again, "compile_piece": plainly} | changes
    with patch.object(graphs, "_FEWEST_TOKENS", 2 * BLOCK), torch.inference_mode():
        stage.compiled = CudaGraphs(stage.decoder, stage._cache, CONFIG, **seams)
    return stage


@pytest.fixture(scope="module")
def stage(decoder: Decoder) -> Stage:
    return graphed_stage(decoder)


def decodes(lengths: Sequence[int], seed: int = 0, block_size: int = BLOCK) -> ForwardBatch:
    """One more token for each context, whose blocks lie anywhere."""
    chance = random.Random(seed)
    free = chance.sample(range(NUM_BLOCKS), NUM_BLOCKS)
    tables = tuple(tuple(free.pop() for _ in range(length // block_size + 1)) for length in lengths)
    slots = tuple(table[at // block_size] * block_size + at % block_size for table, at in zip(tables, lengths, strict=True))
    ids = tuple(chance.randrange(256) for _ in lengths)
    return ForwardBatch(ids, tuple(lengths), slots, (1,) * len(lengths), tables, (), ())


def fill(cache: PagedCache, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for pages in (cache.k_LKNPD, cache.v_LKNPD):
        requests_LKNPD = pages[:, :, :NUM_BLOCKS]
        requests_LKNPD.copy_(torch.randn(requests_LKNPD.shape, generator=generator))


@torch.inference_mode()
def forward(stage: Stage, batch: ForwardBatch, *, is_graphed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The hidden states, and all pages but the spare ones."""
    fill(stage._cache)
    with patch.object(stage, "compiled", stage.compiled if is_graphed else None):
        out_TC = stage.forward(batch)
    return out_TC, *(pages[:, :, :SPARE].clone() for pages in (stage._cache.k_LKNPD, stage._cache.v_LKNPD))


@given(
    st.lists(st.integers(0, 27), min_size=1, max_size=5),
    st.integers(0, 3),
    st.integers(0, 3),
    st.sampled_from([(4, 2), (4, 1), (2, 2)]),
    st.sampled_from([None, 1, 5]),
    st.integers(0, 2**20),
)
@settings(max_examples=12)
@torch.inference_mode()
def test_its_attention_is_that_over_pages_whatever_fills_the_bucket(
    lengths: list[int], num_rows: int, num_blocks: int, heads: tuple[int, int], window: int | None, seed: int
) -> None:
    """So many rows and blocks more than there are: they touch no page but the spare ones, and are finite."""
    generator = torch.Generator().manual_seed(seed)
    num_heads, num_kv_heads = heads
    config = tiny_config(num_attention_heads=num_heads, num_key_value_heads=num_kv_heads)
    caches = [PagedCache(config, range(1, 2), NUM_BLOCKS + 1, BLOCK, torch.float32, torch.device("cpu")) for _ in range(2)]
    for cache in caches:
        fill(cache, seed)
    batch, num = decodes(lengths, seed), len(lengths)
    longest = max(map(len, batch.block_tables)) + num_blocks
    rows = [[slot, *table, *[SPARE] * longest] for slot, table in zip(batch.slots, batch.block_tables, strict=True)]
    rows += [[SPARE * BLOCK, *[SPARE] * longest]] * num_rows
    positions_B = torch.tensor([*lengths, *[0] * num_rows])
    inputs = Inputs(positions_B, positions_B, torch.tensor([row[: 1 + longest] for row in rows]))
    q, k, v = (torch.randn(num + num_rows, n, 8, generator=generator) for n in (num_heads, num_kv_heads, num_kv_heads))
    found = GraphedAttention(caches[0], inputs)(1, q, k, v, window=window)
    expected = PagedAttention(caches[1], batch)(1, q[:num], k[:num], v[:num], window=window)
    torch.testing.assert_close(found[:num], expected)
    assert found.isfinite().all()
    for ours, plain in zip(caches[0].pages(1), caches[1].pages(1), strict=True):
        torch.testing.assert_close(ours[:, : SPARE * BLOCK], plain[:, : SPARE * BLOCK], rtol=0, atol=0)


@pytest.mark.parametrize("lengths", [[0], [9], [100], [3, 3], [1, 2, 30, 7, 0], [17] * 6], ids=str)
def test_graphed_steps_give_the_plain_numbers_and_leave_the_same_pages(stage: Stage, lengths: list[int]) -> None:
    batch = decodes(lengths)
    assert stage.compiled
    assert stage.compiled.takes(batch)
    torch.testing.assert_close(forward(stage, batch, is_graphed=True), forward(stage, batch, is_graphed=False))


def test_a_step_keeps_nothing_of_those_before_it_in_its_bucket(stage: Stage) -> None:
    alone, *_ = forward(stage, decodes([9, 4, 6]), is_graphed=True)
    before = alone.clone()
    forward(stage, decodes([11, 3, 2, 12], seed=3), is_graphed=True)
    torch.testing.assert_close(alone, before, rtol=0, atol=0)
    torch.testing.assert_close(forward(stage, decodes([9, 4, 6]), is_graphed=True)[0], alone, rtol=0, atol=0)


def test_a_request_that_is_no_number_spoils_only_its_own_row(stage: Stage) -> None:
    with torch.inference_mode():
        weight = stage.decoder.embed_tokens.weight
        kept = weight[7].clone()
        weight[7] = float("nan")
        try:
            spoilt, *_ = forward(stage, replace(decodes([9, 4, 6]), token_ids=(7, 8, 9)), is_graphed=True)
        finally:
            weight[7] = kept
    assert spoilt[0].isnan().all()
    assert spoilt[1:].isfinite().all()
    assert all(pages[:, :, SPARE].isfinite().all() for pages in (stage._cache.k_LKNPD, stage._cache.v_LKNPD))


def test_a_slice_of_the_model_takes_hidden_states(decoder: Decoder) -> None:
    sliced = Decoder(decoder.config, range(2, 4)).eval()
    sliced.load_state_dict({name: decoder.state_dict()[name] for name in sliced.state_dict()})
    batch, hidden_TC = decodes([9, 4, 6]), torch.randn(3, decoder.config.hidden_size)
    torch.testing.assert_close(graphed_stage(sliced).forward(batch, hidden_TC), Stage(sliced, CONFIG).forward(batch, hidden_TC))


def test_buckets_are_powers_of_two_and_the_most_there_may_be() -> None:
    assert buckets(1, 1) == [1]
    assert buckets(1, 6) == [1, 2, 4, 6]
    assert buckets(8, 64) == [8, 16, 32, 64]
    assert buckets(5, 20) == [8, 16, 20]
    assert buckets(8, 3) == [3]


@pytest.mark.parametrize(
    ("lengths", "bucket"),
    [
        ([0], (1, 2)),
        ([7], (1, 2)),
        ([8], (1, 4)),
        ([127], (1, 32)),
        ([128], None),  # beyond what the model has
        ([5] * 4, (4, 2)),
        ([5] * 5, (6, 2)),
        ([5] * 6, (6, 2)),
        ([5] * 7, None),  # beyond max_num_seqs
        ([60, 1, 1, 1, 1], (6, 16)),
        ([120, 1, 1, 1, 1], None),  # 192 blocks, four times those of the cache
    ],
    ids=str,
)
def test_a_batch_takes_the_smallest_bucket_or_goes_the_plain_way(
    stage: Stage, lengths: list[int], bucket: tuple[int, int] | None
) -> None:
    assert isinstance(stage.compiled, CudaGraphs)
    batch = decodes(lengths)
    assert stage.compiled._bucket(batch) == bucket
    assert stage.compiled.takes(batch) == (bucket is not None)
    if bucket:
        assert bucket in stage.compiled._graphs
        assert not stage.compiled.takes(replace(batch, adapters=(1,) * len(lengths)))


def test_a_batch_with_a_prompt_goes_the_plain_way(stage: Stage) -> None:
    assert stage.compiled
    assert not stage.compiled.takes(ForwardBatch((1, 2, 3), (0, 1, 5), (0, 1, 9), (2, 1), ((0,), (1, 2)), (), ()))


def test_all_buckets_are_captured_at_the_start_the_largest_first(decoder: Decoder) -> None:
    sizes = []

    def capture(run: partial[Tensor]) -> Run:
        num_rows, num_places = run.args[0].places_BX.shape
        sizes.append(num_rows * (num_places - 1))
        return run

    stage = graphed_stage(decoder, capture=capture)
    assert isinstance(stage.compiled, CudaGraphs)
    assert sizes == sorted(sizes, reverse=True)
    assert len(sizes) == len(stage.compiled._graphs) == 4 * 5 - 1


def test_answers_are_those_of_the_plain_dense_loop(
    stage: Stage, decoder: Decoder, tokenizer: Tokenizer, greedy_dense: Callable[[Sequence[int], int], tuple[int, ...]]
) -> None:
    """They begin and end at different times, so steps are of several buckets, and of decodes among prompts."""
    engine = Engine(decoder.config, tokenizer, CONFIG, LocalRunner(stage))
    prompts = [[5, 6, 7], [8] * 21, [250, 3, 99, 4, 17, 2], [42]]
    assert stage.compiled
    with patch.object(stage.compiled, "transform", wraps=stage.compiled.transform) as transform:
        answers = list(engine.generate(prompts, SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)))
    assert [answer.token_ids for answer in answers] == [greedy_dense(prompt, 12) for prompt in prompts]
    assert transform.call_count > 8


def test_one_piece_of_code_serves_all_blocks_and_any_number_of_requests_but_one(decoder: Decoder) -> None:
    made = []

    def keep(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        made.append(graph)
        return graph.forward

    torch._dynamo.reset()
    graphed_stage(decoder, compile_piece=lambda piece: torch.compile(piece, fullgraph=True, backend=keep))
    assert len(made) == 2 * 2, "before attention and after it; all buckets have run"


def fails(error: Exception) -> Callable[..., Any]:
    def fail(*_: object) -> Any:
        raise error

    return fail


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"compile_piece": lambda _: fails(RuntimeError("Cannot find a working triton installation\nin ..."))},
            r"cannot be compiled\n  got: Cannot find a working triton installation\n  do: install Triton",
        ),
        ({"compile_piece": lambda piece: lambda *x: tuple_or_twice(piece(*x))}, "wrong numbers here\n  got: off by"),
        (
            {"capture": fails(torch.OutOfMemoryError("CUDA out of memory\n..."))},
            "cannot be captured\n  got: CUDA out of memory\n  do: lower max_num_seqs",
        ),
    ],
    ids=["no compiler", "wrong code", "no memory"],
)
def test_what_does_not_work_is_refused_with_the_reason(decoder: Decoder, changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        graphed_stage(decoder, **changes)


def tuple_or_twice(value: Any) -> Any:
    return value if isinstance(value, tuple) else 2 * value


of_every_format = pytest.mark.parametrize(
    ("settings", "close"),
    [
        ({"dtype": "float32"}, 1e-4),
        ({"dtype": "bfloat16"}, 0.05),
        ({"dtype": "bfloat16", "quantization": "int8"}, 0.05),
        ({"dtype": "bfloat16", "quantization": "int4"}, 0.05),
    ],
    ids=str,
)


@pytest.fixture
def gpu_decoder() -> Decoder:
    torch._dynamo.reset()
    return tiny_decoder(hidden_size=128, intermediate_size=256, head_dim=32, max_position_embeddings=512).to("cuda")


def gpu_config(settings: dict[str, str], *, compiles: bool) -> EngineConfig:
    shared = {"block_size": 16, "num_blocks": NUM_BLOCKS, "device": "cuda", "max_num_seqs": 6, "max_num_batched_tokens": 64}
    return EngineConfig.model_validate(shared | settings | {"compiles": compiles})


@pytest.mark.gpu
@pytest.mark.timeout(600)
@of_every_format
def test_what_is_replayed_is_what_the_plain_stage_computes(
    gpu_decoder: Decoder, settings: dict[str, str], close: float
) -> None:
    decoder = gpu_decoder.to(getattr(torch, settings["dtype"]))
    graphed, plain = (Stage(decoder, gpu_config(settings, compiles=on)) for on in (True, False))
    assert isinstance(graphed.compiled, CudaGraphs)
    for seed, lengths in enumerate([[9], [200], [3, 60], [1, 2, 30, 7, 0], [17] * 6, [140, 3, 1]]):
        batch = decodes(lengths, seed, block_size=16)
        assert graphed.compiled.takes(batch)
        for stage in (graphed, plain):
            with torch.inference_mode():
                fill(stage._cache)
        found_TC, expected_TC = graphed.forward(batch).float(), plain.forward(batch).float()
        assert (found_TC - expected_TC).abs().max() < close * expected_TC.abs().max(), lengths


@pytest.mark.gpu
@pytest.mark.timeout(600)
def test_a_gpus_answers_are_the_same_with_graphs(gpu_decoder: Decoder, tokenizer: Tokenizer) -> None:
    answers = []
    for compiles in (True, False):
        config = gpu_config({"dtype": "float32"}, compiles=compiles)
        engine = Engine(gpu_decoder.config, tokenizer, config, LocalRunner(Stage(gpu_decoder, config)))
        params = SamplingParams(max_tokens=40, temperature=0.8, seed=1, ignore_eos=True)
        prompts = [[5, 6, 7], [8] * 90, [250, 3, 99, 4, 17, 2], [42]]
        answers.append([answer.token_ids for answer in engine.generate(prompts, params)])
    assert answers[0] == answers[1]

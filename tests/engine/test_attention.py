from __future__ import annotations

from unittest.mock import patch

import torch
from hypothesis import given
from hypothesis import strategies as st

from fakes import tiny_config
from powerhouse.engine import attention
from powerhouse.engine.attention import PagedAttention, PagedCache
from powerhouse.engine.batch import ForwardBatch
from powerhouse.models.attention import Mask, dense_attention

H, K, D, NUM_BLOCKS = 4, 2, 8, 64
Sequences = st.lists(st.tuples(st.integers(0, 12), st.integers(1, 6)), min_size=1, max_size=5)


@given(
    Sequences,
    st.sampled_from([1, 3, 4]),
    st.sampled_from([None, 1, 5]),
    st.sampled_from([None, 4, 4096]),
    st.integers(0, 2**20),
)
def test_paged_attention_over_scattered_blocks_is_dense_attention(
    sequences: list[tuple[int, int]], block_size: int, window: int | None, most_padding: int | None, seed: int
) -> None:
    """Each sequence is (tokens computed before, tokens now), so decodes, prompts and chunks are mixed in one batch; decodes
    attend in place, all at once or in several groups, or with the others as where a device cannot.
    """
    generator = torch.Generator().manual_seed(seed)
    cache = PagedCache(tiny_config(), range(2, 4), NUM_BLOCKS * 4, block_size, torch.float32, torch.device("cpu"))
    assert cache.can_attend_in_place
    cache.can_attend_in_place = most_padding is not None
    free = torch.randperm(NUM_BLOCKS * 4, generator=generator).tolist()
    tables = [tuple(free.pop() for _ in range(-(-(past + new) // block_size))) for past, new in sequences]
    q, k, v = ([torch.randn(past + new, heads, D, generator=generator) for past, new in sequences] for heads in (H, K, K))
    for is_past in (True, False):
        spans = [range(past) if is_past else range(past, past + new) for past, new in sequences]
        batch = lay_out(spans, tables, block_size)
        rows = [torch.cat([x[i][span.start : span.stop] for i, span in enumerate(spans)]) for x in (q, k, v)]
        with patch.object(attention, "_SPLIT_DECODES", most_padding):
            out_THD = PagedAttention(cache, batch)(3, *rows, window=window)
    expected = []
    for (past, _), q_SHD, k_SKD, v_SKD in zip(sequences, q, k, v, strict=True):
        mask = Mask(num_past=past, window=window)
        expected.append(dense_attention(q_SHD[None, past:], k_SKD[None], v_SKD[None], mask)[0])
    torch.testing.assert_close(out_THD, torch.cat(expected))
    assert not cache.k_LKNPD[0].any(), "layer 2 was not asked for"


def lay_out(spans: list[range], tables: list[tuple[int, ...]], block_size: int) -> ForwardBatch:
    filled = [(span, table) for span, table in zip(spans, tables, strict=True) if span]
    positions = tuple(i for span, _ in filled for i in span)
    slots = tuple(table[i // block_size] * block_size + i % block_size for span, table in filled for i in span)
    lengths = tuple(len(span) for span, _ in filled)
    return ForwardBatch((0,) * len(positions), positions, slots, lengths, tuple(table for _, table in filled), (), ())

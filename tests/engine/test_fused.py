from __future__ import annotations

import pytest
import torch

from fakes import tiny_decoder
from powerhouse.engine import EngineConfig
from powerhouse.engine.formats import make_pack
from powerhouse.engine.fused import FusedDecoder
from powerhouse.models.attention import DenseCache
from powerhouse.models.decoder import Decoder

LLAMA3 = {"kind": "llama3", "factor": 8.0, "original_context": 32}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"has_qk_norm": True, "architecture": "qwen3"},
        {"has_qkv_bias": True, "architecture": "qwen2"},
        {"has_output_bias": True, "has_mlp_bias": True},
        {"rope_scaling": LLAMA3, "tie_word_embeddings": False},
        {"sliding_window": 3, "full_attention_layers": (1,), "architecture": "mistral"},
    ],
    ids=str,
)
@torch.inference_mode()
def test_the_fused_decoder_computes_what_the_decoder_does(options: dict[str, object]) -> None:
    decoder = tiny_decoder(**options)
    for name, parameter in decoder.named_parameters():
        if name.endswith(("bias", "norm.weight")):  # fresh ones are zeros and ones, which hide a mistake
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.3 + 1)
    ids_T, positions_T = torch.arange(9) * 7, torch.arange(9)
    expected_TV = decoder(ids_T[None], positions_T[None], DenseCache())[0]
    fused = FusedDecoder(decoder, make_pack(EngineConfig(), torch.float32, torch.device("cpu")), torch.float32, 9)
    cache = DenseCache()
    hidden_TC = fused.transform(
        ids_T, positions_T, lambda layer, q, k, v, window: cache(layer, q[None], k[None], v[None], window=window)[0]
    )
    torch.testing.assert_close(fused.project(hidden_TC), expected_TV, rtol=1e-4, atol=1e-4)


def test_a_decoder_is_emptied_only_when_asked() -> None:
    pack = make_pack(EngineConfig(), torch.float32, torch.device("cpu"))

    def num_blocks_left(decoder: Decoder, *, empties: bool) -> int:
        FusedDecoder(decoder, pack, torch.float32, 8, empties=empties)
        return len(decoder.blocks())

    assert num_blocks_left(tiny_decoder(), empties=False) == 4
    assert num_blocks_left(tiny_decoder(), empties=True) == 0

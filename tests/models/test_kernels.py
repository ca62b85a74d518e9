from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from powerhouse.models import kernels
from powerhouse.models.attention import Mask, dense_attention
from powerhouse.models.kernels import KERNELS
from powerhouse.models.layers import RelativeBias

FAST = sorted(set(KERNELS) - {"dense"})
D = 16


def masks(num_keys: int, num_queries: int) -> dict[str, Mask]:
    past = num_keys - num_queries
    valid_BS = torch.arange(num_keys) >= torch.tensor([[0], [3]])
    document_BS = torch.stack([torch.arange(num_keys) // 5, torch.arange(num_keys) // 9])
    return {
        "causal": Mask(num_past=past),
        "bidirectional": Mask(is_causal=False),
        "window": Mask(num_past=past, window=4),
        "window over all": Mask(num_past=past, window=1000),
        "padded left": Mask(num_past=past, valid_BS=valid_BS),
        "padded right": Mask(is_causal=False, valid_BS=valid_BS.flip(1)),
        "documents": Mask(num_past=past, document_BS=document_BS),
        "documents, window, padding": Mask(num_past=past, window=3, document_BS=document_BS, valid_BS=valid_BS),
    }


def qkv(num_queries: int, num_keys: int, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_queries + heads)
    shapes = [(num_queries, heads), (num_keys, kv_heads), (num_keys, kv_heads)]
    q, k, v = (torch.randn(2, *shape, D, generator=generator, requires_grad=True) for shape in shapes)
    return q, k, v


def bias(heads: int, *, is_causal: bool) -> RelativeBias:
    module = RelativeBias(8, 16, heads, is_causal=is_causal)
    torch.nn.init.normal_(module.weight, generator=torch.Generator().manual_seed(5))
    return module


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize(("heads", "kv_heads", "has_bias"), [(4, 4, False), (6, 2, False), (6, 2, True)])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(23, 23), (1, 23), (6, 23)])
@pytest.mark.parametrize("name", list(masks(8, 8)))
@pytest.mark.parametrize(("kernel", "chunk"), [("sdpa", 512), ("chunked", 512), ("chunked", 7), ("flex", 512)])
def test_every_kernel_is_the_dense_one(
    kernel: str,
    chunk: int,
    name: str,
    num_queries: int,
    num_keys: int,
    heads: int,
    kv_heads: int,
    has_bias: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels, "_CHUNK", chunk)
    q, k, v = (x.detach() for x in qkv(num_queries, num_keys, heads, kv_heads))  # flex learns only where it is compiled
    mask = masks(num_keys, num_queries)[name]
    added = bias(heads, is_causal=mask.is_causal) if has_bias else None

    with torch.no_grad():
        torch.testing.assert_close(
            KERNELS[kernel](q, k, v, mask, added), dense_attention(q, k, v, mask, added), atol=1e-5, rtol=0
        )


def gradients(kernel: Callable[..., Tensor], mask: Mask, *, has_bias: bool) -> list[Tensor]:
    q, k, v = qkv(23, 23, 6, 2)
    added = bias(6, is_causal=mask.is_causal) if has_bias else None
    weights = torch.randn(2, 23, 6, D, generator=torch.Generator().manual_seed(3))
    (kernel(q, k, v, mask, added) * weights).sum().backward()
    leaves = [q, k, v] + ([added.weight] if added is not None else [])
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("name", list(masks(8, 8)))
@pytest.mark.parametrize(("kernel", "chunk"), [("sdpa", 512), ("chunked", 7)])
def test_gradients_of_every_kernel_are_those_of_the_dense_one(
    kernel: str, chunk: int, name: str, has_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_CHUNK", chunk)
    mask = masks(23, 23)[name]

    ours, expected = (gradients(KERNELS[which], mask, has_bias=has_bias) for which in (kernel, "dense"))

    assert len(ours) == len(expected) == 3 + has_bias
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("length", "heads", "kv_heads"), [(300, 4, 2), (768, 2, 2)])
def test_rows_that_are_halved_have_the_output_and_the_gradients_of_the_dense_kernel(
    length: int, heads: int, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64: what is left out or counted twice would show in the first digits, at any place."""
    lengths = []
    original = kernels.halved_attention
    monkeypatch.setattr(kernels, "halved_attention", lambda q, k, v: lengths.append(q.shape[1]) or original(q, k, v))
    leaves = [x.detach().double().requires_grad_() for x in qkv(length, length, heads, kv_heads)]
    weights = torch.randn(2, length, heads, D, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    found = []
    for kernel in (KERNELS["sdpa"], dense_attention):
        out = kernel(*leaves, Mask())
        found.append([out, *torch.autograd.grad((out * weights).sum(), leaves)])

    assert lengths == [length]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("name", list(masks(8, 8)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sdpa_never_takes_the_path_that_holds_all_scores(
    name: str, has_bias: bool, needs_grad: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With that path forbidden torch raises where it would take it; our own limits are lifted to see that they suffice."""
    q, k, v = (x.detach().to(dtype).requires_grad_(needs_grad) for x in qkv(23, 23, 6, 2))
    added = bias(6, is_causal=masks(8, 8)[name].is_causal).to(dtype) if has_bias else None
    calls = []
    original = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *args, **kw: calls.append(1) or original(*args, **kw)
    )

    with torch.set_grad_enabled(needs_grad), sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
        out = KERNELS["sdpa"](q, k, v, masks(23, 23)[name], added)

    assert out.dtype == dtype
    assert bool(calls) is not (needs_grad and has_bias), "a bias that learns goes to the chunked kernel on a CPU"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(masks(8, 8)))
@pytest.mark.parametrize("kernel", FAST)
def test_every_kernel_on_the_gpu_is_the_dense_one_on_the_cpu(kernel: str, name: str, dtype: torch.dtype) -> None:
    q, k, v = qkv(200, 200, 6, 2)
    mask = masks(200, 200)[name]
    expected = dense_attention(q, k, v, mask)
    moved = {key: value.cuda() if isinstance(value, Tensor) else value for key, value in vars(mask).items()}

    out = KERNELS[kernel](*(x.detach().to("cuda", dtype) for x in (q, k, v)), Mask(**moved))

    torch.testing.assert_close(out.float().cpu(), expected, atol=1e-4 if dtype == torch.float32 else 3e-2, rtol=0)

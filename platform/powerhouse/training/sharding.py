"""Sharded data parallelism (Zhao et al. 2023; torch's `fully_shard`), laid on a model from outside.

The ranks that hold one copy of the model keep a slice each of every float32 parameter, of its gradient and of the
optimiser's state. A block's parameters are gathered, in the precision of the computation, when the block runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from powerhouse.models.model import Model

Read = Callable[[str], Tensor]
"""A parameter's name -> the whole parameter, in float32 on the CPU."""


class HasBlocks(Protocol):
    """A model that names the units to shard."""

    def blocks(self) -> dict[str, nn.Module]: ...


def make_mesh(device: torch.device, ranks_per_copy: int | None = None) -> DeviceMesh:
    """All ranks over one copy of the model, or copies x ranks: sharded within a copy, summed over the copies.

    With one rank to a copy that is plain replication.
    """
    num_ranks = dist.get_world_size()
    # Without a device type the mesh would be one of GPUs wherever a GPU is found, whatever the process group is.
    if ranks_per_copy is None or ranks_per_copy == num_ranks:
        return init_device_mesh(device.type, (num_ranks,), mesh_dim_names=("shard",))
    assert num_ranks % ranks_per_copy == 0, f"{ranks_per_copy} ranks to a copy, of {num_ranks}"
    return init_device_mesh(device.type, (num_ranks // ranks_per_copy, ranks_per_copy), mesh_dim_names=("copy", "shard"))


def shard(model: nn.Module, read: Read, mesh: DeviceMesh, compute_dtype: torch.dtype) -> None:
    """Fill a model that is on the meta device and shard it, block by block, then the rest (embedding, last norm, head).

    A rank holds no more than its slices and one block in full at a time. Gradients arrive as the SUM over ranks, in
    float32: the loop divides by the number of tokens, which only it knows.
    """
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    names = {module: name for name, module in model.named_modules()}
    for block in blocks_of(model):
        _fill(block, f"{names[block]}.", read)
        fully_shard(block, mesh=mesh, mp_policy=policy)
    _fill(model, "", read)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            if hasattr(module, "remember"):  # called beside `forward`, and with the same parameters gathered
                register_fsdp_forward_method(module, "remember")
            module.set_gradient_divide_factor(1.0)
            # A divide factor alone is a PREMUL_SUM reduction, which gloo does not have.
            module.set_force_sum_reduction_for_comms(True)


def _fill(module: nn.Module, prefix: str, read: Read) -> None:
    """Put real tensors in the place of those parameters that are still on the meta device."""
    missing = {name: read(prefix + name) for name, parameter in module.named_parameters() if parameter.is_meta}
    module.load_state_dict(missing, strict=False, assign=True)
    if isinstance(module, Model):
        module.tie_weights()


def announce_backward(model: nn.Module, *, is_last: bool, is_deferred: bool) -> None:
    """Tell the sharded model what its next backward pass leaves to a later one of the same step.

    The sum over copies always waits for the last one; with `is_deferred` so does the sum within a copy.
    """
    assert isinstance(model, FSDPModule), "shard the model first"
    model.set_is_last_backward(is_last)
    if is_deferred:
        model.set_requires_gradient_sync(is_last)
    else:
        model.set_requires_all_reduce(is_last)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    return list(model.blocks().values())  # type: ignore[operator]


class WholeState(Mapping[str, Tensor]):
    """Whole tensors of what is trained, by name, each gathered when it is taken: a collective, so every rank
    takes the same ones in one order.
    """

    def __init__(self, model: nn.Module) -> None:
        frozen, state = frozen_names(model), get_model_state_dict(model)
        self._slices = {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor) and name not in frozen}

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._slices[name]
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._slices)

    def __len__(self) -> int:
        return len(self._slices)


def frozen_names(model: nn.Module) -> set[str]:
    """Every name of what is not trained: a matrix that is tied to another has two."""
    return {name for name, item in model.named_parameters(remove_duplicate=False) if not item.requires_grad}

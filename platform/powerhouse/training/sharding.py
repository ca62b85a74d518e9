"""Fully sharded data parallelism (Zhao et al. 2023; torch's `fully_shard`), laid on a model from outside.

Every rank keeps a slice of each float32 parameter, of its gradient and of the optimiser's state. A block's parameters are
gathered, in the precision of the computation, when the block runs.
"""

from __future__ import annotations

from functools import partial
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.utils.checkpoint import checkpoint


class HasBlocks(Protocol):
    """A model that names the units to shard."""

    def blocks(self) -> dict[str, nn.Module]: ...


def recompute_blocks(model: nn.Module) -> None:
    """Keep only each block's input for the backward pass, and compute the rest again; to be called before `shard`."""
    for block in blocks_of(model):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def shard(model: nn.Module, device: torch.device, compute_dtype: torch.dtype) -> None:
    """Shard over all ranks, block by block, then what is left (embedding, last norm, head) as the root.

    Gradients arrive as the SUM over ranks, in float32: the loop divides by the number of tokens, which only it knows.
    """
    # Without a device type the mesh would be one of GPUs wherever a GPU is found, whatever the process group is.
    mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("data",))
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            if hasattr(module, "remember"):  # called beside `forward`, and with the same parameters gathered
                register_fsdp_forward_method(module, "remember")
            module.set_gradient_divide_factor(1.0)
            # A divide factor alone is a PREMUL_SUM reduction, which gloo does not have.
            module.set_force_sum_reduction_for_comms(True)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    return list(model.blocks().values())  # type: ignore[operator]


def gather_state(model: nn.Module) -> dict[str, Tensor]:
    """Whole float32 tensors by name on rank 0's CPU; nothing on the other ranks. A collective."""
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}

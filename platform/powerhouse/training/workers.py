"""Where there are more workers than can share a step, those in excess leave the process group. Plain torch."""

from __future__ import annotations

import os
import socket

import torch.distributed as dist


def shrink_group(num_used: int) -> bool:
    """Keep only the first ranks in the default process group; False on a rank that has left it. A collective."""
    if num_used == dist.get_world_size():
        return True
    rank, backend = dist.get_rank(), dist.get_backend()
    address = [_free_address() if rank == 0 else ""]
    dist.broadcast_object_list(address)
    dist.destroy_process_group()
    if rank < num_used:
        dist.init_process_group(backend, init_method=address[0], rank=rank, world_size=num_used)
    return rank < num_used


def _free_address() -> str:
    with socket.create_server(("", 0)) as server:
        return f"tcp://{os.environ['MASTER_ADDR']}:{server.getsockname()[1]}"

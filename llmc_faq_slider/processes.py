"""One run is one process."""

import os

import torch.distributed as dist

__all__ = ["refuse_many_processes"]


def refuse_many_processes() -> None:
    """:raises ValueError: in a process that was started as one of several"""
    given = os.environ.get("WORLD_SIZE", "")
    if dist.is_available() and dist.is_initialized():
        found, count = "torch.distributed has", dist.get_world_size()
    elif given.strip().isdecimal():
        found, count = "WORLD_SIZE says", int(given)
    else:
        return
    if count > 1:
        raise ValueError(
            f"{found} {count} processes, and FAQ and SliderQuant run in one: several "
            "would overwrite each other's weights. Start it with python instead of "
            "torchrun, and choose its GPU with CUDA_VISIBLE_DEVICES; where there is "
            "no launcher, unset WORLD_SIZE."
        )

"""What a training process knows of where it runs."""

from __future__ import annotations

import torch


def processes() -> tuple[int, int]:
    """Return this process's rank and how many train together: (0, 1) where it is alone."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def memory_in_use() -> int:
    """Return the memory in use: of the GPU at its peak, else this process's resident set, in bytes."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import psutil

    return psutil.Process().memory_info().rss

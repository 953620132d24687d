"""How many processes make batches: a given number, or by the cores that this process may use."""

import os
from typing import Literal

import torch


def resolve_workers(num_workers: int | Literal["auto"]) -> int:
    """Worker processes of this rank; 0 = the process itself."""
    if num_workers != "auto":
        return num_workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if torch.cuda.is_available():
        return min(max(1, share - 1), 24)
    return min(max(1, share // 4), 4)  # the cores that remain do the arithmetic

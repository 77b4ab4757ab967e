"""Memory of the machine that trains: whether it ran out, how much there is, giving back what is
freed.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from functools import cache
from typing import Any

import torch

from train.exit_cause import describe_machine

M_ARENA_MAX = -8  # of glibc's malloc.h
CPU_ALLOCATOR = "DefaultCPUAllocator: "  # how torch tells of a refused allocation on a CPU


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an allocation of torch was refused, on a GPU or on a CPU."""
    return isinstance(error, torch.OutOfMemoryError) or CPU_ALLOCATOR in str(error)


def describe_memory(device: torch.device) -> str:
    """Return what the device has in all and what torch holds of it, in words."""
    if device.type == "cuda":
        _, total = torch.cuda.mem_get_info(device)
        used = torch.cuda.max_memory_allocated(device)
        return f"{device} has {total / 1e9:.1f} GB, of which the run held up to {used / 1e9:.1f}"
    return describe_machine()


def give_back_freed() -> None:
    """Have the C library return the pages that nothing uses; does nothing where it cannot (not
    glibc).

    Weights and activations of some hundred kilobytes each leave holes in the heap that no later
    tensor fits; between two phases of a run they would add up.
    """
    gc.collect()
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


def share_one_heap() -> None:
    """Have threads that start from now on allocate from one heap; does nothing without glibc.

    Each would get its own, and what one run frees would be of no use to another: four runs at once
    held 6.4 GB so, and 4.6 GB with MALLOC_ARENA_MAX=1, which this is.
    """
    library = _glibc()
    if library is not None:
        library.mallopt(M_ARENA_MAX, 1)


@cache
def _glibc() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "malloc_trim") else None

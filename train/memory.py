"""Memory of the device that trains: whether it ran out, and how much there is."""

from __future__ import annotations

import torch

from train.exit_cause import MEMORY_BYTES

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
    return f"the machine has {MEMORY_BYTES / 1e9:.1f} GB"

"""What this machine's processor is good at."""

from __future__ import annotations

import torch


def is_fast_in_bfloat16() -> bool:
    """Tell whether products of bfloat16 are faster than float32's on this CPU.

    Intel's processors without AMX have the instruction, at half of float32's rate: 82 against 168
    GFLOP/s on one core of a Xeon whose AMX was hidden.
    """
    able = torch.cpu.get_capabilities()
    if able.get("amx_bf16"):
        return True
    return bool(able.get("avx512_bf16")) and "intel" not in str(able.get("cpu_name", "")).lower()

"""The machine code for training on a CPU, from `native/`: compiled once, kept, called by ctypes."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch

from serve.engine import kernels, machine_code

SOURCE = Path(__file__).with_name("native") / "training.c"
BY_FLOAT, BY_PAIRS, BY_UNIT = range(3)  # `Way` of native/matrix.h


@functools.cache
def library() -> Any:
    """Return the compiled functions, or None where they cannot be had; the log says why."""
    found = machine_code.load(
        SOURCE, "training on a CPU computes with torch alone", [kernels.SOURCE.parent]
    )
    if found is not None:
        for name in ("layer_forward", "layer_backward", "head_scores"):
            getattr(found, name).argtypes = (ctypes.c_void_p, ctypes.c_int)
    return found


def way_of(dtype: torch.dtype) -> int:
    """Return how rows meet a base of `dtype`: rounded to it, or in float32 where that is faster."""
    return _way_in_bfloat16() if dtype == torch.bfloat16 else BY_FLOAT


@functools.cache
def _way_in_bfloat16() -> int:
    if library().has_unit():
        return BY_UNIT
    return BY_PAIRS if kernels.fast_in_bfloat16() else BY_FLOAT


def run(function: Any, call: ctypes.Structure) -> None:
    """Call a function of the library with its one struct.

    Raises:
        torch.OutOfMemoryError: There is no memory for its scratch space.
    """
    if function(ctypes.addressof(call), torch.get_num_threads()):
        raise torch.OutOfMemoryError("no memory for the scratch space of a training pass")

"""Freed memory, given back to the system."""

from __future__ import annotations

import ctypes
import gc
import sys
from functools import cache
from typing import Any


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


@cache
def _glibc() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "malloc_trim") else None

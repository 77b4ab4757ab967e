"""The engine's own machine code for CPUs, from `native/`: compiled once, kept, called by ctypes.

The C compiler of the machine builds it in a second or two, for this very processor; where there is
none, `library()` is None and the engine computes with torch alone, with the same results.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import nn

from serve.engine import machine_code, processor

SOURCE = Path(__file__).with_name("native") / "kernels.c"
MAX_SIBLINGS = 8
LANES = 16
BLOCK = 32  # inputs that share a scale
F32, BF16, Q8, Q8_OFFSET, PAIRS, PAIRS_Q8, PAIRS_Q8_OFFSET = range(7)
NUMBERS = {BF16: torch.int16, Q8: torch.int8, Q8_OFFSET: torch.int8}
PAIRED = {torch.int16: torch.int32, torch.int8: torch.int16}  # two numbers as one


class ProductStruct(ctypes.Structure):
    """`Product` of native/product.h."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("K", ctypes.c_int64),
        ("N", ctypes.c_int64),
        ("format", ctypes.c_int32),
        ("siblings", ctypes.c_int32),
        ("active", ctypes.c_int32),
        ("narrow", ctypes.c_int32),
        ("a", ctypes.c_void_p),
        ("b", ctypes.c_void_p * MAX_SIBLINGS),
        ("size", ctypes.c_int64 * MAX_SIBLINGS),
    )


class AdaptersStruct(ctypes.Structure):
    """`Adapters` of native/product.h."""

    _fields_ = (
        ("num_tokens", ctypes.c_int64),
        ("first", ctypes.c_void_p),
        ("count", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("most", ctypes.c_int32),
    )


class AdapterPlan:
    """Which rows of the stacked factors every token has, for the kernels.

    Args:
        first: Where each token's rows begin in `rows`.
        number: How many it has; 0 for the base.
    """

    def __init__(self, first: list[int], number: list[int], rows: list[int]):
        self._kept = [torch.tensor(part, dtype=torch.int32) for part in (first, number, rows)]
        self._struct = AdaptersStruct(
            len(first), *(part.data_ptr() for part in self._kept), max(number, default=0)
        )
        self.address = ctypes.addressof(self._struct)


class Product:
    """x [M, K] times a weight [N, K], transposed, by the kernels.

    Args:
        in_bfloat16: Both sides may be rounded to bfloat16, or to something finer, as `Packed` says;
            sums stay float32.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, in_bfloat16: bool = False):
        self.packed = Packed(weight, in_bfloat16)
        self._bias = bias = None if bias is None else bias.float()
        scale = self.packed.scale
        self.struct = ProductStruct(
            weight=self.packed.weight.data_ptr(),
            scale=None if scale is None else scale.data_ptr(),
            bias=None if bias is None else bias.data_ptr(),
            K=self.packed.num_inputs,
            N=self.packed.num_outputs,
            format=self.packed.format,
        )
        self._address = ctypes.addressof(self.struct)
        self._multiply = library().multiply
        self._threads = torch.get_num_threads()

    def __call__(self, x: torch.Tensor, plan: AdapterPlan | None) -> torch.Tensor:
        """Return [M, N], the tokens' adapters added."""
        x = x.contiguous()
        y = x.new_empty(len(x), self.packed.num_outputs)
        if len(x) and self._multiply(
            self._address,
            None if plan is None else plan.address,
            x.data_ptr(),
            len(x),
            y.data_ptr(),
            self._threads,
        ):
            raise MemoryError("no memory for the scratch space of a matrix product")
        return y


class RmsNorm:
    """x -> x / sqrt(mean(x^2) + eps) * (weight + offset), over the last dimension."""

    def __init__(self, weight: torch.Tensor, offset: float, eps: float):
        self.weight, self.offset, self.eps = weight, offset, eps
        self._run = library().rms_norm

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        y, width = torch.empty_like(x), len(self.weight)
        self._run(
            *(x.data_ptr(), self.weight.data_ptr(), self.offset, self.eps),
            *(x.numel() // width, width, y.data_ptr()),
        )
        return y


def attend(
    query_NED: torch.Tensor,
    keys_THD: torch.Tensor,
    values_THV: torch.Tensor,
    first_N: torch.Tensor,
    length_N: torch.Tensor,
    scale: float,
    softcap: float | None,
    threads: int,
) -> torch.Tensor:
    """Return [N, E, V]: each query over tokens `first` to `first + length` of the arena.

    Args:
        first_N, length_N: int64.
    """
    query = query_NED.contiguous()
    (_, heads, width), value_width = keys_THD.shape, values_THV.shape[2]
    out = query.new_empty(*query.shape[:2], value_width)
    failed = library().attend(
        *(query.data_ptr(), keys_THD.data_ptr(), values_THV.data_ptr()),
        *(first_N.data_ptr(), length_N.data_ptr()),
        *(len(query), query.shape[1], heads, width, value_width),
        *(scale, softcap or 0.0, out.data_ptr(), threads),
    )
    if failed:
        raise MemoryError("no memory for the scores of attention")
    return out


class Packed:
    """A weight [N, K] in panels of 16 outputs, float32 or something smaller that equals it.

    A weight whose numbers all are bfloat16's, or 8-bit integers by a factor (and an offset) for
    each 32 inputs (as those that come from GGUF's Q8_0, Q4_0 and Q4_1), is kept as such: it is
    read two to four times faster, and nothing is lost.

    Args:
        in_bfloat16: What has no smaller form is rounded to bfloat16. Where the processor gains by
            it, two inputs lie side by side and rows are rounded too: to 16-bit integers beside
            8-bit ones (AVX512-VNNI), else to bfloat16.

    Attributes:
        is_exact: Whether nothing was rounded.
    """

    def __init__(self, weight: torch.Tensor, in_bfloat16: bool = False):
        self.num_outputs, self.num_inputs = weight.shape
        self.scale: torch.Tensor | None = None
        self.is_exact = True
        small = weight.to(torch.bfloat16)
        parts = None
        if small is weight or torch.equal(small.to(weight.dtype), weight):
            self.format, numbers = BF16, small.view(torch.int16)
        elif (parts := _as_q8(weight)) is not None:
            integers, factor, offset = parts
            self.format, numbers = Q8_OFFSET if offset.any() else Q8, integers
            scales = [_panels(factor), *([_panels(offset)] if offset.any() else [])]
            self.scale = torch.stack(scales, dim=2).contiguous()
        elif in_bfloat16:
            self.format, numbers = BF16, small.view(torch.int16)
            self.is_exact = False
        else:
            self.format, numbers = F32, weight
        if in_bfloat16 and (fast_in_bfloat16() or (self.scale is not None and multiply_8bit())):
            self.format += PAIRS - BF16
            numbers = _pairs(numbers)
        self.weight = _panels(numbers)

    def dense(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the weight [N, K]."""
        kind, plain = self.format, _from_panels(self.weight, self.num_outputs)
        if kind >= PAIRS:
            kind -= PAIRS - BF16
            plain = plain.contiguous().view(NUMBERS[kind])[:, : self.num_inputs]
        if kind == BF16:
            return plain.contiguous().view(torch.bfloat16).to(dtype)
        plain = plain.float()
        if self.scale is None:
            return plain
        factor, *offset = (
            _from_panels(part, self.num_outputs).repeat_interleave(BLOCK, 1)[:, : self.num_inputs]
            for part in self.scale.unbind(2)
        )
        return (plain * factor + offset[0] if offset else plain * factor).to(dtype)


@functools.cache
def library() -> Any:
    """Return the compiled functions, or None where they cannot be had; the log says why."""
    loaded = machine_code.load(SOURCE, "the engine computes with torch alone")
    if loaded is None:
        return None
    loaded.multiply.argtypes = (
        *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p),
        *(ctypes.c_int64, ctypes.c_void_p, ctypes.c_int),
    )
    loaded.attend.argtypes = (
        *[ctypes.c_void_p] * 5,
        *[ctypes.c_int64] * 5,
        *(ctypes.c_float, ctypes.c_float, ctypes.c_void_p, ctypes.c_int),
    )
    loaded.rms_norm.argtypes = (
        *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_float, ctypes.c_float),
        *(ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p),
    )
    loaded.rms_norm.restype = None
    loaded.forward.argtypes = (*[ctypes.c_void_p] * 5, ctypes.c_int)
    return loaded


def outlook() -> str:
    """Say whether there are or will be kernels, without building any."""
    return machine_code.outlook(SOURCE, "the engine serves from a CPU with torch alone, slower")


def usable(like: torch.Tensor | nn.Module) -> bool:
    """Tell whether the kernels compute for this tensor or model: float32 on a CPU."""
    parameter = like if isinstance(like, torch.Tensor) else next(like.parameters())
    fits = parameter.device.type == "cpu" and parameter.dtype == torch.float32
    return fits and library() is not None


def multiply_bfloat16() -> bool:
    """Tell whether engines may be asked for bfloat16 on this CPU: kernels gain by it."""
    return fast_in_bfloat16() or multiply_8bit()


def fast_in_bfloat16() -> bool:
    """Tell whether there are kernels for products of bfloat16 here, faster than float32's."""
    able = library() is not None and bool(library().multiplies_bfloat16())
    return able and processor.is_fast_in_bfloat16()


def multiply_8bit() -> bool:
    """Tell whether there are kernels that multiply 8-bit weights as whole numbers."""
    return library() is not None and bool(library().multiplies_integers())


def is_8bit(weight: torch.Tensor) -> bool:
    """Tell whether 8-bit integers, factors and offsets give a weight [N, K] exactly."""
    return _as_q8(weight.float()) is not None


def _panels(matrix: torch.Tensor) -> torch.Tensor:
    """Turn [N, K] into [ceil(N / 16), K, 16], zeros at the end."""
    if len(matrix) % LANES:
        matrix = torch.nn.functional.pad(matrix, (0, 0, 0, -len(matrix) % LANES))
    return matrix.view(-1, LANES, matrix.shape[1]).transpose(1, 2).contiguous()


def _pairs(matrix: torch.Tensor) -> torch.Tensor:
    """Turn numbers [N, K] into pairs [N, ceil(K / 2)] of them, a zero at the end of odd K."""
    if matrix.shape[1] % 2:
        matrix = torch.nn.functional.pad(matrix, (0, 1))
    return matrix.contiguous().view(PAIRED[matrix.dtype])


def _from_panels(panels: torch.Tensor, num_outputs: int) -> torch.Tensor:
    return panels.transpose(1, 2).reshape(-1, panels.shape[1])[:num_outputs]


def _as_q8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """Return integers [N, K], scales and offsets [N, ceil(K / 32)] that give the weight, if any."""
    num_outputs, num_inputs = weight.shape
    if num_inputs % BLOCK:
        return None
    blocks = weight.view(num_outputs, -1, BLOCK)
    lowest, highest = blocks.aminmax(dim=-1, keepdim=True)
    largest = torch.maximum(-lowest, highest)
    signed = torch.where(-lowest > highest, lowest, highest)  # Q4_0 maps the largest to -8
    for scale, offset in (
        (largest / 127, torch.zeros_like(lowest)),
        (((highest - lowest) / 15).half().float(), lowest),
        (signed / -8, torch.zeros_like(lowest)),
    ):
        whole = torch.where(scale != 0, (blocks - offset) / scale, 0).round().clamp(-127, 127)
        if torch.equal(whole * scale + offset, blocks):
            integers = whole.to(torch.int8).view(num_outputs, num_inputs)
            return integers, scale.squeeze(-1), offset.squeeze(-1)
    return None

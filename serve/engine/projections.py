"""The model's matrix products as the engine wants them: fused, packed, and with adapters added.

Linear modules that read the same tensor (query, key and value; gate and up) become one product over
their weights side by side: the first that is called computes for all, the others hand out their
part. On a CPU the weights are reordered once into the blocks that oneDNN multiplies by; the plain
ones are let go meanwhile, so that a model takes no more memory than before. `close` gives the
modules back as they were.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from serve.engine import kernels
from serve.engine.adapter_weights import lora_sites, site_shape
from serve.engine.lora import LoraBank, LoraStack

PACKED_ROWS = 16  # tokens that the blocks are laid out for; any number can be multiplied


class Projections:
    """All matrix products of a model, while an engine has it.

    Args:
        siblings: Names of the modules that read the same tensor, as `noting_siblings` finds them.
        in_bfloat16: Whether kernels round both sides of products to bfloat16.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        bank: LoraBank,
        siblings: Sequence[Sequence[str]],
        in_bfloat16: bool,
    ):
        modules = lora_sites(model)
        head = model.get_output_embeddings()
        calls = Counter(name for group in siblings for name in group)
        together = {
            name: tuple(group)
            for group in siblings
            for name in group
            # A module that several layers share stands alone.
            if len(group) <= kernels.MAX_SIBLINGS and all(calls[name] == 1 for name in group)
        }
        self._replaced: list[_Linears | _Hooked] = []
        for names in dict.fromkeys(together.get(name, (name,)) for name in modules):
            members = [modules[name] for name in names]
            first = members[0]
            scale = float(getattr(first, "embed_scale", 1.0))  # Gemma scales its embeddings
            shapes = [site_shape(member) for member in members]
            narrow = in_bfloat16 and isinstance(first, nn.Linear)
            stack = LoraStack(bank, names, shapes, first is head, scale, narrow)
            bank.attach(stack)
            if isinstance(first, nn.Linear):
                # The head's may be the embedding's too, and adapters may bring it to compare.
                linears = _Linears(members, stack, first is head, in_bfloat16)
                self._replaced.append(linears)
            else:
                self._replaced.append(_Hooked(first, stack))

    def kernel_of(self, modules: Sequence[nn.Module]) -> KernelLinears | None:
        """Return the kernel's product of exactly these modules, if there is one."""
        for replaced in self._replaced:
            if isinstance(replaced, _Linears) and replaced.computes(modules):
                kernel = replaced.product.kernel
                return None if kernel is None else KernelLinears(kernel, replaced.stack)
        return None

    def close(self) -> None:
        """Give the modules back as they were."""
        while self._replaced:  # one by one: packed and plain weights are not all there at once
            self._replaced.pop().close()


@contextmanager
def noting_siblings(model: PreTrainedModel, found: list[list[str]]) -> Iterator[None]:
    """Fill `found` with the linear modules that read the same tensor in the passes of a block."""
    last: list[torch.Tensor] = []  # held, so that no other tensor takes its place
    handles = []

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if not (last and args[0] is last[0]):
                last[:] = [args[0]]
                found.append([])
            found[-1].append(name)

        return hook

    for name, module in lora_sites(model).items():
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_pre_hook(note(name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True, slots=True)
class KernelLinears:
    """A product of the kernels, and the adapters' stack beside it."""

    kernel: kernels.Product
    stack: LoraStack

    @property
    def num_outputs(self) -> int:
        """Of all modules together."""
        return self.kernel.packed.num_outputs

    def prepare(self) -> None:
        """Tell the kernel whether adapters of the step at hand have a part here, and where."""
        self.kernel.struct.active = int(self.stack.plan_for(self.kernel.struct) is not None)


class _Linears:
    """One product for linear modules that read the same tensor."""

    def __init__(
        self, modules: Sequence[Any], stack: LoraStack, keep_plain: bool, in_bfloat16: bool
    ):
        self._modules = list(modules)
        self.stack = stack
        self._sizes = [module.out_features for module in modules]
        self._input: torch.Tensor | None = None
        self._outputs: Sequence[torch.Tensor] = ()
        weights = [module.weight.data for module in modules]
        self._weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        bias = _side_by_side([module.bias for module in modules], self._sizes, self._weight)
        self.product = _product(self._weight, bias, in_bfloat16)
        if self.product.dense is not None and not keep_plain:
            self._weight = self._weight.new_empty(0)
        for module, part in zip(modules, self._parts(self._weight), strict=True):
            module.weight.data = part
        for index, module in enumerate(modules):
            module.forward = self._forward_of(index)

    def close(self) -> None:
        if not len(self._weight) and self.product.dense is not None:
            self._weight = self.product.dense()
        for module, part in zip(self._modules, self._parts(self._weight), strict=True):
            del module.forward
            module.weight.data = part
        del self.product

    def _parts(self, weight: torch.Tensor) -> Sequence[torch.Tensor]:
        return weight.split(self._sizes) if len(weight) else [weight] * len(self._sizes)

    def _forward_of(self, index: int) -> Callable[[torch.Tensor], torch.Tensor]:
        if len(self._sizes) == 1:
            return self.multiply

        def forward(x: torch.Tensor) -> torch.Tensor:
            if x is not self._input:  # the first of the siblings
                outputs = torch.split_with_sizes(self.multiply(x), self._sizes, dim=-1)
                self._input, self._outputs = x, outputs
            output = self._outputs[index]
            if index == len(self._sizes) - 1:
                self._input, self._outputs = None, ()
            return output

        return forward

    def computes(self, modules: Sequence[nn.Module]) -> bool:
        """Tell whether these are its modules, in this order."""
        return len(modules) == len(self._modules) and all(map(is_, modules, self._modules))

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """Return the modules' outputs side by side, adapters added."""
        output = self.product.run(x.reshape(-1, x.shape[-1]), self.stack)
        return output.view(*x.shape[:-1], output.shape[-1])


@dataclass(frozen=True, slots=True)
class _Product:
    """How a weight is multiplied.

    Attributes:
        run: From [M, K] to [M, N], adapters of the stack added.
        dense: Returns the weight that was packed; None if the plain one is in use, or must be kept.
        kernel: Ours, if it is one.
    """

    run: Callable[[torch.Tensor, LoraStack], torch.Tensor]
    dense: Callable[[], torch.Tensor] | None = None
    kernel: kernels.Product | None = None


def _product(weight: torch.Tensor, bias: torch.Tensor | None, in_bfloat16: bool) -> _Product:
    """Choose: our kernels for float32 on a CPU, oneDNN for bfloat16 there, torch elsewhere."""
    dtype = weight.dtype
    if in_bfloat16 or kernels.usable(weight):
        product = kernels.Product(weight, bias, in_bfloat16)
        return _Product(
            lambda x, stack: product(x, stack.plan_for(product.struct)),
            (lambda: product.packed.dense(dtype)) if product.packed.is_exact else None,
            product,
        )
    if weight.device.type == "cpu" and _can_reorder(weight.dtype):
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_ROWS)

        def multiply(x: torch.Tensor) -> torch.Tensor:
            return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")

        return _Product(_with_adapters(multiply), packed.to_dense)
    return _Product(_with_adapters(lambda x: nn.functional.linear(x, weight, bias)))


def _can_reorder(dtype: torch.dtype) -> bool:
    return torch.backends.mkldnn.is_available() and dtype in (torch.float32, torch.bfloat16)


def _with_adapters(
    multiply: Callable[[torch.Tensor], torch.Tensor],
) -> Callable[[torch.Tensor, LoraStack], torch.Tensor]:
    def run(x: torch.Tensor, stack: LoraStack) -> torch.Tensor:
        output = multiply(x)
        stack.add(x, output)
        return output

    return run


class _Hooked:
    """A lookup table, or a module that is no nn.Linear: the adapters come after it."""

    def __init__(self, module: nn.Module, stack: LoraStack):
        self._stack = stack
        lookup = isinstance(module, nn.Embedding)
        self._handle = module.register_forward_hook(self._look_up if lookup else self._multiply)

    def close(self) -> None:
        self._handle.remove()

    def _look_up(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        self._stack.add_lookup(args[0].flatten(), output.view(-1, output.shape[-1]))

    def _multiply(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        x = args[0].reshape(-1, args[0].shape[-1])
        self._stack.add(x, output.view(-1, output.shape[-1]))


def _side_by_side(
    biases: Sequence[torch.Tensor | None], sizes: Sequence[int], like: torch.Tensor
) -> torch.Tensor | None:
    if all(bias is None for bias in biases):
        return None
    pairs = zip(biases, sizes, strict=True)
    return torch.cat([like.new_zeros(n) if bias is None else bias.data for bias, n in pairs])

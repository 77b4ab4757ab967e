"""A bfloat16 model that computes in float32 between its matrix products.

The kernels multiply bfloat16 but sum, attend and normalise in float32: more exact than a bfloat16
model, and faster on a CPU. A float32 model is that already. In a bfloat16 one the embedding's
output is widened, and all that comes after it follows, where the modules are such as let it.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from serve.engine import kernels


def suits(model: PreTrainedModel) -> bool:
    """Tell whether this model on this machine can round to bfloat16 in its products only."""
    if model.device.type != "cpu" or not kernels.multiply_bfloat16():
        return False
    if model.dtype == torch.float32:
        return True
    return model.dtype == torch.bfloat16 and all(map(_follows, model.modules()))


def gains(model: PreTrainedModel) -> bool:
    """Tell whether a float32 model's weights are 8-bit integers that are multiplied as such here.

    The first matrix of the first layer stands for all.
    """
    if not (suits(model) and kernels.multiply_8bit()):
        return False
    linears = (module for module in model.modules() if isinstance(module, nn.Linear))
    first = next(linears, None)
    return first is not None and kernels.is_8bit(first.weight.data)


def widened(model: PreTrainedModel) -> RemovableHandle | None:
    """Have a bfloat16 model's embedding give float32, until the handle is removed."""
    if model.dtype == torch.float32:
        return None
    return model.get_input_embeddings().register_forward_hook(lambda *given: given[-1].float())


def _follows(module: nn.Module) -> bool:
    """Tell whether a module without children of its own takes float32 though it is bfloat16."""
    if not list(module.parameters(recurse=False)):
        return True
    return isinstance(module, nn.Linear | nn.Embedding) or type(module).__name__.endswith("RMSNorm")

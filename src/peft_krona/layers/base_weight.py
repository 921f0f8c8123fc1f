# SPDX-License-Identifier: Apache-2.0
"""What a merge did to a base weight: the weight before it, kept bit for bit, and the shares that were added.

A share is a fact of the past: adapters may be trained on, weighted anew or deleted while they are merged, so their
factors are kept as they were (small beside the weight). W + dW is rounded to W's dtype, so W cannot be computed back
from it. `BaseWeightSnapshot` therefore keeps the original tensor itself (on its device, one weight per merged layer)
and puts that very tensor back. If something else changed the merged weight in between (another tuner's merge, a cast,
an optimizer), putting the original back would undo that; then the shares are subtracted instead, with a warning that
this is exact only up to rounding.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..choices import Layout
from ..ops import kron_delta_weight

_INT_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Share:
    """What one adapter adds to a base weight: s * layout(sum_n A_n (x) B_n).

    Attributes:
        name: the adapter's. A: (r, a_out, a_in). B: (r, b_out, b_in, *kernel). scale: s.
    """

    name: str
    A: torch.Tensor
    B: torch.Tensor
    scale: float | torch.Tensor
    layout: Layout

    def delta_weight(self) -> torch.Tensor:
        """dW, (out, in, *kernel), in fp32 (fp64 for fp64 factors)."""
        return kron_delta_weight(self.A, self.B, scale=self.scale, layout=self.layout)

    def kept(self) -> Share:
        """A copy that nothing changes any more."""
        return replace(self, A=self.A.detach().clone(), B=self.B.detach().clone(), scale=float(self.scale))


class BaseWeightSnapshot:
    """The base weight of one layer as it was before the first merge."""

    def __init__(self, layer: BaseTunerLayer) -> None:
        self._base_layer = _base_of(layer)
        self._quantized = layer.quantization_backend is not None
        self._weight: torch.Tensor = (
            self._base_layer._parameters.get("weight") if self._quantized else self._base_layer.weight.data
        )
        # bitsandbytes keeps the 8-bit statistics beside the weight
        self._state = copy.copy(getattr(self._base_layer, "state", None)) if self._quantized else None
        self._owner = _owner_of(layer, self._base_layer)
        self._merged_layer: nn.Module | None = None  # some backends (HQQ) replace the module on merge
        self._merged_bits: int | None = None

    def original(self, layer: BaseTunerLayer) -> torch.Tensor:
        """The weight before the merge, as a plain float tensor; do not modify it."""
        if not self._quantized:
            return self._weight
        current = self._swap(self._weight, self._state)
        try:
            return dequantized(layer.quantization_backend, self._base_layer)
        finally:
            self._swap(*current)

    def seal(self) -> None:
        """Remember the merged weight's module and bits, to notice later whether something else changed it."""
        self._merged_layer = self._owner.base_layer
        if not self._quantized:
            self._merged_bits = _bits(self._base_layer.weight.data)

    def untouched(self) -> bool:
        """Whether the weight is still the one that the merge wrote."""
        if self._owner.base_layer is not self._merged_layer:
            return False
        return self._quantized or _bits(self._base_layer.weight.data) == self._merged_bits

    def reloaded(self) -> bool:
        """Whether something put the original back already, as loading a state dict does: no share is in it then."""
        if self._quantized:
            return False
        weight = self._owner.base_layer.weight.data
        return weight.is_floating_point() and torch.equal(self._weight.to(weight), weight)

    def restore(self) -> None:
        """Put the original weight back, bit for bit."""
        if self._quantized:
            self._owner.base_layer = self._base_layer
            self._swap(self._weight, self._state)
        else:
            weight = self._base_layer.weight
            weight.data = self._weight.to(weight.device)

    def _swap(self, weight: torch.Tensor | None, state: Any) -> tuple[torch.Tensor | None, Any]:
        """Give the quantized layer these objects; returns those that it had."""
        base = self._base_layer
        current = base._parameters.get("weight"), getattr(base, "state", None)
        if weight is not None:
            base._parameters["weight"] = weight
        if state is not None:
            base.state = state
        return current


def is_float8(dtype: torch.dtype) -> bool:
    """Whether it is one of the floating dtypes of a single byte, which weights are stored in, but not computed with."""
    return dtype.is_floating_point and dtype.itemsize == 1


def dequantized(backend: Any, base_layer: nn.Module) -> torch.Tensor:
    """The weight of a quantized layer as a plain tensor.

    On some CPUs bitsandbytes repacks 4-bit weights when they are first used for inference, which PEFT's dequantization
    would misread. Taking a state dict undoes it, on a copy here, as that loses a little precision.
    """
    quant_state = getattr(getattr(base_layer, "weight", None), "quant_state", None)
    if getattr(quant_state, "packing_format_for_cpu", False):
        base_layer = copy.deepcopy(base_layer)
        base_layer.state_dict()
    return backend.get_base_weight(base_layer)


def _base_of(layer: BaseTunerLayer) -> Any:
    """The base layer: a module whose `weight` is a tensor."""
    return layer.get_base_layer()


def _owner_of(layer: Any, base_layer: nn.Module) -> Any:
    """The tuner's layer, perhaps inside of `layer`, whose `base_layer` this is."""
    while layer.base_layer is not base_layer:
        layer = layer.base_layer
    return layer


def _bits(weight: torch.Tensor) -> int:
    """A checksum of the weight's bits, which also tells rows or columns that have changed places."""
    bits = weight.contiguous().view(_INT_OF_SIZE[weight.element_size()]).flatten(1)
    sums = (bits.sum(dim, dtype=torch.int64) for dim in (1, 0))
    return sum(int((s * (2 * torch.arange(len(s), device=s.device) + 1)).sum()) for s in sums)


def subtract_with_warning(weight: torch.Tensor, delta: torch.Tensor, where: str) -> torch.Tensor:
    """W - dW in at least fp32, for a merged weight that something else changed since."""
    warnings.warn(
        f"The base weight of {where} was changed by something else while a KronA adapter was merged into it, so the "
        "original cannot be put back. dW was subtracted instead, which is exact only up to rounding. Unmerge in the "
        "reverse order of merging, and do not cast or train the base model in between, to get it back bit for bit.",
        RuntimeWarning,
        stacklevel=3,
    )
    return (weight.to(delta.dtype) - delta).to(weight.dtype)

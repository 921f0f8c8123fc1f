# SPDX-License-Identifier: Apache-2.0
"""`.diff` files (ComfyUI, A1111, LyCORIS' "full"): the update of every layer as a whole matrix."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from .adapter import Adapter
from .names import UNetNames, to_kohya_name
from .pairs import group_by_layer


def to_diff(adapter: Adapter, base: UNetNames, dtype: torch.dtype = torch.float16) -> dict[str, torch.Tensor]:
    """Write every dW as it is: `<name>.diff`. Holds any adapter, at the size of the adapted weights.

    Raises:
        FormatError: if a component has no name in such files.
    """
    return {
        f"{to_kohya_name(layer.component, layer.module, base)}.diff": layer.delta_weight().to(dtype)
        for layer in adapter
    }


def diff_deltas(
    tensors: Mapping[str, torch.Tensor], dtype: torch.dtype = torch.float64
) -> Iterator[tuple[str, torch.Tensor]]:
    """(layer name, dW in `dtype`) for each layer."""
    for name, parts in group_by_layer(tensors, ("diff",)).items():
        yield name, parts["diff"].to(dtype)

# SPDX-License-Identifier: Apache-2.0
"""`.diff` files (ComfyUI, A1111, LyCORIS' "full"): the update of every layer as a whole matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..record import LayerUpdate
from .format import Format, Parts


def _write(layers: Sequence[LayerUpdate], dtype: torch.dtype) -> list[dict[str, torch.Tensor]]:
    """Every dW as it is. Holds any adapter, at the size of the adapted weights."""
    return [{"diff": layer.delta_weight().to(dtype)} for layer in layers]


def _delta(name: str, parts: Parts, dtype: torch.dtype) -> torch.Tensor:
    return parts["diff"].to(dtype)


DIFF = Format(
    name="diff",
    endings=("diff",),
    refuses="in general is no sum of few Kronecker products. Use nearest_kronecker (or `extract` on two checkpoints) "
    "for the best approximation of given factor sizes",
    write=_write,
    delta=_delta,
    kohya_network=("lycoris.kohya", {"algo": "full"}),
    notes=lambda layers: ("diffusers does not load .diff files; ComfyUI, A1111 and LyCORIS do",),
)

# SPDX-License-Identifier: Apache-2.0
"""Which dtype a product is computed in: autocast's rules, and the factors, which PEFT keeps in fp32, cast to it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from .._compat import any_autocast
from .operands import Update


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for tensors of this device; a meta device, for one, has none and raises if asked."""
    if not any_autocast():
        return False
    kind = device.type
    return (kind in ("cpu", "cuda") or torch.amp.is_autocast_available(kind)) and torch.is_autocast_enabled(kind)


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context in which torch computes in the tensors' own dtype; where it does so already, one that costs nothing."""
    return torch.autocast(device.type, enabled=False) if autocasts(device) else nullcontext()


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype that a product of x (any shape) is computed in: autocast's inside autocast (as F.linear), else x's."""
    if autocasts(x.device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def cast_factors(update: Update, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """s A (r, a_out, a_in) and B (r, b_out, b_in) in `dtype`."""
    A, B, scale = update
    if isinstance(scale, torch.Tensor) or scale != 1:
        A = scale_A(A, scale, dtype)
    return A if A.dtype == dtype else A.to(dtype), B if B.dtype == dtype else B.to(dtype)


def scale_A(A: torch.Tensor, scale: float | torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """s A (r, a_out, a_in) in A's dtype or `dtype`, whichever is wider: before rounding to the latter, not after it."""
    if isinstance(scale, torch.Tensor) or scale != 1:
        A = A.to(torch.promote_types(A.dtype, dtype)) * scale
    return A


def with_number(update: Update) -> Update:
    """The update with a number for s: a tensor () is multiplied into A at once, where autograd sees it."""
    A, B, scale = update
    return Update(A * scale, B, 1.0) if isinstance(scale, torch.Tensor) else update

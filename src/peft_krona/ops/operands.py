# SPDX-License-Identifier: Apache-2.0
"""What a Kronecker product is made of, in the one order that every function of the op takes it: x, update, base, plan.

Symbols here and in all of ops/: r terms, A (r, a_out, a_in), B (r, b_out, b_in), out = a_out * b_out, in = a_in * b_in,
s the scale, T tokens (the product of x's leading sizes). dW = s * layout(sum_n A_n (x) B_n).
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias, final

import torch


class Update(NamedTuple):
    """dW in factors: A (r, a_out, a_in) and B (r, b_out, b_in) of any floating dtype, and s.

    s is a number, or a tensor () where module_dropout draws it.
    """

    A: torch.Tensor
    B: torch.Tensor
    scale: float | torch.Tensor = 1.0


@final  # so that `type(base) is Frozen` tells checkers of the other case, too
class Frozen(NamedTuple):
    """A dense layer to add to, x weight^T + bias: weight (out, in), bias (out,) or None, neither with a gradient."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None


# What the product is added to: nothing, a tensor (..., out), or a frozen layer's output, which then is computed here.
Base: TypeAlias = torch.Tensor | Frozen | None

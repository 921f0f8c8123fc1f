# SPDX-License-Identifier: Apache-2.0
"""What the autograd nodes of both backends have in common: their arguments, and what they keep for backward.

A node computes base + product for the flat arguments (x, A, B, scale, base, weight, bias, plan), which is the order of
x, update, base, plan with the tuples taken apart, as autograd only sees tensors that are arguments of their own.
"""

from __future__ import annotations

from typing import Any

import torch

from .._compat import apply_node
from .operands import Base, Frozen, Update
from .plan import Plan

Gradients = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]  # of x, A and B


def run(node: type[torch.autograd.Function], x: torch.Tensor, update: Update, base: Base, plan: Plan) -> torch.Tensor:
    """The node's output (..., out) for x (..., in)."""
    A, B, scale = update
    if base.__class__ is Frozen:
        return apply_node(node, x, A, B, scale, None, base[0], base[1], plan)
    return apply_node(node, x, A, B, scale, base, None, None, plan)


def base_of(base: torch.Tensor | None, weight: torch.Tensor | None, bias: torch.Tensor | None) -> Base:
    """The base that a node's flat arguments stand for: base (..., out), weight (out, in), bias (out,), or None."""
    return base if weight is None else Frozen(weight, bias)


def keep(ctx: Any, x: torch.Tensor, h: torch.Tensor, weight: torch.Tensor | None, factors: tuple) -> None:
    """Keep for backward what it reads and no more.

    x (..., in) and h (T, intermediate): only for the factors' gradients, so a frozen adapter keeps no activation.
    weight (out, in), which under autocast is a copy: only for x's gradient. factors: as the backend wants them.
    """
    need_x, need_A, need_B = ctx.needs_input_grad[:3]
    if need_A or need_B:
        ctx.save_for_backward(x, h, weight if need_x else None, *factors)
    else:
        ctx.save_for_backward(None, None, weight, *factors)


def flat(ctx: Any, gradients: Gradients, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """The gradients in the order of a node's arguments; dy (..., out) is that of a base."""
    dX, dA, dB = gradients
    return dX, dA, dB, None, dy if ctx.needs_input_grad[4] else None, None, None, None

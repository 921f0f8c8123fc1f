# SPDX-License-Identifier: Apache-2.0
"""What the autograd nodes of both backends have in common: their arguments, and what they keep for backward.

A node computes base + product for the arguments (x, A, B, base, settings): autograd only sees tensors that are
arguments of their own. `Settings` has the rest, as the ops take it: the update, the frozen layer, the plan.
"""

from __future__ import annotations

from typing import Any

import torch

from .._compat import apply_node
from .operands import Base, Frozen, Update
from .plan import Plan

Gradients = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]  # of x, A and B
Settings = tuple[
    Update, Frozen | None, Plan
]  # A and B once more, with s; the frozen layer if that is the base; the plan


def run(node: type[torch.autograd.Function], x: torch.Tensor, update: Update, base: Base, plan: Plan) -> torch.Tensor:
    """The node's output (..., out) for x (..., in)."""
    if type(base) is Frozen:
        return apply_node(node, x, update[0], update[1], None, (update, base, plan))
    return apply_node(node, x, update[0], update[1], base, (update, None, plan))


def keep(ctx: Any, activations: tuple, frozen: Frozen | None, factors: tuple) -> None:
    """Keep for backward what it reads and no more.

    activations: x (..., in) and h (T, intermediate), only for the factors' gradients, so a frozen adapter keeps none.
    frozen: its weight, which under autocast is a copy, only for x's gradient. factors: as the backend wants them.
    """
    needs, weight = ctx.needs_input_grad, None if frozen is None else frozen[0]
    if needs[1] or needs[2]:
        ctx.save_for_backward(*activations, weight if needs[0] else None, *factors)
    else:
        ctx.save_for_backward(None, None, weight, *factors)

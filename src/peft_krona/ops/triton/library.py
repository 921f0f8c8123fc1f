# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels as differentiable ops: `fused_add`.

In eager mode they are one autograd.Function. Under torch.compile they are torch.library ops, each of which stays one
node of the graph; their dispatch from Python would take an eager step about 0.1 ms a layer more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ..._compat import dispatch_modes, unwrap_if_dead
from ..dtypes import no_autocast, scale_A, with_number
from ..node import Gradients, keep, run
from ..operands import Base, Frozen, Update
from ..plan import Plan
from ..torch_impl import frozen_linear


def fused_add(x: torch.Tensor, update: Update, base: Base, plan: Plan) -> torch.Tensor:
    """base + the product (..., out), for x (..., in) and a base (..., out) of any strides, of one dtype."""
    if torch.compiler.is_compiling() or dispatch_modes():  # the latter: tracing, fake tensors
        # s as an argument of the op would be a constant of the graph, and every change of it a new graph.
        A = scale_A(update.A, update.scale, x.dtype)
        others = (None, *base) if isinstance(base, Frozen) else (base, None, None)
        return fused(x, A, update.B, *others, plan.layout, plan.order)[0]
    update = with_number(update)
    rows = x
    if x.dim() != 2 and not x.is_contiguous():
        rows = x.reshape(-1, x.shape[-1])  # no copy where the rows are evenly apart, as in a slice of q, k and v
        base = base.reshape(rows.shape[0], -1) if isinstance(base, torch.Tensor) else base
    if torch.is_grad_enabled():
        y = run(FusedAdd, unwrap_if_dead(rows), update, base, plan)
    else:
        y, _ = _forward(rows, update, base, plan)
    return y if rows is x else y.view(*x.shape[:-1], y.shape[-1])


class FusedAdd(torch.autograd.Function):
    """`fused_add` in eager mode; see node.py for its arguments."""

    @staticmethod
    def forward(ctx: Any, x, A, B, base, settings):
        update, frozen, plan = settings
        y, h = _forward(x, update, base if frozen is None else frozen, plan)
        keep(ctx, (x, h), frozen, (A, B))
        ctx.plan, ctx.scale = plan, update.scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy):
        x, h, weight, A, B = ctx.saved_tensors
        needs = ctx.needs_input_grad
        gradients = _backward(dy, (x, h, weight), Update(A, B, ctx.scale), ctx.plan, needs[:3])
        return *gradients, dy if needs[3] else None, None


def _forward(x: torch.Tensor, update: Update, base: Base, plan: Plan) -> tuple[torch.Tensor, torch.Tensor]:
    """(y (..., out), h (T, intermediate)) for x (..., in)."""
    from . import launch

    if isinstance(base, Frozen):
        with no_autocast(x.device):
            y = frozen_linear(x, base).contiguous()
        base = y.view(-1, plan.n_out)  # owned here, so that the product is added in place
    else:
        y = x.new_empty(*x.shape[:-1], plan.n_out)
        base = None if base is None else base.reshape(-1, plan.n_out)
    return y, launch.forward(x.reshape(-1, x.shape[-1]), update, base, y.view(-1, plan.n_out), plan)


def _backward(dy: torch.Tensor, kept: tuple, update: Update, plan: Plan, needs: Sequence[bool]) -> Gradients:
    """(dX (..., in), dA, dB) from dy (..., out), None for what `needs` does not name.

    kept: x (..., in) and h (T, intermediate), which are not read for dX alone, and the frozen layer's weight (out, in),
    whose part is in dX, or None.
    """
    from . import launch

    (x, h, weight), (need_x, need_A, need_B) = kept, needs
    dy, dx, add = dy.contiguous(), None, need_x and weight is not None
    if need_x and weight is not None:
        with no_autocast(dy.device):
            dx = dy @ weight
    elif need_x:
        dx = dy.new_empty(*dy.shape[:-1], plan.n_in)
    dx_rows = None if dx is None else dx.reshape(-1, dx.shape[-1])
    factors = (x.reshape(-1, x.shape[-1]), h) if need_A or need_B else None
    dy_rows = dy.reshape(-1, dy.shape[-1])
    dA, dB = launch.backward(dy_rows, factors, update, launch.Into(dx_rows, add), plan)
    return dx, dA if need_A else None, dB if need_B else None


# -- the same under torch.compile: a schema takes neither tuples of tensors nor a Plan --------------------------------


@torch.library.custom_op(
    "peft_krona::fused",
    mutates_args=(),
    schema="(Tensor x, Tensor A, Tensor B, Tensor? base, Tensor? weight, Tensor? bias, str layout, str order) "
    "-> (Tensor, Tensor)",
)
def fused(x, A, B, base, weight, bias, layout, order):
    """(`fused_add` (..., out) with s = 1, h (T, intermediate)); shapes as in `FusedAdd`."""
    base = base if weight is None else Frozen(weight, bias)
    return _forward(x, Update(A, B), base, Plan.of(A, B, layout, order))


@fused.register_fake
def _(x, A, B, base, weight, bias, layout, order):
    plan = Plan.of(A, B, layout, order)
    tokens = x.numel() // x.shape[-1]
    return x.new_empty(*x.shape[:-1], plan.n_out), x.new_empty(tokens, plan.intermediate)


@torch.library.custom_op(
    "peft_krona::fused_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor x, Tensor h, Tensor A, Tensor B, Tensor? weight, str layout, str order, bool need_x, "
    "bool need_factors) -> (Tensor, Tensor, Tensor)",
)
def fused_backward(dy, x, h, A, B, weight, layout, order, need_x, need_factors):
    """(dX (..., in), dA, dB) from dy (..., out), empty where not needed; x, h and weight as in `_backward`."""
    needs, plan = (need_x, need_factors, need_factors), Plan.of(A, B, layout, order)
    gradients = _backward(dy, (x, h, weight), Update(A, B), plan, needs)
    return tuple(x.new_empty(0) if g is None else g for g in gradients)


@fused_backward.register_fake
def _(dy, x, h, A, B, weight, layout, order, need_x, need_factors):
    return (
        x.new_empty(x.shape if need_x else 0),
        A.new_empty(A.shape if need_factors else 0),
        B.new_empty(B.shape if need_factors else 0),
    )


def _save_for_op(ctx, inputs, output):
    x, A, B, _, weight, _, *settings = inputs
    ctx.save_for_backward(x, A, B, weight, output[1])
    ctx.settings = settings
    ctx.set_materialize_grads(False)  # no zeros for the intermediate, which nothing else uses


def _backward_of_op(ctx, dy, _):
    x, A, B, weight, h = ctx.saved_tensors
    need_x, need_A, need_B, need_base = ctx.needs_input_grad[:4]
    dx, dA, dB = fused_backward(dy, x, h, A, B, weight, *ctx.settings, need_x, need_A or need_B)
    return (
        dx if need_x else None,
        dA if need_A else None,
        dB if need_B else None,
        dy if need_base else None,
        *[None] * 4,
    )


fused.register_autograd(_backward_of_op, setup_context=_save_for_op)

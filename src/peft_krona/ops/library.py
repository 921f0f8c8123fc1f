# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels as differentiable ops: `fused_add`.

In eager mode they are one autograd.Function. Under torch.compile they are torch.library ops, each of which stays one
node of the graph; their dispatch from Python would take an eager step about 0.1 ms a layer more.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from .._compat import dispatch_modes
from .torch_impl import Plan, frozen_linear, no_autocast, scaled, scaled_by_number


def fused_add(
    x: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    scale: float | torch.Tensor,
    base: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    plan: Plan,
) -> torch.Tensor:
    """base + s * product (..., out), with base = x weight^T + bias where a weight is given, else `base` or 0.

    x (..., in) and base (..., out) of any strides; weight and bias frozen; A and B of any dtype, the rest of x's.
    """
    if torch.compiler.is_compiling() or dispatch_modes() > 0:  # the latter: tracing, fake tensors
        # s as an argument of the op would be a constant of the graph, and every change of it a new graph.
        return fused(x, scaled(A, scale, x.dtype), B, base, weight, bias, plan.layout, plan.order)[0]
    A, scale = scaled_by_number(A, scale)
    rows = x
    if x.dim() != 2 and not x.is_contiguous():
        rows = x.reshape(-1, x.shape[-1])  # no copy where the rows are evenly apart, as in a slice of q, k and v
        base = None if base is None else base.reshape(rows.shape[0], -1)
    if torch.is_grad_enabled():
        y = FusedAdd.apply(rows, A, B, base, weight, bias, plan, float(scale))
    else:
        y, _ = _forward(rows, A, B, base, weight, bias, float(scale), plan)
    return y if rows is x else y.view(*x.shape[:-1], y.shape[-1])


class FusedAdd(torch.autograd.Function):
    """`fused_add` in eager mode."""

    @staticmethod
    def forward(ctx, x, A, B, base, weight, bias, plan: Plan, scale: float):
        y, h = _forward(x, A, B, base, weight, bias, scale, plan)
        need_x, need_A, need_B = ctx.needs_input_grad[:3]
        x, h = (x, h) if need_A or need_B else (None, None)  # a frozen adapter's dX needs neither
        ctx.save_for_backward(x, A, B, weight if need_x else None, h)
        ctx.plan, ctx.scale = plan, scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, A, B, weight, h = ctx.saved_tensors
        need_x, need_A, need_B, need_base = ctx.needs_input_grad[:4]
        dx, dA, dB = _backward(dy, x, h, A, B, weight, ctx.scale, ctx.plan, need_x, need_A or need_B)
        return dx, dA if need_A else None, dB if need_B else None, dy if need_base else None, *[None] * 4


def _forward(x, A, B, base, weight, bias, scale, plan):
    """(y, h)."""
    from . import triton_kernels

    n_out = plan.a_out * plan.b_out
    if weight is None:
        y = x.new_empty(*x.shape[:-1], n_out)
        base = None if base is None else base.reshape(-1, n_out)
    else:
        with no_autocast(x.device):
            y = frozen_linear(x, weight, bias).contiguous()
        base = y.view(-1, n_out)  # owned here, so that the product is added in place
    return y, triton_kernels.forward(x.reshape(-1, x.shape[-1]), A, B, base, y.view(-1, n_out), scale, plan)


def _backward(dy, x, h, A, B, weight, scale, plan, need_x, need_factors):
    """(dX, dA, dB), None for what is not needed; dX with the frozen layer's part if there is a weight."""
    from . import triton_kernels

    dy, dx, add = dy.contiguous(), None, need_x and weight is not None
    if add:
        with no_autocast(dy.device):
            dx = dy @ weight
    elif need_x:
        dx = dy.new_empty(*dy.shape[:-1], plan.a_in * plan.b_in)
    rows = (t if t is None else t.reshape(-1, t.shape[-1]) for t in (dy, x, dx))
    return dx, *triton_kernels.backward(*rows, h, A, B, scale, plan, add, need_factors)


@torch.library.custom_op(
    "peft_krona::fused",
    mutates_args=(),
    schema="(Tensor x, Tensor A, Tensor B, Tensor? base, Tensor? weight, Tensor? bias, str layout, str order) "
    "-> (Tensor, Tensor)",
)
def fused(x, A, B, base, weight, bias, layout, order):
    """(`fused_add` with s = 1, intermediate)."""
    return _forward(x, A, B, base, weight, bias, 1.0, Plan.of(A, B, layout, order))


@fused.register_fake
def _(x, A, B, base, weight, bias, layout, order):
    plan = Plan.of(A, B, layout, order)
    tokens = x.numel() // x.shape[-1]
    return x.new_empty(*x.shape[:-1], plan.a_out * plan.b_out), x.new_empty(tokens, plan.intermediate)


@torch.library.custom_op(
    "peft_krona::fused_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor x, Tensor h, Tensor A, Tensor B, Tensor? weight, str layout, str order, bool need_x, "
    "bool need_factors) -> (Tensor, Tensor, Tensor)",
)
def fused_backward(dy, x, h, A, B, weight, layout, order, need_x, need_factors):
    """(dX, dA, dB), empty tensors for what is not needed. dX includes the frozen layer's part if there is a weight."""
    plan = Plan.of(A, B, layout, order)
    gradients = _backward(dy, x, h, A, B, weight, 1.0, plan, need_x, need_factors)
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

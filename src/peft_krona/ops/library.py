# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels as differentiable ops: `fused_add`.

In eager mode they are one autograd.Function. Under torch.compile they are torch.library ops, each of which stays one
node of the graph; their dispatch from Python would take an eager step about 130 us a layer more.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _get_current_dispatch_mode

from .torch_impl import Plan, cast, no_autocast, prepared, scaled_by_number


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
    """base + s * product (T, out), with base = x weight^T + bias where a weight is given, else `base` or 0.

    x (T, in), rows of any stride; base, weight and bias of x's dtype, weight and bias frozen.
    """
    if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:  # the latter: tracing, fake tensors
        return fused(x, *prepared(A, B, scale, x.dtype), base, weight, bias, plan.layout, plan.order)[0]
    A, scale = scaled_by_number(A, scale)
    return FusedAdd.apply(x, A, B, base, weight, bias, plan, scale)


class FusedAdd(torch.autograd.Function):
    """`fused_add` in eager mode. Scaling and casting the factors is part of the node."""

    @staticmethod
    def forward(ctx, x, A, B, base, weight, bias, plan: Plan, scale: float):
        mine = prepared(A, B, scale, x.dtype)
        y, h = _forward(x, *mine, base, weight, bias, plan)
        ctx.save_for_backward(x, *mine, weight, h)
        ctx.plan, ctx.scale, ctx.dtypes = plan, scale, (A.dtype, B.dtype)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, A, B, weight, h = ctx.saved_tensors
        need_x, need_A, need_B, need_base = ctx.needs_input_grad[:4]
        dx, dA, dB = _backward(dy, x, h, A, B, weight, ctx.plan, need_x, need_A or need_B, torch.float32)
        if need_A and ctx.scale != 1:
            dA = dA * ctx.scale
        dA, dB = cast(dA if need_A else None, ctx.dtypes[0]), cast(dB if need_B else None, ctx.dtypes[1])
        return dx, dA, dB, dy if need_base else None, *[None] * 4


def _forward(x, A, B, base, weight, bias, plan):
    """(y, h). The frozen layer's output is owned here, so that the product is added to it in place."""
    from . import triton_kernels

    if weight is None:
        return triton_kernels.forward(x, A, B, base, plan)
    with no_autocast(x.device):
        y = F.linear(x, weight, bias)
    return y, triton_kernels.forward_(x, A, B, y, plan)


def _backward(dy, x, h, A, B, weight, plan, need_x, need_factors, dtype):
    """(dX, dA, dB), None for what is not needed; dX with the frozen layer's part if there is a weight."""
    from . import triton_kernels

    with no_autocast(dy.device):
        dx = dy @ weight if need_x and weight is not None else None
    return triton_kernels.backward(dy, x, h, A, B, plan, dx, need_x, need_factors, dtype)


@torch.library.custom_op(
    "peft_krona::fused",
    mutates_args=(),
    schema="(Tensor x, Tensor A, Tensor B, Tensor? base, Tensor? weight, Tensor? bias, str layout, str order) "
    "-> (Tensor, Tensor)",
)
def fused(x, A, B, base, weight, bias, layout, order):
    """(`fused_add`, intermediate) for factors that are scaled and of x's dtype."""
    return _forward(x, A, B, base, weight, bias, Plan.of(A, B, layout, order))


@fused.register_fake
def _(x, A, B, base, weight, bias, layout, order):
    plan = Plan.of(A, B, layout, order)
    return x.new_empty(x.shape[0], plan.a_out * plan.b_out), x.new_empty(x.shape[0], plan.intermediate)


@torch.library.custom_op(
    "peft_krona::fused_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor x, Tensor h, Tensor A, Tensor B, Tensor? weight, str layout, str order, bool need_x, "
    "bool need_factors) -> (Tensor, Tensor, Tensor)",
)
def fused_backward(dy, x, h, A, B, weight, layout, order, need_x, need_factors):
    """(dX, dA, dB), empty tensors for what is not needed. dX includes the frozen layer's part if there is a weight."""
    plan = Plan.of(A, B, layout, order)
    gradients = _backward(dy, x, h, A, B, weight, plan, need_x, need_factors, A.dtype)
    return tuple(x.new_empty(0) if g is None else g for g in gradients)


@fused_backward.register_fake
def _(dy, x, h, A, B, weight, layout, order, need_x, need_factors):
    return (
        x.new_empty(x.shape if need_x else 0),
        A.new_empty(A.shape if need_factors else 0),
        B.new_empty(B.shape if need_factors else 0),
    )


def _save_for_op(ctx, inputs, output):
    x, A, B, _, weight, _, layout, order = inputs
    ctx.save_for_backward(x, A, B, weight, output[1])
    ctx.settings = layout, order
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

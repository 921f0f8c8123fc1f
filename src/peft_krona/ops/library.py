# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels as torch.library ops: torch.compile keeps each as one node and breaks no graph at it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .torch_impl import Plan, no_autocast


@torch.library.custom_op(
    "peft_krona::fused",
    mutates_args=(),
    schema="(Tensor x, Tensor A, Tensor B, Tensor? base, Tensor? weight, Tensor? bias, str layout, str order) "
    "-> (Tensor, Tensor)",
)
def fused(x, A, B, base, weight, bias, layout, order):
    """(base + product, intermediate), with base = x weight^T + bias where a weight is given, else `base` or 0.

    x (T, in), rows of any stride; all of one dtype. The frozen layer's output is owned here, so that the product is
    added to it in place.
    """
    from . import triton_kernels

    plan = Plan.of(A, B, layout, order)
    if weight is None:
        return triton_kernels.forward(x, A, B, base, plan)
    with no_autocast(x.device):
        y = F.linear(x, weight, bias)
    return y, triton_kernels.forward_(x, A, B, y, plan)


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
    from . import triton_kernels

    with no_autocast(dy.device):
        dx = dy @ weight if need_x and weight is not None else None
    gradients = triton_kernels.backward(dy, x, h, A, B, Plan.of(A, B, layout, order), dx, need_x, need_factors)
    return tuple(x.new_empty(0) if g is None else g for g in gradients)


@fused_backward.register_fake
def _(dy, x, h, A, B, weight, layout, order, need_x, need_factors):
    return (
        x.new_empty(x.shape if need_x else 0),
        A.new_empty(A.shape if need_factors else 0),
        B.new_empty(B.shape if need_factors else 0),
    )


def _save(ctx, inputs, output):
    x, A, B, _, weight, _, layout, order = inputs
    ctx.save_for_backward(x, A, B, weight, output[1])
    ctx.settings = layout, order
    ctx.set_materialize_grads(False)  # no zeros for the intermediate, which nothing else uses


def _backward(ctx, dy, _):
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


fused.register_autograd(_backward, setup_context=_save)

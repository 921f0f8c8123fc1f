# SPDX-License-Identifier: Apache-2.0
"""y = base + (sum_n A_n (x) B_n) x in plain torch, for any device, never building an (out, in) matrix.

With a row of x viewed as X (a_in, b_in), one term is Y = A X B^T of shape (a_out, b_out), laid out as (a_out, b_out)
for layout "kron" and as (b_out, a_out) for "diffusekrona". There are two orders, and the sum over the terms n rides
along in an inner dimension of both:

    b_first   U (T, a_in n, b_out) = X B^T   one GEMM over T*a_in rows;    Y += A U     see apply_A.py
    a_first   V (T, a_out n, b_in) = A X     batched over T;               Y += V B^T   one GEMM over T*a_out rows

U and V are the "intermediate" h. `matrices`, `first` and `second` are the contractions. `plain_op` is the
op as ordinary differentiable torch: torch.compile and torch.func differentiate and fuse that themselves. `KronAdd` is
the op as one autograd node, which spares passes over x and y: GEMMs accumulate y and dX in place (beta = 1) instead of
writing the adapter's part out and adding it afterwards. `inplace_op` is its forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F

from .apply_A import apply_A, backward_A, sum_over_tokens
from .dtypes import autocasts, cast_factors
from .node import Gradients, flat, keep
from .operands import Base, Frozen, Update
from .plan import Plan

Matrices: TypeAlias = tuple[torch.Tensor, torch.Tensor]  # mA and mB


def matrices(A: torch.Tensor, B: torch.Tensor, plan: Plan) -> Matrices:
    """A (r, a_out, a_in) and B (r, b_out, b_in) as the matrices mA and mB that multiply.

    b_first: (1, a_out, a_in n), (n b_out, b_in). a_first: (1, a_out n, a_in), (n b_in, b_out) for "kron",
    (1, a_in, n a_out), (b_out, b_in n) for "diffusekrona".
    """
    r, a_out, a_in, b_out, b_in, layout, order, _ = plan
    if order == "b_first":
        if r == 1:
            return A, B.squeeze(0)
        return A.permute(1, 2, 0).reshape(1, a_out, a_in * r), B.reshape(r * b_out, b_in)
    if layout == "kron":
        mA = A if r == 1 else A.permute(1, 0, 2).reshape(1, a_out * r, a_in)
        return mA, B.permute(0, 2, 1).reshape(r * b_in, b_out)
    return A.permute(2, 0, 1).reshape(1, a_in, r * a_out), B.permute(1, 2, 0).reshape(b_out, b_in * r)


def first(x: torch.Tensor, m: Matrices, plan: Plan) -> torch.Tensor:
    """x (..., in), contiguous -> h: U (T, a_in n, b_out) for b_first, V (T, a_out n, b_in) or (T, b_in n, a_out)."""
    r, a_out, a_in, b_out, b_in, layout, order, _ = plan
    X = x.view(-1, a_in, b_in)
    if order == "b_first":
        h = F.linear(X, m[1])
        return h if r == 1 else h.view(-1, a_in * r, b_out)
    if layout == "kron":
        return torch.bmm(m[0].expand(X.shape[0], -1, -1), X)
    return torch.bmm(X.transpose(1, 2), m[0].expand(X.shape[0], -1, -1)).view(-1, b_in * r, a_out)


def second(y: torch.Tensor | None, h: torch.Tensor, m: Matrices, plan: Plan) -> torch.Tensor:
    """y (..., out) + the product of h (T, intermediate), as in `first`; for y None the product alone, (T, out).

    y must be contiguous and owned by the caller: it is added to in place, inside the GEMM.
    """
    r, a_out, _, b_out, b_in, layout, order, _ = plan
    if order == "b_first":
        return apply_A(y, m[0], h, plan)
    if layout == "kron":
        h = h.view(-1, r * b_in)
        product = h @ m[1] if y is None else y.view(-1, b_out).addmm_(h, m[1])
    else:
        left = m[1].expand(h.shape[0], -1, -1)
        product = torch.bmm(left, h) if y is None else y.view(-1, b_out, a_out).baddbmm_(left, h)
    return product.view(-1, a_out * b_out) if y is None else y


def plain_op(x: torch.Tensor, update: Update, base: Base, plan: Plan) -> torch.Tensor:
    """base + the product (..., out) as ordinary torch ops, for x (..., in), contiguous."""
    if isinstance(base, Frozen):
        base = F.linear(x, *base)
    m = matrices(*cast_factors(update, x.dtype), plan)
    y = second(None, first(x, m, plan), m, plan).view(*x.shape[:-1], plan.a_out * plan.b_out)
    return y if base is None else base + y


def inplace_op(x: torch.Tensor, update: Update, base: Base, plan: Plan) -> tuple[torch.Tensor, torch.Tensor, Matrices]:
    """(base + the product (..., out), h, mA and mB in x's dtype), without a graph: GEMMs add to y in place.

    x (..., in) is contiguous.
    """
    m = matrices(*cast_factors(update, x.dtype), plan)
    h = first(x, m, plan)
    if base is None:
        y = second(None, h, m, plan)
        return y.view(*x.shape[:-1], y.shape[-1]).data, h, m  # no view, for autograd: see frozen_linear
    y = frozen_linear(x, base) if base.__class__ is Frozen else base.clone(memory_format=torch.contiguous_format)
    return second(y, h, m, plan), h, m


def frozen_linear(x: torch.Tensor, base: Frozen) -> torch.Tensor:
    """x weight^T + bias (..., out) for x (..., in), and no view to autograd: one made in a node must stay unchanged."""
    y = F.linear(x, base[0], base[1])
    return y if x.dim() == 2 else y.data


class KronAdd(torch.autograd.Function):
    """base + the product as one autograd node; see node.py for its arguments.

    x (..., in) is contiguous; base, weight and bias are of its dtype, weight and bias frozen. The frozen layer's GEMM
    and the product share one accumulator: y forward, dX backward. Scaling the factors by `scale`, a number, and
    casting them to x's dtype is part of the node.
    """

    @staticmethod
    def forward(ctx: Any, x, A, B, scale, base, weight, bias, plan: Plan):
        y, h, (mA, mB) = inplace_op(x, Update(A, B, scale), base if weight is None else Frozen(weight, bias), plan)
        # The matrices besides the factors: they are views of them, or copies as small.
        keep(ctx, x, h, weight, (A, B, None if mA is A else mA, mB))
        ctx.step = plan, scale
        return y

    @staticmethod
    def backward(ctx: Any, dy):
        if not autocasts(dy.device):
            return flat(ctx, _node_gradients(ctx, dy), dy)
        with torch.autocast(dy.device.type, enabled=False):
            return flat(ctx, _node_gradients(ctx, dy), dy)


def _node_gradients(ctx: Any, dy: torch.Tensor) -> Gradients:
    """(dX (..., in), dA, dB) from dy (..., out); dX with the frozen layer's part where there is one."""
    x, h, weight, A, B, mA, mB = ctx.saved_tensors
    (plan, scale), dy = ctx.step, dy.contiguous()
    m = A if mA is None else mA, mB
    if torch.is_grad_enabled():  # create_graph=True: what was computed without a graph must become part of one
        m = matrices(*cast_factors(Update(A, B, scale), dy.dtype), plan)
        h = None if x is None else first(x, m, plan)
    of_order = _gradients_b_first if plan[6] == "b_first" else _gradients_a_first
    dX, dA, dB = of_order(dy, (x, h), m, plan, ctx.needs_input_grad)
    if dX is not None:
        if weight is not None:  # the large GEMM reads dX as it goes: quicker than adding the adapter's part last
            dX.addmm_(dy if dy.dim() == 2 else dy.view(-1, dy.shape[-1]), weight)
        if dy.dim() != 2:
            dX = dX.view(*dy.shape[:-1], dX.shape[-1])
    if dA is not None:
        if scale != 1:
            dA = dA * scale
        if dA.dtype != A.dtype:
            dA = dA.to(A.dtype)
    if dB is not None and dB.dtype != B.dtype:
        dB = dB.to(B.dtype)
    return dX, dA, dB


# Both: (dX (T, in), dA, dB) from dy (..., out), contiguous, and `kept`: x (..., in) and h as in `first`, which may be
# None where dX alone is needed. dA and dB have the strides of contiguous factors, as DistributedDataParallel wants it;
# `contiguous` alone leaves those of sizes of 1.
Kept: TypeAlias = tuple[torch.Tensor, torch.Tensor]


def _gradients_b_first(dy: torch.Tensor, kept: Kept, m: Matrices, plan: Plan, needs: Sequence[bool]) -> Gradients:
    """dy (..., out)."""
    (x, U), (need_x, need_A, need_B) = kept, needs[:3]
    r, a_out, a_in, b_out, b_in, _, _, _ = plan
    dU, dA = backward_A(dy, m[0], U, plan, (need_x or need_B, need_A))
    dX = dB = None
    if dA is not None and r > 1:
        dA = dA.view(a_out, a_in, r).permute(2, 0, 1).contiguous()
    if dU is not None:
        dU = dU.view(-1, r * b_out)
        if need_B:
            dB = torch.mm(dU.t(), x.view(-1, b_in)).view(r, b_out, b_in)
        if need_x:
            dX = torch.mm(dU, m[1]).view(-1, a_in * b_in)
    return dX, dA, dB


def _gradients_a_first(dy: torch.Tensor, kept: Kept, m: Matrices, plan: Plan, needs: Sequence[bool]) -> Gradients:
    """dy (..., out)."""
    (x, V), (mA, mB), (need_x, need_A, need_B) = kept, m, needs[:3]
    r, a_out, a_in, b_out, b_in, layout, _, _ = plan
    T = dy.numel() // (a_out * b_out)
    X = x.view(T, a_in, b_in) if need_A else None
    dX = dA = dB = None
    if layout == "kron":
        g = dy.view(T * a_out, b_out)
        if need_B:
            dB = torch.mm(V.view(T * a_out, r * b_in).t(), g)
            dB = dB.view(r, b_in, b_out).mT.contiguous().view(r, b_out, b_in)
        if need_x or need_A:
            dV = torch.mm(g, mB.t()).view(T, a_out * r, b_in)
            if need_A:
                dA = sum_over_tokens(dV, X).view(a_out, r, a_in).transpose(0, 1).contiguous().view(r, a_out, a_in)
            if need_x:
                dX = torch.bmm(mA.mT.expand(T, -1, -1), dV).view(T, a_in * b_in)
        return dX, dA, dB
    g = dy.view(T, b_out, a_out)
    if need_B:
        dB = sum_over_tokens(g, V).reshape(b_out, b_in, r).permute(2, 0, 1).contiguous().view(r, b_out, b_in)
    if need_x or need_A:
        dV = torch.bmm(mB.t().expand(T, -1, -1), g).view(T, b_in, r * a_out)
        if need_A:
            dA = sum_over_tokens(X, dV.mT).reshape(a_in, r, a_out).permute(1, 2, 0)
            dA = dA.contiguous().view(r, a_out, a_in)
        if need_x:
            dX = torch.bmm(mA.expand(T, -1, -1), dV.mT).view(T, a_in * b_in)
    return dX, dA, dB

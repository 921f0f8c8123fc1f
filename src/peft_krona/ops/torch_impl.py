# SPDX-License-Identifier: Apache-2.0
"""y = base + (sum_n A_n (x) B_n) x in plain torch, for any device, never building an (out, in) matrix.

With a row of x viewed as X (a_in, b_in), one term is Y = A X B^T of shape (a_out, b_out), laid out as (a_out, b_out)
for layout "kron" and as (b_out, a_out) for "diffusekrona". There are two orders, and the sum over the terms n rides
along in an inner dimension of both:

    b_first   U (T, a_in n, b_out) = X B^T   one GEMM over T*a_in rows;    Y += A U     see apply_A.py
    a_first   V (T, a_out n, b_in) = A X     batched over T;               Y += V B^T   one GEMM over T*a_out rows

U and V are the "intermediate" h. `multiply` and `gradients` are the contractions. `plain_op` is the op as ordinary
differentiable torch: torch.compile and torch.func differentiate and fuse that themselves. `KronAdd` is the op as one
autograd node, which spares passes over x and y: GEMMs accumulate y and dX in place (beta = 1) instead of writing the
adapter's part out and adding it afterwards. `inplace_op` is its forward. Views and frames are few on purpose: of
layers with few tokens they are most of the time, and a view costs a CPU as much as a small product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F

from .._compat import any_autocast
from .apply_A import apply_A, backward_A, sum_over_tokens
from .dtypes import autocasts, cast_factors
from .node import Gradients, keep
from .operands import Base, Frozen, Update
from .plan import Plan

Matrices: TypeAlias = tuple[torch.Tensor, torch.Tensor]  # mA and mB
Kept: TypeAlias = tuple[torch.Tensor, torch.Tensor]  # x and h


def matrices(update: Update, dtype: torch.dtype, plan: Plan) -> Matrices:
    """s A (r, a_out, a_in) and B (r, b_out, b_in) in `dtype` as the matrices mA and mB that multiply.

    b_first: (1, a_out, a_in n), without the 1 where `apply_A` wants a matrix, and (n b_out, b_in). a_first:
    (1, a_out n, a_in), (n b_in, b_out) for "kron", (1, a_in, n a_out), (b_out, b_in n) for "diffusekrona".
    """
    A, B, scale = update
    if A.dtype is not dtype or B.dtype is not dtype or isinstance(scale, torch.Tensor) or scale != 1:
        A, B = cast_factors(update, dtype)
    r, a_out, a_in, b_out, b_in, layout, order, variant, _, _ = plan
    if order == "b_first":
        plain = variant == "expanded" and b_out == 1
        if r == 1:
            return A.view(a_out, a_in) if plain else A, B.view(b_out, b_in)
        sizes = (a_out, a_in * r) if plain else (1, a_out, a_in * r)
        return A.permute(1, 2, 0).reshape(sizes), B.reshape(r * b_out, b_in)
    if layout == "kron":
        mA = A if r == 1 else A.permute(1, 0, 2).reshape(1, a_out * r, a_in)
        return mA, B.permute(0, 2, 1).reshape(r * b_in, b_out)
    return A.permute(2, 0, 1).reshape(1, a_in, r * a_out), B.permute(1, 2, 0).reshape(b_out, b_in * r)


def multiply(y: torch.Tensor | None, x: torch.Tensor, m: Matrices, plan: Plan) -> tuple[torch.Tensor, torch.Tensor]:
    """(y (..., out) + the product of x (..., in), contiguous; h), or for y None the product alone, (T, out), and h.

    h is U (T, a_in n, b_out) for b_first, which "expanded" wants as (T, a_in n b_out), V (T, a_out n, b_in) or
    (T, b_in n, a_out) for a_first. y must be contiguous and owned by the caller: it is added to in place, inside the
    GEMM.
    """
    (mA, mB), (r, a_out, a_in, b_out, b_in, layout, order, variant, _, turned) = m, plan
    if order == "b_first":
        if variant == "expanded":
            h = F.linear(x.view(-1, b_in), mB).view(-1, a_in * r * b_out)
        elif turned:
            h = torch.mm(mB, x.view(-1, b_in).t()).t().contiguous().view(-1, a_in * r, b_out)
        else:
            h = F.linear(x.view(-1, a_in, b_in), mB)
            h = h if r == 1 else h.view(-1, a_in * r, b_out)
        return apply_A(y, mA, h, plan), h
    X = x.view(-1, a_in, b_in)
    T = X.shape[0]
    if layout == "kron":
        h = torch.bmm(mA.expand(T, -1, -1), X)
        rows = h.view(-1, r * b_in)
        product = rows @ mB if y is None else y.view(-1, b_out).addmm_(rows, mB)
    else:
        h = torch.bmm(X.transpose(1, 2), mA.expand(T, -1, -1)).view(-1, b_in * r, a_out)
        left = mB.expand(T, -1, -1)
        product = torch.bmm(left, h) if y is None else y.view(-1, b_out, a_out).baddbmm_(left, h)
    return product.view(-1, a_out * b_out) if y is None else y, h


def plain_op(x: torch.Tensor, update: Update, base: Base, plan: Plan) -> torch.Tensor:
    """base + the product (..., out) as ordinary torch ops, for x (..., in), contiguous."""
    if isinstance(base, Frozen):
        base = F.linear(x, *base)
    y = multiply(None, x, matrices(update, x.dtype, plan), plan)[0].view(*x.shape[:-1], plan.a_out * plan.b_out)
    return y if base is None else base + y


def inplace_op(x: torch.Tensor, update: Update, base: Base, plan: Plan) -> tuple[torch.Tensor, Kept, Matrices]:
    """(base + the product (..., out), x and h as multiplied, mA and mB), without a graph: GEMMs add to y in place.

    x (..., in) is contiguous.
    """
    dtype = x.dtype
    y: torch.Tensor | None
    if type(base) is Frozen:
        y = frozen_linear(x, base)
    else:
        y = None if base is None else base.clone(memory_format=torch.contiguous_format)
    if plan[8]:  # in fp32, and added before it is rounded
        x = x.float()
        m = matrices(update, x.dtype, plan)
        product, h = multiply(None, x, m, plan)
        if y is not None:
            (y if y.dim() == 2 else y.view(-1, y.shape[-1])).add_(product)
            return y, (x, h), m
    else:
        m = matrices(update, dtype, plan)
        product, h = multiply(y, x, m, plan)
        if y is not None:
            return y, (x, h), m
    return product.view(*x.shape[:-1], product.shape[1]).to(dtype).data, (x, h), m  # no view: see frozen_linear


def frozen_linear(x: torch.Tensor, base: Frozen) -> torch.Tensor:
    """x weight^T + bias (..., out) for x (..., in), and no view to autograd: one made in a node must stay unchanged."""
    y = F.linear(x, base[0], base[1])
    return y if x.dim() == 2 else y.data


class KronAdd(torch.autograd.Function):
    """base + the product as one autograd node; see node.py for its arguments.

    x (..., in) is contiguous; base and the frozen layer are of its dtype. The frozen layer's GEMM and the product share
    one accumulator: y forward, dX backward. Scaling the factors by s, a number, and casting them is part of the node.
    """

    @staticmethod
    def forward(ctx: Any, x, A, B, base, settings):
        update, frozen, plan = settings
        y, kept, (mA, mB) = inplace_op(x, update, base if frozen is None else frozen, plan)
        # The matrices besides the factors: they are views of them, or copies as small.
        keep(ctx, kept, frozen, (A, B, None if mA is A else mA, mB))
        ctx.settings = update[2], plan  # not the frozen layer: its weight is kept if it is needed
        return y

    @staticmethod
    def backward(ctx: Any, dy):
        """A gradient in a wider dtype than its factor is cast by autograd."""
        if any_autocast() and autocasts(dy.device):
            with torch.autocast(dy.device.type, enabled=False):
                return _node_gradients(ctx, dy)
        return _node_gradients(ctx, dy)


def _node_gradients(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """The gradients of `KronAdd`'s arguments from dy (..., out); that of x with the frozen layer's part."""
    x, h, weight, A, B, mA, mB = ctx.saved_tensors
    (scale, plan), needs = ctx.settings, ctx.needs_input_grad
    if not dy.is_contiguous():
        dy = dy.contiguous()
    g = dy.float() if plan[8] else dy
    m, kept = (A if mA is None else mA, mB), (x, h)
    if torch.is_grad_enabled():  # create_graph=True: what was computed without a graph must become part of one
        m = matrices(Update(A, B, scale), g.dtype, plan)
        if x is not None:
            kept = x, multiply(None, x, m, plan)[1]
    dX, dA, dB = (_gradients_b_first if plan[6] == "b_first" else _gradients_a_first)(g, kept, m, plan, needs)
    if dX is not None:
        if weight is not None:
            rows = dy if dy.dim() == 2 else dy.view(-1, dy.shape[-1])
            # The large GEMM reads dX as it goes: quicker than adding the adapter's part last.
            dX = dX.addmm_(rows, weight) if g is dy else torch.mm(rows, weight).add_(dX)
        if dy.dim() != 2:
            dX = dX.view(*dy.shape[:-1], dX.shape[-1])
    if dA is not None and scale != 1:
        dA = dA * scale
    return dX, dA, dB, dy if needs[3] else None, None


# Both: (dX (T, in), dA, dB) from dy (..., out), contiguous, and `kept`: x (..., in) and h as in `multiply`, which may
# be None where dX alone is needed. dA and dB have the strides of contiguous factors, as DistributedDataParallel wants
# it; `contiguous` alone leaves those of sizes of 1.


def _gradients_b_first(dy: torch.Tensor, kept: Kept, m: Matrices, plan: Plan, needs: Sequence[bool]) -> Gradients:
    """dy (..., out)."""
    (x, U), (need_x, need_A, need_B, _, _), (r, a_out, a_in, b_out, b_in, _, _, _, _, _) = kept, needs, plan
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
    r, a_out, a_in, b_out, b_in, layout, *_ = plan
    T = dy.numel() // (a_out * b_out)
    dX = dA = dB = None
    if layout == "kron":
        g = dy.view(T * a_out, b_out)
        if need_B:
            dB = torch.mm(V.view(T * a_out, r * b_in).t(), g)
            dB = dB.view(r, b_in, b_out).mT.contiguous().view(r, b_out, b_in)
        if need_x or need_A:
            dV = torch.mm(g, mB.t()).view(T, a_out * r, b_in)
            if need_A:
                dA = sum_over_tokens(dV, x.view(T, a_in, b_in)).view(a_out, r, a_in).transpose(0, 1)
                dA = dA.contiguous().view(r, a_out, a_in)
            if need_x:
                dX = torch.bmm(mA.mT.expand(T, -1, -1), dV).view(T, a_in * b_in)
        return dX, dA, dB
    g = dy.view(T, b_out, a_out)
    if need_B:
        dB = sum_over_tokens(g, V).reshape(b_out, b_in, r).permute(2, 0, 1).contiguous().view(r, b_out, b_in)
    if need_x or need_A:
        dV = torch.bmm(mB.t().expand(T, -1, -1), g).view(T, b_in, r * a_out)
        if need_A:
            dA = sum_over_tokens(x.view(T, a_in, b_in), dV.mT).reshape(a_in, r, a_out).permute(1, 2, 0)
            dA = dA.contiguous().view(r, a_out, a_in)
        if need_x:
            dX = torch.bmm(mA.expand(T, -1, -1), dV.mT).view(T, a_in * b_in)
    return dX, dA, dB

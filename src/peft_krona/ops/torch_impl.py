# SPDX-License-Identifier: Apache-2.0
"""y = base + (sum_n A_n (x) B_n) x in plain torch, for any device, never building an (out, in) matrix.

Symbols: T tokens (rows of x), K = a_in, v = b_in, I = a_out, u = b_out, n = one of the r terms. With a row of x viewed
as X (K, v), one term is Y = A X B^T of shape (I, u), laid out as (I, u) for layout "kron" and as (u, I) for
"diffusekrona". There are two orders, and the sum over the terms rides along in an inner dimension of both:

    b_first   U (T, K n, u) = X B^T   one GEMM over T*K rows;     Y += A U     see mix.py
    a_first   V (T, I n, v) = A X     batched over T;             Y += V B^T   one GEMM over T*I rows

`Plan` holds the sizes, the order, the form of the product with A, and the three contractions that forward and backward
are made of. `factored` is the op as ordinary differentiable torch: torch.compile and torch.func differentiate and fuse
that themselves. `KronAdd` is the op as one autograd node, which spares passes over x and y: GEMMs accumulate y and dX
in place (beta = 1) instead of writing the adapter's part out and adding it afterwards. `accumulated` is its forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..factors import cheaper_order
from .mix import MANY, default_form, mix, mix_add_, mix_backward, sum_over_tokens


class Plan(NamedTuple):
    """Sizes, contraction order and form (mix.py; b_first only) of one Kronecker product."""

    r: int
    a_out: int
    a_in: int
    b_out: int
    b_in: int
    layout: str
    order: str
    form: str

    @classmethod
    def of(
        cls,
        A: torch.Tensor,
        B: torch.Tensor,
        layout: str,
        order: str | None = None,
        form: str | None = None,
        tokens: int = MANY,
    ) -> Plan:
        """The plan for A (r, a_out, a_in) and B (r, b_out, b_in), in the order and form that suit them if not given.

        tokens: about how many there are.
        """
        return cls.of_shapes(A.shape, B.shape, layout, order, form, A.device.type, A.dtype, tokens)

    @classmethod
    def of_shapes(
        cls,
        A: tuple[int, ...],
        B: tuple[int, ...],
        layout: str,
        order: str | None,
        form: str | None,
        device: str,
        dtype: torch.dtype,
        tokens: int,
    ) -> Plan:
        """`of` for factors of these shapes. dtype: that of the computation."""
        r, a_out, a_in, b_out, b_in = (*A, *B[1:3])
        order = order or cheaper_order(a_out, a_in, b_out, b_in)
        if form is None:
            form = default_form(r * a_in, b_out, a_out, a_in * b_in, layout, device, dtype, tokens)
        return cls(r, a_out, a_in, b_out, b_in, layout, order, form)

    @property
    def intermediate(self) -> int:
        """Values a token between the two contractions."""
        return self.r * (self.a_in * self.b_out if self.order == "b_first" else self.a_out * self.b_in)

    def matrices(self, A: torch.Tensor, B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B as the matrices that multiply: (I, K n), (n u, v) | (I n, K), (n v, u) | (K, n I), (u, v n)."""
        r, a_out, a_in, b_out, b_in, layout, order, _ = self
        if order == "b_first":
            if r == 1:
                return A.squeeze(0), B.squeeze(0)
            return A.permute(1, 2, 0).reshape(a_out, a_in * r), B.reshape(r * b_out, b_in)
        if layout == "kron":
            return A.permute(1, 0, 2).reshape(a_out * r, a_in), B.permute(0, 2, 1).reshape(r * b_in, b_out)
        return A.permute(2, 0, 1).reshape(a_in, r * a_out), B.permute(1, 2, 0).reshape(b_out, b_in * r)

    def first(self, x: torch.Tensor, mA: torch.Tensor, mB: torch.Tensor) -> torch.Tensor:
        """x (..., in) -> the intermediate: U (T, K n, u) for b_first, V (T, I n, v) or (T, v n, I) for a_first."""
        r, a_out, a_in, b_out, b_in, layout, order, _ = self
        T = x.numel() // (a_in * b_in)
        if order == "b_first":
            h = F.linear(x.view(T, a_in, b_in), mB)
            return h if r == 1 else h.view(T, a_in * r, b_out)
        X = x.view(T, a_in, b_in)
        if layout == "kron":
            return torch.bmm(mA.expand(T, -1, -1), X)
        return torch.bmm(X.transpose(1, 2), mA.expand(T, -1, -1)).view(T, b_in * r, a_out)

    def second(self, h: torch.Tensor, mA: torch.Tensor, mB: torch.Tensor) -> torch.Tensor:
        """The intermediate -> (T, out), as a new tensor."""
        r, a_out, _, b_out, b_in, layout, order, form = self
        T = h.shape[0]
        if order == "b_first":
            return mix(mA, h, layout, form)
        if layout == "kron":
            y = h.view(T * a_out, r * b_in) @ mB
        else:
            y = torch.bmm(mB.expand(T, -1, -1), h)
        return y.reshape(T, a_out * b_out)

    def second_add_(self, y: torch.Tensor, h: torch.Tensor, mA: torch.Tensor, mB: torch.Tensor) -> None:
        """y (..., out) += second(h), inside the GEMM. y must be contiguous and owned by the caller."""
        r, a_out, _, b_out, b_in, layout, order, form = self
        T = h.shape[0]
        if order == "b_first":
            mix_add_(y, mA, h, layout, form)
        elif layout == "kron":
            y.view(T * a_out, b_out).addmm_(h.view(T * a_out, r * b_in), mB)
        else:
            y.view(T, b_out, a_out).baddbmm_(mB.expand(T, -1, -1), h)

    def backward(
        self,
        dy: torch.Tensor,
        x: torch.Tensor,
        h: torch.Tensor,
        mA: torch.Tensor,
        mB: torch.Tensor,
        needs: Sequence[bool],
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """(dX (T, in), dA, dB) from dy (..., out), x (..., in) and the intermediate, each only if `needs` says so.

        For dX alone x and the intermediate may be None.

        dA and dB are of A's and B's shape and contiguous, as DistributedDataParallel wants them.
        """
        of_order = self._backward_b_first if self.order == "b_first" else self._backward_a_first
        return of_order(dy, x, h, mA, mB, *needs[:3])

    def _backward_b_first(self, dy, x, U, mA, mB, need_x, need_A, need_B):
        r, a_out, a_in, b_out, b_in, layout, _, form = self
        dU, dA = mix_backward(dy, mA, U, need_x or need_B, need_A, layout, form)
        dX = dB = None
        if dA is not None:
            if r > 1:
                dA = dA.reshape(a_out, a_in, r).permute(2, 0, 1)
            dA = dA.contiguous().view(r, a_out, a_in)
        if dU is not None:
            rows = len(dU) * a_in
            dU = dU.view(rows, r * b_out)
            if need_B:
                dB = torch.mm(dU.t(), x.view(rows, b_in)).view(r, b_out, b_in)
            if need_x:
                dX = torch.mm(dU, mB).view(-1, a_in * b_in)
        return dX, dA, dB

    def _backward_a_first(self, dy, x, V, mA, mB, need_x, need_A, need_B):
        r, a_out, a_in, b_out, b_in, layout, _, _ = self
        T = dy.numel() // (a_out * b_out)
        X = x.view(T, a_in, b_in) if need_A else None
        dX = dA = dB = None
        if layout == "kron":
            g = dy.view(T * a_out, b_out)
            if need_B:
                dB = torch.mm(V.view(T * a_out, r * b_in).t(), g)
                dB = dB.view(r, b_in, b_out).mT.contiguous()
            if need_x or need_A:
                dV = torch.mm(g, mB.t()).view(T, a_out * r, b_in)
                if need_A:
                    dA = sum_over_tokens(dV, X).reshape(a_out, r, a_in).transpose(0, 1).contiguous()
                if need_x:
                    dX = torch.bmm(mA.t().expand(T, -1, -1), dV).view(T, a_in * b_in)
            return dX, dA, dB
        g = dy.view(T, b_out, a_out)
        if need_B:
            dB = sum_over_tokens(g, V).reshape(b_out, b_in, r).permute(2, 0, 1).contiguous()
        if need_x or need_A:
            dV = torch.bmm(mB.t().expand(T, -1, -1), g).view(T, b_in, r * a_out)
            if need_A:
                dA = sum_over_tokens(X, dV.mT).reshape(a_in, r, a_out).permute(1, 2, 0).contiguous()
            if need_x:
                dX = torch.bmm(mA.expand(T, -1, -1), dV.mT).view(T, a_in * b_in)
        return dX, dA, dB


def prepared(
    A: torch.Tensor, B: torch.Tensor, scale: float | torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """s * A and B in the compute dtype."""
    A = scaled(A, scale, dtype)
    return A if A.dtype == dtype else A.to(dtype), B if B.dtype == dtype else B.to(dtype)


def scaled(A: torch.Tensor, scale: float | torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """s * A in A's dtype or `dtype`, whichever is wider: before rounding to the compute dtype, not after it."""
    if isinstance(scale, torch.Tensor) or scale != 1:
        A = A.to(torch.promote_types(A.dtype, dtype)) * scale
    return A


def scaled_by_number(A: torch.Tensor, scale: float | torch.Tensor) -> tuple[torch.Tensor, float]:
    """A and the number to scale it by. A tensor as s (module_dropout draws one) is multiplied in at once."""
    return (A * scale, 1.0) if isinstance(scale, torch.Tensor) else (A, scale)


def factored(x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, base: torch.Tensor | None, plan: Plan) -> torch.Tensor:
    """base + the product (..., out), as ordinary torch ops. x (..., in), base (..., out) or None; all of one dtype."""
    mA, mB = plan.matrices(A, B)
    y = plan.second(plan.first(x, mA, mB), mA, mB).view(*x.shape[:-1], plan.a_out * plan.b_out)
    return y if base is None else base + y


def accumulated(
    x: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    base: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    plan: Plan,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """(y, the intermediate, `prepared` factors), without a graph: y is added to in place. Arguments as in `KronAdd`."""
    factors = prepared(A, B, scale, x.dtype)
    mA, mB = plan.matrices(*factors)
    h = plan.first(x, mA, mB)
    if weight is None and base is None:
        y = plan.second(h, mA, mB)
        return y.view(*x.shape[:-1], y.shape[-1]).data, h, factors  # no view either
    if weight is None:
        y = base.clone(memory_format=torch.contiguous_format)
    else:
        y = frozen_linear(x, weight, bias)
    plan.second_add_(y, h, mA, mB)
    return y, h, factors


def frozen_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """F.linear(x, weight, bias), and no view to autograd: one made in a node cannot be changed in place."""
    return F.linear(x, weight, bias).data


class KronAdd(torch.autograd.Function):
    """base + the product (..., out) as one autograd node; base = x W^T + bias where there is a weight, else base or 0.

    x (..., in) is contiguous; base, weight and bias are of its dtype, weight and bias frozen. The frozen layer's GEMM
    and the product share one accumulator: y forward, dX backward. Scaling the factors by `scale` (a number) and
    casting them to x's dtype is part of the node.
    """

    @staticmethod
    def forward(ctx, x, A, B, base, weight, bias, plan: Plan, scale: float):
        y, h, (sA, sB) = accumulated(x, A, B, base, weight, bias, plan, scale)
        need_x, need_A, need_B = ctx.needs_input_grad[:3]
        x, h = (x, h) if need_A or need_B else (None, None)  # a frozen adapter's dX needs neither
        # factors that were neither scaled nor cast are not saved twice
        sA, sB = None if sA is A else sA, None if sB is B else sB
        ctx.save_for_backward(x, A, B, h, sA, sB, weight if need_x else None)
        ctx.plan, ctx.scale = plan, scale
        return y

    @staticmethod
    def backward(ctx, dy):
        with no_autocast(dy.device):
            dX, dA, dB = _gradients(ctx, dy)
        return dX, dA, dB, dy if ctx.needs_input_grad[3] else None, None, None, None, None


def _gradients(ctx, dy):
    """(dX, dA, dB); dX with the frozen layer's part where there is one."""
    x, A, B, h, sA, sB, weight = ctx.saved_tensors
    plan, scale, dy = ctx.plan, ctx.scale, dy.contiguous()
    if torch.is_grad_enabled():  # create_graph=True: what was computed without a graph must become part of one
        mA, mB = plan.matrices(*prepared(A, B, scale, dy.dtype))
        h = None if x is None else plan.first(x, mA, mB)
    else:
        mA, mB = plan.matrices(A if sA is None else sA, B if sB is None else sB)
    dX, dA, dB = plan.backward(dy, x, h, mA, mB, ctx.needs_input_grad)
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


def no_autocast(device: torch.device) -> AbstractContextManager:
    """A context in which torch computes in the tensors' own dtype; where it does so already, one that costs nothing."""
    return torch.autocast(device.type, enabled=False) if autocasts(device) else nullcontext()


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for tensors of this device; a meta device, for one, has none and raises if asked."""
    kind = device.type
    return (kind in ("cpu", "cuda") or torch.amp.is_autocast_available(kind)) and torch.is_autocast_enabled(kind)

# SPDX-License-Identifier: Apache-2.0
"""y = base + (sum_n A_n (x) B_n) x in plain torch, for any device, never building an (out, in) matrix.

Symbols: T tokens (rows of x), K = a_in, v = b_in, I = a_out, u = b_out, n = one of the r terms. With a row of x viewed
as X (K, v), one term is Y = A X B^T of shape (I, u), laid out as (I, u) for layout "kron" and as (u, I) for
"diffusekrona". There are two orders, and the sum over the terms rides along in an inner dimension of both:

    b_first   U (T, K n, u) = X B^T   one GEMM over T*K rows;     Y += A U     see mix.py
    a_first   V (T, I n, v) = A X     batched over T;             Y += V B^T   one GEMM over T*I rows

`Plan` holds the sizes, the order, the form of the product with A, and the three contractions that forward and backward
are made of. `factored` is the op as ordinary differentiable torch: torch.compile and torch.func differentiate and fuse
that themselves. `KronAdd` and `LinearKronAdd` are the op as one autograd node, which spares passes over x and y: GEMMs
accumulate y and dX in place (beta = 1) instead of writing the adapter's part out and adding it afterwards.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..factors import cheaper_order
from .mix import MANY, default_form, mix, mix_add_, mix_backward, mix_gradient, sum_over_tokens


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
            mA = A.squeeze(0) if r == 1 else A.permute(1, 2, 0).reshape(a_out, a_in * r)
            return mA, B.reshape(r * b_out, b_in)
        if layout == "kron":
            return A.permute(1, 0, 2).reshape(a_out * r, a_in), B.permute(0, 2, 1).reshape(r * b_in, b_out)
        return A.permute(2, 0, 1).reshape(a_in, r * a_out), B.permute(1, 2, 0).reshape(b_out, b_in * r)

    def unmatrix_A(self, dA: torch.Tensor) -> torch.Tensor:
        """Inverse of `matrices` for A (here: for its gradient)."""
        r, a_out, a_in, _, _, layout, order, _ = self
        if order == "b_first":
            return dA.unsqueeze(0) if r == 1 else dA.reshape(a_out, a_in, r).permute(2, 0, 1)
        return (
            dA.view(a_out, r, a_in).permute(1, 0, 2) if layout == "kron" else dA.view(a_in, r, a_out).permute(1, 2, 0)
        )

    def unmatrix_B(self, dB: torch.Tensor) -> torch.Tensor:
        """Inverse of `matrices` for B."""
        r, _, _, b_out, b_in, layout, order, _ = self
        if order == "b_first":
            return dB.view(r, b_out, b_in)
        return (
            dB.view(r, b_in, b_out).permute(0, 2, 1) if layout == "kron" else dB.view(b_out, b_in, r).permute(2, 0, 1)
        )

    def first(self, x: torch.Tensor, mA: torch.Tensor, mB: torch.Tensor) -> torch.Tensor:
        """x (T, in) -> the intermediate: U (T, K n, u) for b_first, V (T, I n, v) or (T, v n, I) for a_first."""
        r, a_out, a_in, b_out, b_in, layout, order, _ = self
        T = x.shape[0]
        if order == "b_first":
            return (x.view(T * a_in, b_in) @ mB.t()).view(T, a_in * r, b_out)
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
        """y (T, out) += second(h), inside the GEMM. y must be contiguous and owned by the caller."""
        r, a_out, _, b_out, b_in, layout, order, form = self
        T = h.shape[0]
        if order == "b_first":
            mix_add_(y, mA, h, layout, form)
        elif layout == "kron":
            y.view(T * a_out, b_out).addmm_(h.view(T * a_out, r * b_in), mB)
        else:
            y.view(T, b_out, a_out).baddbmm_(mB.expand(T, -1, -1), h)

    def second_backward(
        self, dy: torch.Tensor, h: torch.Tensor, mA: torch.Tensor, mB: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(gradient of the intermediate, gradient of the matrix that `second` multiplied with)."""
        r, a_out, _, b_out, b_in, layout, order, form = self
        T = h.shape[0]
        if order == "b_first":
            return mix_backward(dy, mA, b_out, layout, form), mix_gradient(dy, h, a_out, layout, form)
        if layout == "kron":
            g = dy.view(T * a_out, b_out)
            return (g @ mB.t()).view(T, a_out * r, b_in), h.view(T * a_out, r * b_in).t() @ g
        g = dy.view(T, b_out, a_out)
        return torch.bmm(mB.t().expand(T, -1, -1), g), sum_over_tokens(g, h.transpose(1, 2))

    def first_backward_B(self, dh: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Gradient of the matrix that `first` multiplied with: mB for b_first, mA for a_first."""
        r, a_out, a_in, b_out, b_in, layout, order, _ = self
        T = x.shape[0]
        if order == "b_first":
            return dh.view(T * a_in, r * b_out).t() @ x.view(T * a_in, b_in)
        X = x.view(T, a_in, b_in)
        if layout == "kron":
            return sum_over_tokens(dh, X.transpose(1, 2))
        return sum_over_tokens(X, dh.view(T, b_in, r * a_out))

    def first_backward_x(self, dh: torch.Tensor, mA: torch.Tensor, mB: torch.Tensor) -> torch.Tensor:
        """dX (T, in), as a new tensor."""
        r, a_out, a_in, b_out, b_in, layout, order, _ = self
        T = dh.shape[0]
        if order == "b_first":
            dx = dh.view(T * a_in, r * b_out) @ mB
        elif layout == "kron":
            dx = torch.bmm(mA.t().expand(T, -1, -1), dh)
        else:
            dx = torch.bmm(mA.expand(T, -1, -1), dh.view(T, b_in, r * a_out).transpose(1, 2))
        return dx.view(T, a_in * b_in)

    def backward(
        self,
        dy: torch.Tensor,
        x: torch.Tensor,
        h: torch.Tensor,
        mA: torch.Tensor,
        mB: torch.Tensor,
        needs: tuple[bool, bool, bool],
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """(dX, dA, dB) from dy (T, out), x (T, in) and the intermediate, each only if `needs` says so."""
        need_x, need_A, need_B = needs
        dh, d_second = self.second_backward(dy, h, mA, mB)
        d_first = None
        if need_B if self.order == "b_first" else need_A:
            d_first = self.first_backward_B(dh, x)
        dmA, dmB = (d_second, d_first) if self.order == "b_first" else (d_first, d_second)
        return (
            self.first_backward_x(dh, mA, mB) if need_x else None,
            self.unmatrix_A(dmA) if need_A and dmA is not None else None,
            self.unmatrix_B(dmB) if need_B and dmB is not None else None,
        )


def prepared(
    A: torch.Tensor, B: torch.Tensor, scale: float | torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """s * A and B in the compute dtype. Scaling is done in the wider of the two dtypes, before rounding to one."""
    if isinstance(scale, torch.Tensor) or scale != 1:
        A = A.to(torch.promote_types(A.dtype, dtype)) * scale
    return A if A.dtype == dtype else A.to(dtype), B if B.dtype == dtype else B.to(dtype)


def scaled_by_number(A: torch.Tensor, scale: float | torch.Tensor) -> tuple[torch.Tensor, float]:
    """A and the number to scale it by. A tensor as s (module_dropout draws one) is multiplied in at once."""
    return (A * scale, 1.0) if isinstance(scale, torch.Tensor) else (A, scale)


def factored(x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, base: torch.Tensor | None, plan: Plan) -> torch.Tensor:
    """base + the product, as ordinary torch ops. x (T, in), base (T, out) or None; all of one dtype."""
    mA, mB = plan.matrices(A, B)
    y = plan.second(plan.first(x, mA, mB), mA, mB)
    return y if base is None else base + y


class KronAdd(torch.autograd.Function):
    """base + the product as one autograd node. x (T, in) contiguous, base (T, out) or None, both of one dtype.

    Scaling the factors by `scale` (a number) and casting them to x's dtype is part of the node.
    """

    @staticmethod
    def forward(ctx, x, A, B, base, plan: Plan, scale: float):
        mA, mB = plan.matrices(*prepared(A, B, scale, x.dtype))
        h = plan.first(x, mA, mB)
        if base is None:
            y = plan.second(h, mA, mB)
        else:
            y = base.clone(memory_format=torch.contiguous_format)
            plan.second_add_(y, h, mA, mB)
        ctx.save_for_backward(x, A, B, mA, mB, h)
        ctx.plan, ctx.scale = plan, scale
        return y

    @staticmethod
    def backward(ctx, dy):
        with no_autocast(dy.device):
            dX, dA, dB = _backward(ctx, dy.contiguous(), *ctx.saved_tensors)
        return dX, dA, dB, dy if ctx.needs_input_grad[3] else None, None, None


class LinearKronAdd(torch.autograd.Function):
    """x W^T + bias + the product as one autograd node, for a frozen W and bias of x's dtype.

    The base's GEMM and the adapter's share one accumulator: y forward, dX backward. The rest as in `KronAdd`.
    """

    @staticmethod
    def forward(ctx, x, A, B, weight, bias, plan: Plan, scale: float):
        mA, mB = plan.matrices(*prepared(A, B, scale, x.dtype))
        y = F.linear(x, weight, bias)
        h = plan.first(x, mA, mB)
        plan.second_add_(y, h, mA, mB)
        ctx.save_for_backward(x, A, B, mA, mB, h, weight)
        ctx.plan, ctx.scale = plan, scale
        return y

    @staticmethod
    def backward(ctx, dy):
        *saved, weight = ctx.saved_tensors
        with no_autocast(dy.device):
            dy = dy.contiguous()
            dX, dA, dB = _backward(ctx, dy, *saved)
            if dX is not None:  # the base's large GEMM reads dX as it goes: quicker than adding the adapter's part last
                dX.addmm_(dy, weight)
        return dX, dA, dB, None, None, None, None


def _backward(ctx, dy, x, A, B, mA, mB, h):
    """(dX of the product, dA, dB) of a node that saved these."""
    plan, scale = ctx.plan, ctx.scale
    if torch.is_grad_enabled():  # create_graph=True: what was computed without a graph must become part of one
        mA, mB = plan.matrices(*prepared(A, B, scale, x.dtype))
        h = plan.first(x, mA, mB)
    dX, dA, dB = plan.backward(dy, x, h, mA, mB, ctx.needs_input_grad[:3])
    if dA is not None and scale != 1:
        dA = dA * scale
    return dX, cast(dA, A.dtype), cast(dB, B.dtype)


def cast(gradient: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """A gradient in its leaf's dtype and, as DistributedDataParallel wants it, in its leaf's strides."""
    return None if gradient is None else gradient.to(dtype).contiguous()


def no_autocast(device: torch.device) -> AbstractContextManager:
    """A context in which torch computes in the tensors' own dtype; where it does so already, one that costs nothing."""
    return torch.autocast(device.type, enabled=False) if autocasts(device) else nullcontext()


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for tensors of this device; a meta device, for one, has none and raises if asked."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)

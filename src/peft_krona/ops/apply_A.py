# SPDX-License-Identifier: Apache-2.0
"""The product with A in plain torch, y[t] = A h[t] for every token, in the variant that suits the sizes.

With Q = a_in * r (the terms ride along in it): A is (1, a_out, Q), h is (T, Q, b_out), and y is (T, a_out, b_out) for
layout "kron", (T, b_out, a_out) for "diffusekrona". Variants:

    batched     one small GEMM a token
    paired      two rows of A are taken as one, (a_out/2, 2 Q) times [h 0; 0 h]: twice the multiplications, but twice
                the columns as well, as MKL's fp32 GEMM takes 2.5 times as long below 12 columns ("kron" only)
    gathered    one GEMM, A times the columns of all tokens side by side, (Q, T b_out): as many multiplications as
                batched, but h is copied into that order, and y out of it ("kron" only)
    expanded    one GEMM with A (x) I of b_out rows: b_out times the multiplications, at the speed of a large GEMM.
                h is (T, Q b_out) for it, and A is a matrix (a_out, Q) where b_out = 1, as A (x) I_1 is A

`plan.default_variant` chooses; docs/performance.md has the measurements behind it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .plan import FEW, Plan


def apply_A(y: torch.Tensor | None, A: torch.Tensor, h: torch.Tensor, plan: Plan) -> torch.Tensor:
    """y (..., out) + A times h (T, ...), see above, or for y None the product alone, (T, out).

    y must be contiguous and owned by the caller: it is added to in place, inside the GEMM but for "gathered".
    """
    _, a_out, _, b_out, _, layout, _, variant, _, _ = plan
    if variant == "expanded":
        matrix = A if b_out == 1 else _expanded(A, plan)
        if y is None:
            return F.linear(h, matrix)
        (y if y.dim() == 2 else y.view(-1, a_out * b_out)).addmm_(h, matrix.t())
        return y
    if variant == "gathered":
        product = torch.mm(A.view(a_out, -1), _gathered(h)).view(a_out, -1, b_out).transpose(0, 1)
        if y is None:
            return product.reshape(-1, a_out * b_out)
        y.view(-1, a_out, b_out).add_(product)
        return y
    rows, columns = (a_out, b_out) if layout == "kron" else (b_out, a_out)
    if variant == "paired":
        T, Q, _ = h.shape
        rows, columns = a_out // 2, 2 * b_out
        h = torch.cat((h, h.new_zeros(T, Q, columns), h), 2).view(T, 2 * Q, columns)
        left, right = _paired(A).expand(T, -1, -1), h
    elif layout == "kron":
        left, right = A.expand(h.shape[0], -1, -1), h
    else:
        left, right = h.mT, A.mT.expand(h.shape[0], -1, -1)
    if y is None:
        return torch.bmm(left, right).view(-1, a_out * b_out)
    y.view(-1, rows, columns).baddbmm_(left, right)
    return y


def backward_A(
    dy: torch.Tensor, A: torch.Tensor, h: torch.Tensor | None, plan: Plan, needs: Sequence[bool]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The gradients of h and A from dy (..., out), each if `needs` (h, A) says so: h's in its shape or as (T, Q b_out),
    A's as (1, a_out, Q).

    A (1, a_out, Q) and h (T, ...) are as in `apply_A`. h is only read for A's gradient.
    """
    (need_h, need_A), (_, a_out, _, b_out, _, layout, _, variant, _, _) = needs, plan
    dh = dA = None
    if variant == "expanded":
        dy = dy if dy.dim() == 2 else dy.view(-1, a_out * b_out)
        if need_h:
            dh = torch.mm(dy, A if b_out == 1 else _expanded(A, plan))
        if need_A:
            assert h is not None
            dA = torch.mm(dy.t(), h)
            dA = dA.view(1, a_out, -1) if b_out == 1 else _expanded_dA(dA, plan)
        return dh, dA
    T, Q = dy.numel() // (a_out * b_out), A.shape[2]
    if variant == "gathered":
        g = _gathered(dy.view(T, a_out, b_out))
        if need_A:
            assert h is not None
            dA = torch.mm(g, _gathered(h).t()).view(1, a_out, Q)
        if need_h:
            dh = torch.mm(A.view(a_out, Q).t(), g).view(Q, T, b_out).transpose(0, 1).contiguous()
        return dh, dA
    g = dy.view(T, a_out, b_out) if layout == "kron" else dy.view(T, b_out, a_out).mT
    if need_A:
        assert h is not None
        dA = sum_over_tokens(g, h)
    if need_h and variant == "paired":
        pairs = torch.bmm(_paired(A).t().expand(T, -1, -1), g.view(T, a_out // 2, 2 * b_out))
        pairs = pairs.view(T, Q, 2, 2 * b_out)
        dh = pairs[:, :, 0, :b_out] + pairs[:, :, 1, b_out:]
    elif need_h:
        dh = torch.bmm(A.mT.expand(T, -1, -1), g)
    return dh, dA


def sum_over_tokens(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """sum_t a[t] @ b[t]^T (1, p, s), for a (T, p, q) and b (T, s, q), summed and returned in at least fp32."""
    wide = a.dtype if a.dtype in (torch.float32, torch.float64) else torch.float32
    # A batched GEMM with few columns takes up to three times as long on a CPU; with few tokens the turn takes longer.
    if a.shape[1] > b.shape[1] and a.shape[0] >= FEW:
        return torch.bmm(b, a.mT).sum(0, True, dtype=wide).mT.contiguous()
    return torch.bmm(a, b.mT).sum(0, True, dtype=wide)


def _gathered(a: torch.Tensor) -> torch.Tensor:
    """a (T, p, q) as (p, T q)."""
    return a.transpose(0, 1).reshape(a.shape[1], -1)


def _paired(A: torch.Tensor) -> torch.Tensor:
    """A (1, a_out, Q) as (a_out/2, Q 2): row 2i + j becomes the columns (q, j) of row i."""
    _, a_out, Q = A.shape
    return A.view(a_out // 2, 2, Q).transpose(1, 2).reshape(a_out // 2, 2 * Q)


def _expanded(A: torch.Tensor, plan: Plan) -> torch.Tensor:
    """A (x) I (out, Q b_out) of A (1, a_out, Q), its rows in the order of y."""
    _, a_out, Q = A.shape
    b_out = plan.b_out
    identity = torch.eye(b_out, dtype=A.dtype, device=A.device)
    blocks = A.view(a_out, 1, Q, 1) * identity[:, None, :]  # (a_out, b_out, Q, b_out)
    return (blocks if plan.layout == "kron" else blocks.transpose(0, 1)).reshape(a_out * b_out, Q * b_out)


def _expanded_dA(product: torch.Tensor, plan: Plan) -> torch.Tensor:
    """A's gradient (1, a_out, Q) from that of A (x) I, product (out, Q b_out), of which only diagonals belong to A."""
    a_out, b_out, Q = plan.a_out, plan.b_out, product.shape[1] // plan.b_out
    wide = torch.promote_types(product.dtype, torch.float32)
    if plan.layout == "kron":
        diagonals = product.view(a_out, b_out, Q, b_out).diagonal(dim1=1, dim2=3)
    else:
        diagonals = product.view(b_out, a_out, Q, b_out).diagonal(dim1=0, dim2=3)
    return diagonals.sum(-1, dtype=wide).unsqueeze(0)

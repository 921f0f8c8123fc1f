# SPDX-License-Identifier: Apache-2.0
"""The product with A in plain torch: y[t] = A h[t] for every token, in the form that the device is quick at.

Symbols: T tokens, I = a_out, u = b_out, Q = a_in * r (the terms ride along in it). h is (T, Q, u). y is (T, I, u) for
layout "kron", (T, u, I) for "diffusekrona". Forms:

    batched     one small GEMM a token
    paired      two rows of A are taken as one, (I/2, 2 Q) times [h 0; 0 h]: twice the multiplications, but twice the
                columns as well, as MKL's fp32 GEMM takes 2.5 times as long below 12 columns ("kron" only)
    expanded    one GEMM with A (x) I_u, of (out, Q u): u times the multiplications, at the speed of a large GEMM

docs/performance.md has the measurements behind `default_form`.
"""

from __future__ import annotations

import torch

FORMS = ("batched", "paired", "expanded")
MANY = 256  # tokens


def default_form(
    Q: int, u: int, a_out: int, n_in: int, layout: str, device: str, dtype: torch.dtype, tokens: int = MANY
) -> str:
    """The form to take for A (a_out, Q) where nothing was measured on this machine."""
    if device != "cpu":  # launches and tensor cores: one GEMM, while it stays small beside the frozen layer's
        return "expanded" if 4 * Q * u <= n_in else "batched"
    if u <= 5 and 2 * Q * u <= n_in:  # a matrix of at most half of dW's size
        return "expanded"
    narrow = u < 12 and can_pair(a_out, layout) and a_out >= 4 * Q
    # With few tokens, copying h takes longer than the quicker GEMM saves.
    return "paired" if narrow and dtype == torch.float32 and tokens >= MANY else "batched"


def can_pair(a_out: int, layout: str) -> bool:
    """Whether the form "paired" exists."""
    return layout == "kron" and a_out % 2 == 0


def mix(A: torch.Tensor, h: torch.Tensor, layout: str, form: str) -> torch.Tensor:
    """A (I, Q) times h (T, Q, u), as (T, I u)."""
    return torch.bmm(*_operands(A, h, layout, form)).reshape(h.shape[0], A.shape[0] * h.shape[2])


def mix_add_(y: torch.Tensor, A: torch.Tensor, h: torch.Tensor, layout: str, form: str) -> None:
    """y (..., I u) += mix(A, h), inside the GEMM. y must be contiguous and owned by the caller."""
    left, right = _operands(A, h, layout, form)
    y.view(left.shape[0], left.shape[1], right.shape[2]).baddbmm_(left, right)


def _operands(A: torch.Tensor, h: torch.Tensor, layout: str, form: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The batched product that is y."""
    T, Q, u = h.shape
    if form == "expanded":
        return h.reshape(1, T, Q * u), _expanded(A, u, layout).t().unsqueeze(0)
    if form == "paired":
        h = torch.cat((h, h.new_zeros(T, Q, 2 * u), h), 2).view(T, 2 * Q, 2 * u)
        return _paired(A).expand(T, -1, -1), h
    if layout == "kron":
        return A.expand(T, -1, -1), h
    return h.mT, A.t().expand(T, -1, -1)


def mix_backward(
    dy: torch.Tensor, A: torch.Tensor, h: torch.Tensor | None, need_h: bool, need_A: bool, layout: str, form: str
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The gradients (T, Q, u) of h and (I, Q) of A, the latter in at least fp32, each if needed, from dy (..., I u).

    h is only read for the second.
    """
    (a_out, Q), n_out = A.shape, dy.shape[-1]
    T, u = dy.numel() // n_out, n_out // a_out
    dh = dA = None
    if form == "expanded":
        dy = dy.view(T, a_out * u)
        if need_h:
            dh = (dy @ _expanded(A, u, layout)).view(T, Q, u)
        if need_A:  # of this large product only the blocks' diagonals belong to A
            blocks = dy.t() @ h.view(T, Q * u)
            if layout == "kron":
                diagonals = blocks.view(a_out, u, Q, u).diagonal(dim1=1, dim2=3)
            else:
                diagonals = blocks.view(u, a_out, Q, u).diagonal(dim1=0, dim2=3)
            dA = diagonals.sum(-1, dtype=_wide(dy.dtype))
        return dh, dA
    g = dy.view(T, a_out, u) if layout == "kron" else dy.view(T, u, a_out).mT
    if need_A:
        dA = sum_over_tokens(g, h)
    if need_h and form == "paired":
        blocks = torch.bmm(_paired(A).t().expand(T, -1, -1), g.view(T, a_out // 2, 2 * u)).view(T, Q, 2, 2 * u)
        dh = blocks[:, :, 0, :u] + blocks[:, :, 1, u:]
    elif need_h:
        dh = torch.bmm(A.t().expand(T, -1, -1), g)
    return dh, dA


def sum_over_tokens(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """sum_t a[t] @ b[t]^T (p, s), a (T, p, q), b (T, s, q), summed over tokens and returned in at least fp32."""
    wide = _wide(a.dtype)
    if a.shape[1] > b.shape[1]:  # a batched GEMM with few columns takes up to three times as long on a CPU
        return torch.bmm(b, a.mT).sum(0, dtype=wide).t()
    return torch.bmm(a, b.mT).sum(0, dtype=wide)


def _paired(A: torch.Tensor) -> torch.Tensor:
    """(I, Q) -> (I/2, Q 2): row 2i + j becomes the columns (q, j) of row i."""
    a_out, Q = A.shape
    return A.view(a_out // 2, 2, Q).transpose(1, 2).reshape(a_out // 2, 2 * Q)


def _expanded(A: torch.Tensor, u: int, layout: str) -> torch.Tensor:
    """A (x) I_u of (I u, Q u), its rows in the order of y."""
    identity = torch.eye(u, dtype=A.dtype, device=A.device)
    blocks = A[:, None, :, None] * identity[:, None, :]  # (I, u, Q, u)
    return (blocks if layout == "kron" else blocks.transpose(0, 1)).reshape(A.shape[0] * u, A.shape[1] * u)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)

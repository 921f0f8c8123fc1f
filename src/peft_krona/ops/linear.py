# SPDX-License-Identifier: Apache-2.0
"""`kron_linear`, the public op: checks, dtype rules, and the call of the backend (see backend.py)."""

from __future__ import annotations

import torch
from torch.compiler import is_compiling

from .._compat import apply_node, looks_inside, sees_calls, unwrap_if_dead
from ..choices import Layout, Order
from ..errors import ShapeError
from . import backend as backends
from .backend import Backend, choose_backend
from .dtypes import autocasts, compute_dtype, with_number
from .node import run
from .operands import Base, Frozen, Update
from .plan import MANY, Plan, cached_plan, check_values, check_width, make_plan, plan_for
from .torch_impl import KronAdd, inplace_op, plain_op
from .triton.library import fused_add


def kron_linear(
    x: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    *,
    scale: float | torch.Tensor = 1.0,
    base: torch.Tensor | Frozen | None = None,
    layout: Layout = "kron",
    order: Order | None = None,
    backend: Backend | None = None,
) -> torch.Tensor:
    """base + s * layout(sum_n A_n (x) B_n) x, without ever building the (out, in) matrix.

    Source: KronA (Edalati et al. 2022), DiffuseKronA (WACV 2025) eq. 3-5; r > 1 is CDKA (Bai et al. 2026).

    Args:
        x: (..., in), in = a_in * b_in; any strides; may hold zero tokens.
        A: (r, a_out, a_in), left factors. B: (r, b_out, b_in), right factors. Cast to x's dtype (they are tiny).
        scale: s, a number or a tensor ().
        base: what to add to. (..., out), usually the frozen layer's output; or `Frozen(weight, bias)`, the layer
            itself, with weight (out, in) and bias (out,) or None, neither with a gradient: then x weight^T + bias and
            the product are one autograd node. None gives the product alone.
        layout: "kron": dW[i*b_out + u, k*b_in + v] = s * sum_n A[n,i,k] B[n,u,v].
            "diffusekrona": dW[u*a_out + i, k*b_in + v] = the same (what the released DiffuseKronA code computes).
        order: "b_first" or "a_first" forces the contraction order; None takes the cheaper one (see factors.py).
        backend: "torch" or "triton" (CUDA, not fp64). None takes what PEFT_KRONA_BACKEND said at import, else "torch".

    Returns:
        (..., out), out = a_out * b_out, in the dtype of the base tensor if there is one, else in x's (autocast's under
        autocast).

    Raises:
        ShapeError: if the shapes do not belong together, or layout or order is unknown.
        BackendError: if the backend that was asked for cannot run on these tensors, or A and B have no values.

    >>> x, A, B = torch.randn(2, 5, 12), torch.randn(1, 4, 3), torch.randn(1, 2, 4)
    >>> y = kron_linear(x, A, B, scale=0.5)
    >>> dW = 0.5 * torch.einsum("ik,uv->iukv", A[0], B[0]).reshape(8, 12)
    >>> torch.allclose(y, x @ dW.T, atol=1e-5)
    True
    """
    dtype = compute_dtype(x) if (casts := autocasts(x.device)) else x.dtype
    plan = plan_of(x, A, B, (layout, order), dtype)
    if type(base) is Frozen:
        if base[0].shape != (plan[1] * plan[3], plan[2] * plan[4]):
            expected, got = (plan.n_out, plan.n_in), tuple(base.weight.shape)
            raise ShapeError(f"Expected a frozen weight of shape {expected}, got {got}.")
    elif base is not None and base.shape != (*x.shape[:-1], plan.n_out):
        raise ShapeError(f"Expected base of shape {(*x.shape[:-1], plan.n_out)}, got {tuple(base.shape)}.")
    backend = choose_backend(backend, x.device, dtype)
    if not casts:
        return compute(x, Update(A, B, scale), base, plan, backend)
    with torch.autocast(x.device.type, enabled=False):
        if isinstance(base, Frozen):
            base = Frozen(base.weight.to(dtype), None if base.bias is None else base.bias.to(dtype))
        return compute(x.to(dtype), Update(A, B, scale), base, plan, backend)


def plan_of(
    x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, wanted: tuple[Layout, Order | None], dtype: torch.dtype
) -> Plan:
    """The plan for x (..., in), A (r, a_out, a_in) and B (r, b_out, b_in), after checking that they fit."""
    if A.is_meta or B.is_meta or x.is_nested or x.layout is not _STRIDED:
        check_values(x, A, B)
    if is_compiling():  # a graph has to serve any number of tokens
        plan = make_plan(A.shape, B.shape, *wanted, (A.device.type, dtype, MANY))
        check_width(x.shape, plan)
        return plan
    make = cached_plan if type(A) in _REAL and type(B) in _REAL and type(x) in _REAL else plan_for
    return make(x.shape, A.shape, B.shape, wanted, (x.device, dtype, x.dtype is dtype and A.dtype is _FP32))


_REAL = (torch.Tensor, torch.nn.Parameter)  # others, such as fake tensors, may have symbols for sizes
_STRIDED, _FP32 = torch.strided, torch.float32


def kron_over_frozen(x: torch.Tensor, update: Update, frozen: Frozen, layout: Layout) -> torch.Tensor:
    """`kron_linear(x, *update, base=frozen, layout=layout)` (..., out) for a layer, whose factors (r, a_out, a_in) and
    (r, b_out, b_in) fit its weight (out, in), and for x (..., in): in eager mode on torch, that and no more is asked.
    """
    A, B, scale = update
    if sees_calls() or backends.DEFAULT != "torch" or scale.__class__ is torch.Tensor:
        return kron_linear(x, A, B, scale=scale, base=frozen, layout=layout)
    plan = plan_of(x, A, B, (layout, None), x.dtype)
    if not x.is_contiguous():
        x = x.contiguous()
    if torch.is_grad_enabled():
        return apply_node(KronAdd, unwrap_if_dead(x), A, B, None, (update, frozen, plan))
    return inplace_op(x, update, frozen, plan)[0]


def compute(x: torch.Tensor, update: Update, base: Base, plan: Plan, backend: Backend) -> torch.Tensor:
    """base + the product (..., out) outside autocast, for x (..., in) in the compute dtype, of any strides."""
    # e.g. an fp32 residual stream over a bf16 product
    if base is not None and type(base) is not Frozen and base.dtype != x.dtype:
        return base + compute(x, update, None, plan, backend).to(base.dtype)
    if backend == "triton":
        return fused_add(x, update, base, plan)
    x = x.contiguous()
    # For all that looks at, records or differentiates single ops, the op is ordinary torch. A dispatch mode is one:
    # selective activation checkpointing keeps the results of chosen ops, which must then not be added to in place.
    if is_compiling() or looks_inside():
        return plain_op(x, update, base, plan)
    if isinstance(update[2], torch.Tensor):
        update = with_number(update)
    if torch.is_grad_enabled():
        return run(KronAdd, unwrap_if_dead(x), update, base, plan)
    return inplace_op(x, update, base, plan)[0]

# SPDX-License-Identifier: Apache-2.0
"""`kron_linear`, the public op: checks, dtype rules, and the call of the backend (see backend.py)."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from .._compat import dispatch_modes, sees_single_ops
from ..errors import BackendError, ShapeError
from ..factors import LAYOUTS
from .backend import choose_backend
from .library import fused_add
from .mix import MANY
from .torch_impl import KronAdd, Plan, accumulated, autocasts, factored, no_autocast, prepared, scaled_by_number
from .tuning import choose


def kron_linear(
    x: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    *,
    scale: float = 1.0,
    base: torch.Tensor | None = None,
    layout: str = "kron",
    order: str | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """base + s * layout(sum_n A_n (x) B_n) x, without ever building the (out, in) matrix.

    Source: KronA (Edalati et al. 2022), DiffuseKronA (WACV 2025) eq. 3-5; r > 1 is CDKA (Bai et al. 2026).

    Args:
        x: (..., in), in = a_in * b_in; any strides; may hold zero tokens.
        A: (r, a_out, a_in), left factors. B: (r, b_out, b_in), right factors. Cast to x's dtype (they are tiny).
        scale: s.
        base: (..., out) to add to, usually the frozen layer's output, or None for the product alone.
        layout: "kron": dW[i*b_out + u, k*b_in + v] = s * sum_n A[n,i,k] B[n,u,v].
            "diffusekrona": dW[u*a_out + i, k*b_in + v] = the same (what the released DiffuseKronA code computes).
        order: "b_first" or "a_first" forces the contraction order; None takes the cheaper one (see factors.py).
        backend: "torch", "triton" (CUDA, not fp64) or "auto": the quickest on this device, which the first call with a
            new shape measures (docs/performance.md). None takes what PEFT_KRONA_BACKEND said at import, else "torch".

    Returns:
        (..., out), out = a_out * b_out, in base's dtype if base is given, else in x's (autocast's under autocast).

    Raises:
        ShapeError: if the shapes do not belong together, or layout or order is unknown.
        BackendError: if the backend that was asked for cannot run on these tensors, or A and B have no values.

    >>> x, A, B = torch.randn(2, 5, 12), torch.randn(1, 4, 3), torch.randn(1, 2, 4)
    >>> y = kron_linear(x, A, B, scale=0.5)
    >>> dW = 0.5 * torch.einsum("ik,uv->iukv", A[0], B[0]).reshape(8, 12)
    >>> torch.allclose(y, x @ dW.T, atol=1e-5)
    True
    """
    dtype = compute_dtype(x)
    plan = _plan(x, A, B, layout, order, dtype)
    if base is not None and base.shape != (*x.shape[:-1], plan.a_out * plan.b_out):
        expected = (*x.shape[:-1], plan.a_out * plan.b_out)
        raise ShapeError(f"Expected base of shape {expected}, got {tuple(base.shape)}.")
    backend = choose_backend(backend, x.device, dtype)
    with no_autocast(x.device):
        x = x if x.dtype == dtype else x.to(dtype)
        if base is not None and base.dtype != dtype:  # e.g. an fp32 residual stream over a bf16 product
            return base + _apply(x, A, B, scale, None, None, None, plan, backend).to(base.dtype)
        return _apply(x, A, B, scale, base, None, None, plan, backend)


def linear_kron_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    A: torch.Tensor,
    B: torch.Tensor,
    *,
    scale: float = 1.0,
    layout: str = "kron",
    backend: str | None = None,
) -> torch.Tensor:
    """`kron_linear(x, A, B, scale=scale, base=F.linear(x, weight, bias))` as one autograd node, for a frozen base.

    Args:
        x: (..., in). weight: (out, in) and bias: (out,) or None; neither may require a gradient.
        A, B, scale, layout, backend: as in `kron_linear`.

    Returns:
        (..., out) in weight's dtype (autocast's under autocast).
    """
    dtype = compute_dtype(x)
    plan = _plan(x, A, B, layout, None, dtype)
    backend = choose_backend(backend, x.device, dtype)
    if not autocasts(x.device):  # F.linear itself reports an x and a weight of different dtypes
        return _apply(x, A, B, scale, None, weight, bias, plan, backend)
    with torch.autocast(x.device.type, enabled=False):
        x, weight, bias = (t if t is None or t.dtype == dtype else t.to(dtype) for t in (x, weight, bias))
        return _apply(x, A, B, scale, None, weight, bias, plan, backend)


def _plan(
    x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, layout: str, order: str | None, dtype: torch.dtype
) -> Plan:
    """The plan for these tensors, after checking that they fit."""
    if torch.compiler.is_compiling():  # a graph shall serve any number of tokens
        many, make = True, _check_plan
    else:
        many = x.numel() >= MANY * x.shape[-1] if x.dim() else False
        make = _checked_plan if type(A) in _REAL and type(B) in _REAL else _check_plan
    plan = make(A.shape, B.shape, layout, order, A.device.type, dtype, many)
    if (A.is_meta or B.is_meta) and not x.is_meta:  # torch would multiply with whatever is in memory
        raise BackendError(
            f"Expected A and B on x's device, {x.device}, got them on {A.device} and {B.device}, where they have no "
            "values. Add and load adapters before the model is offloaded."
        )
    if x.is_nested or x.layout != torch.strided:
        kind = "nested" if x.is_nested else str(x.layout).removeprefix("torch.")
        raise ShapeError(f"Expected x as an ordinary (strided) tensor, got a {kind} one. Pad it, or make it dense.")
    if not x.dim() or x.shape[-1] != plan.a_in * plan.b_in:
        raise ShapeError(
            f"Expected x with a last dimension of a_in * b_in = {plan.a_in} * {plan.b_in} = {plan.a_in * plan.b_in}, "
            f"got x of shape {tuple(x.shape)}."
        )
    return plan


_REAL = (torch.Tensor, torch.nn.Parameter)  # others, such as fake tensors, may have symbols for sizes


def _check_plan(
    A: tuple[int, ...],
    B: tuple[int, ...],
    layout: str,
    order: str | None,
    device: str,
    dtype: torch.dtype,
    many: bool,
) -> Plan:
    """The plan for factors of these shapes.

    Raises:
        ShapeError: with the shapes in the message, where they do not fit each other.
    """
    if layout not in LAYOUTS:
        raise ShapeError(f"layout={layout!r} is unknown; expected one of {LAYOUTS}.")
    if order not in (None, "b_first", "a_first"):
        raise ShapeError(f"order={order!r} is unknown; expected 'b_first', 'a_first' or None.")
    if len(A) != 3 or len(B) != 3 or A[0] != B[0] or min(*A, *B) < 1:
        raise ShapeError(
            "Expected A (r, a_out, a_in) and B (r, b_out, b_in) with one r and all sizes >= 1, "
            f"got A {tuple(A)} and B {tuple(B)}."
        )
    return Plan.of_shapes(A, B, layout, order, None, device, dtype, MANY if many else 0)


_checked_plan = functools.lru_cache(maxsize=4096)(_check_plan)  # asked for in every call, and a model has few shapes


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype that a product of x is computed in: autocast's inside autocast (as F.linear), else x's own."""
    if autocasts(x.device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _needs_plain_ops() -> bool:
    """Whether the op is to be ordinary torch: for all that looks at, records or differentiates its single ops.

    A dispatch mode is one of them: selective activation checkpointing keeps the results of chosen ops, which must then
    not be added to in place.
    """
    return torch.compiler.is_compiling() or sees_single_ops() or dispatch_modes() > 0


def _apply(
    x: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    scale: float | torch.Tensor,
    base: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    plan: Plan,
    backend: str,
) -> torch.Tensor:
    """base + the product (..., out), base being x weight^T + bias where a weight is given.

    x (..., in) and base (..., out) of any strides; all but A and B of one dtype.
    """
    if backend == "auto":
        into = "linear" if weight is not None else "base" if base is not None else "none"
        backend, plan = choose(plan, x, into, _apply)
    if backend == "triton":
        return fused_add(x, A, B, scale, base, weight, bias, plan)
    x = x.contiguous()
    if _needs_plain_ops():
        base = base if weight is None else F.linear(x, weight, bias)
        return factored(x, *prepared(A, B, scale, x.dtype), base, plan)
    A, scale = scaled_by_number(A, scale)
    if torch.is_grad_enabled():
        return KronAdd.apply(x, A, B, base, weight, bias, plan, scale)
    return accumulated(x, A, B, base, weight, bias, plan, scale)[0]

# SPDX-License-Identifier: Apache-2.0
"""The Kronecker product as a convolution: convolve with the small B, multiply by A, never a dense kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from .._compat import functorch_active
from ..choices import Layout
from ..errors import ShapeError
from ..factors import cheaper_order
from .dtypes import compute_dtype
from .plan import check_factors, check_layout, check_values

_CONV: dict[int, Callable[..., torch.Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def kron_conv(
    x: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    *,
    stride: tuple[int, ...],
    padding: int | tuple[int, ...] | str,
    dilation: tuple[int, ...],
    groups: int = 1,
    scale: float | torch.Tensor = 1.0,
    layout: Layout = "kron",
) -> torch.Tensor:
    """conv(x, dW) for dW = s * layout(sum_n A_n (x) B_n) of shape (out, in/groups, *kernel).

    Args:
        x: (N, in, *spatial) with 1 to 3 spatial dimensions, or (in, *spatial).
        A: (r, a_out, a_in). B: (r, b_out, b_in, *kernel), with a_in * b_in = in / groups.
        stride, padding, dilation, groups: as in torch.nn.functional.conv2d.

    Returns:
        (N, out, *spatial'), the dtype of x (autocast's under autocast).

    Raises:
        ShapeError: if the shapes do not belong together, or layout is unknown. BackendError: if A or B has no values.
    """
    check_layout(layout)
    _check_shapes(x, A, B, groups)
    conv, dims = _CONV[B.dim() - 3], B.dim() - 3
    dtype = compute_dtype(x)
    if unbatched := x.dim() == dims + 1:
        x = x.unsqueeze(0)
    r, a_out, a_in = A.shape
    _, b_out, b_in, *kernel = B.shape
    N = x.shape[0]
    with torch.autocast(x.device.type, enabled=False):
        x, A, B = x.to(dtype), (A * scale).to(dtype), B.to(dtype)
        args: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation}
        if groups == 1 and cheaper_order(a_out, a_in, b_out, b_in * _numel(kernel)) == "a_first":
            X = x.reshape(N, a_in, b_in, *x.shape[2:])
            V = torch.einsum("nik,zkv...->zinv...", A, X).reshape(N * a_out, r * b_in, *x.shape[2:])
            Y = conv(V, B.permute(1, 0, *range(2, B.dim())).reshape(b_out, r * b_in, *kernel), **args)
            Y = Y.view(N, a_out, b_out, *Y.shape[2:])
        else:
            kernels = B.reshape(r * b_out, b_in, *kernel)
            if _channels_last(x):  # parts of its channels are no images of their own without a copy of x
                parts = groups * a_in
                U = conv(x, kernels.repeat(parts, *[1] * (dims + 1)), groups=parts, **args)
            else:  # 3 x 3 kernels take a CPU half to a fifth of the time so
                U = conv(x.reshape(N * groups * a_in, b_in, *x.shape[2:]), kernels, **args)
            U = U.view(N, groups, a_in, r, b_out, *U.shape[2:])
            Y = _apply_A(A, U, layout)
        if layout == "diffusekrona":
            Y = Y.transpose(1, 2)
        Y = Y.reshape(N, a_out * b_out, *Y.shape[3:])
    return Y.squeeze(0) if unbatched else Y


def _check_shapes(x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, groups: int) -> None:
    """Check that x (N, in, *spatial), A (r, a_out, a_in) and B (r, b_out, b_in, *kernel) fit together and the groups.

    Raises:
        ShapeError, BackendError: see `kron_conv`.
    """
    check_factors(A.shape, B.shape, kernel=True)
    check_values(x, A, B)
    dims, (_, a_out, a_in), (_, b_out, b_in) = B.dim() - 3, A.shape, B.shape[:3]
    if dims not in _CONV:
        raise ShapeError(f"Expected B (r, b_out, b_in, *kernel) with a kernel of 1 to 3 sizes, got B {tuple(B.shape)}.")
    if groups < 1 or (a_out * b_out) % groups:
        raise ShapeError(
            f"Expected groups to divide a_out * b_out = {a_out} * {b_out} = {a_out * b_out}, got groups={groups}."
        )
    if x.dim() not in (dims + 1, dims + 2) or x.shape[-dims - 1] != groups * a_in * b_in:
        spatial = ", ".join(("depth", "height", "width")[-dims:])
        raise ShapeError(
            f"Expected x (N, in, {spatial}) or (in, {spatial}) with in = groups * a_in * b_in = {groups} * {a_in} * "
            f"{b_in} = {groups * a_in * b_in}, got x of shape {tuple(x.shape)}."
        )


def _channels_last(x: torch.Tensor) -> bool:
    """Whether an image x (N, in, *spatial) has its channels last in memory."""
    if functorch_active():  # vmap does not know memory formats
        return False
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return not x.is_contiguous() and x.dim() in formats and x.is_contiguous(memory_format=formats[x.dim()])


def _apply_A(A: torch.Tensor, U: torch.Tensor, layout: Layout) -> torch.Tensor:
    """A (r, a_out, a_in) times the right group's U (N, groups, a_in, r, b_out, *spatial): (N, a_out, b_out, *spatial).

    Output channel o = i*b_out + u (or u*a_out + i) belongs to group o // (out / groups).
    """
    _, a_out, a_in = A.shape
    N, groups, _, r, b_out = U.shape[:5]
    if groups == 1:
        return torch.einsum("nik,zknu...->ziu...", A, U.squeeze(1))
    if layout == "kron" and a_out % groups == 0:  # i alone says which group
        A = A.view(r, groups, a_out // groups, a_in)
        return torch.einsum("ngik,zgknu...->zgiu...", A, U).reshape(N, a_out, *U.shape[4:])
    i = torch.arange(a_out, device=U.device).view(-1, 1)
    u = torch.arange(b_out, device=U.device).view(1, -1)
    channel = i * b_out + u if layout == "kron" else u * a_out + i
    group = channel // (a_out * b_out // groups)  # (a_out, b_out)
    U = U.movedim((1, 4), (0, 1))[group, u.expand_as(group)]  # (a_out, b_out, N, a_in, r, *spatial)
    return torch.einsum("nik,iuzkn...->ziu...", A, U)


def _numel(kernel: list[int]) -> int:
    n = 1
    for k in kernel:
        n *= k
    return n

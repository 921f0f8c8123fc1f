# SPDX-License-Identifier: Apache-2.0
"""Launches of the kernels: tiles, tokens a program, and the tensors that they write to. Needs triton.

`forward` and `backward` take rows of x and y as matrices; `library.py` makes them differentiable.
"""

from __future__ import annotations

import functools
import math
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import triton

from ..operands import Update
from ..plan import Plan
from .kernels import Sizes, backward_kernel, forward_kernel, sum_kernel

WARPS = 4
STAGES = 3  # buffers of a pipelined load; with two, Triton waits for each tile before it asks for the next
FORWARD_REGISTERS = 128  # a thread at most, in 16 bits with a thin A: four programs to a multiprocessor, not three
SUM_TILE = (128, 32)  # rows, columns of the parts of the gradients that are added at a time; 32 are a line of memory
SHARED_LIMIT = 99 * 1024  # what a program may have on the smallest supported parts (sm_86, sm_89); others: 163 KiB up
ACCUMULATOR_LIMIT = 64  # of the 255 registers of a thread; the rest holds operands and addresses
TILE_BYTES = 128  # a tile's side: one line of memory; in 16-bit dtypes that is also the M = 64 of Hopper's wgmma
SMALLEST = 16  # what tl.dot takes
# Programs that share the tokens, so that every multiprocessor has several, and most tokens for one. The counts,
# and so the results, don't vary by device. The least tokens for one depend on the factors: see `_chunk`.
FORWARD_PROGRAMS, FORWARD_CHUNK = 512, 32
BACKWARD_PROGRAMS, BACKWARD_CHUNK = 256, 128


def shared_bytes(z: Sizes, itemsize: int) -> int:
    """Estimate of what a program needs in shared memory, from above.

    A step keeps both operands of its dot there, STAGES deep where its inner loop is pipelined (the factor as it is
    stored, up to 4 bytes a value), or the fp32 result on its way from the dot's register layout to one that stores
    whole lines. The steps follow each other and take the same memory; any of BP and BQ, BD and BC may be the inner
    dimension.
    """
    p, d, w = max(z.BP, z.BQ), max(z.BD, z.BC), z.BT * z.BW
    mix = STAGES * (z.BP * z.BQ * 4 + p * w * itemsize) + 4 * p * w
    gradient = STAGES * (z.BP + z.BQ) * w * itemsize
    gemm = STAGES * (z.BD * z.BC * 4 + z.BM * d * itemsize) + 4 * z.BM * d
    return max(mix, gradient, gemm)


def accumulators(z: Sizes) -> int:
    """fp32 registers a thread that the largest dot's result takes."""
    return max(max(z.BP, z.BQ) * z.BT * z.BW, z.BM * max(z.BD, z.BC), z.BD * z.BC) // (32 * WARPS)


def forward_registers(z: Sizes, itemsize: int) -> int | None:
    """Registers a thread that the forward kernel may take; None where that few would spill many."""
    return FORWARD_REGISTERS if itemsize == 2 and min(z.BP, z.BQ) == SMALLEST else None


@functools.cache  # asked for in every call
def sizes(plan: Plan, itemsize: int) -> Sizes:
    """The kernels' constants for a product of values of so many bytes.

    Tiles are no larger than the matrices, halved at their largest side until both estimates are within the limits.
    """
    r, a_out, a_in, b_out, b_in, layout, order, *_ = plan
    b_first, kron = order == "b_first", layout == "kron"
    P, Q, W = (a_out, a_in * r, b_out) if b_first else (a_out * r, a_in, b_in)
    S, D, C = (a_in, b_in, r * b_out) if b_first else (a_out, r * b_in, b_out)
    tile = TILE_BYTES // itemsize

    def fit(side: int, smallest: int = SMALLEST) -> int:
        return min(tile, max(smallest, triton.next_power_of_2(side)))

    BW = fit(W, 1)
    columns = max(tile, min(2 * tile, 4 * BW))  # fewer where rows are short: they are moved in smaller pieces
    tiles = (columns // BW, fit(P), fit(Q), BW, tile, fit(D), fit(C))
    y_i, y_u = (b_out, 1) if kron else (1, a_out)
    z = Sizes(b_first, r, a_out, a_in, b_out, b_in, y_i, y_u, P, Q, W, S, D, C, *tiles)
    while shared_bytes(z, itemsize) > SHARED_LIMIT or accumulators(z) > ACCUMULATOR_LIMIT:
        if z.BT * z.BW > tile:
            z = z._replace(BT=z.BT // 2)
            continue
        name = max(("BP", "BQ", "BD", "BC"), key=lambda n: getattr(z, n))
        z = z._replace(**{name: getattr(z, name) // 2})
    return z


class Into(NamedTuple):
    """Where dX goes: dx (T, in), contiguous, or None if it is not needed; with `add`, to what is there."""

    dx: torch.Tensor | None
    add: bool


def forward(x: torch.Tensor, update: Update, base: torch.Tensor | None, y: torch.Tensor, plan: Plan) -> torch.Tensor:
    """y = base + the product; returns h (T, intermediate), which `backward` reads. s A and B are rounded to x's dtype.

    Args:
        x: (T, in), rows of any stride. base: (T, out), rows of any stride; may be y, or None.
        y: (T, out), contiguous, of x's dtype, to write to.
    """
    A, B, scale = update
    x, base, T = _rows(x), None if base is None else _rows(base), x.shape[0]
    h = x.new_empty(T, plan.intermediate)
    if T:
        z = sizes(plan, x.element_size())
        read_again, moved = 4 * (A.numel() + B.numel()), x.element_size() * (x.shape[1] + 2 * y.shape[1])
        chunk = _chunk(T, FORWARD_PROGRAMS, FORWARD_CHUNK, z.BT, read_again / moved)
        base_t = 0 if base is None else base.stride(0)
        with _device_of(x):
            forward_kernel[(triton.cdiv(T, chunk),)](
                x, _stored(A), _stored(B), base, h, y, T, chunk, x.stride(0), base_t, float(scale), z,
                num_warps=WARPS, num_stages=STAGES, maxnreg=forward_registers(z, x.element_size()),
            )  # fmt: skip
    return h


def backward(
    dy: torch.Tensor, factors: tuple[torch.Tensor, torch.Tensor] | None, update: Update, into: Into, plan: Plan
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """dX into `into`; returns (dA, dB) in the shapes and dtypes of A and B, None for both if they are not needed.

    Args:
        dy: (T, out), contiguous.
        factors: x (T, in) and h (T, intermediate) as in `forward`, for the factors' gradients; None if not needed.
    """
    (A, B, scale), (dx, add), T, need_factors = update, into, dy.shape[0], factors is not None
    x, h = factors or (None, None)
    x, need_x = None if x is None else _rows(x), dx is not None
    z = sizes(plan, dy.element_size())
    N_A, N_B = A.numel(), B.numel()
    parts_moved, moved = 8 * (N_A + N_B), dy.element_size() * (dy.shape[1] + 3 * plan.n_in)  # both ways, in fp32
    chunk = _chunk(T, BACKWARD_PROGRAMS, BACKWARD_CHUNK, z.BT, parts_moved / moved)
    programs = triton.cdiv(T, chunk)
    parts = dy.new_empty(programs if need_factors else 0, N_A + N_B, dtype=torch.float32)
    dA = dB = None
    with _device_of(dy):
        if T and (need_x or need_factors):
            dh, x_t = dy.new_empty(T, plan.intermediate), 0 if x is None else x.stride(0)
            backward_kernel[(programs,)](
                dy, x, h, _stored(A), _stored(B), dh, dx, parts, T, chunk, x_t, plan.n_in,
                float(scale), add, need_x, need_factors, z, num_warps=WARPS, num_stages=STAGES,
            )  # fmt: skip
        if need_factors:
            dA, dB = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (A, B))
            grid, tile = (triton.cdiv(N_A + N_B, SUM_TILE[1]),), SUM_TILE
            sum_kernel[grid](parts, dA, dB, programs, float(scale), N_A, N_B, *tile)
    return dA, dB


def _stored(factor: torch.Tensor) -> torch.Tensor:
    """A factor (r, a_out, a_in) or (r, b_out, b_in) as the kernels read it: tiles are for up to 4 bytes a value."""
    return (factor.float() if factor.dtype == torch.float64 else factor).contiguous()


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x (T, n) with neighbouring values in a row next to each other."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _chunk(T: int, programs: int, most: int, BT: int, overhead: float) -> int:
    """Tokens a program, a power of two.

    overhead: bytes that every program moves besides its tokens (the factors, its part of their gradients) over the
        bytes of a token. A program gets tokens enough that they are the greater share, within `most`.
    """
    wanted = max(triton.next_power_of_2(triton.cdiv(max(T, 1), programs)), triton.next_power_of_2(math.ceil(overhead)))
    return max(BT, min(wanted, most, triton.next_power_of_2(max(T, 1))))


def _device_of(x: torch.Tensor) -> AbstractContextManager[object]:
    """A context in which x's (any shape) device is the current one; where it is so already, one that costs nothing."""
    if x.device.type != "cuda" or x.get_device() == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device_of(x)

# SPDX-License-Identifier: Apache-2.0
"""y = base + s (sum_n A_n (x) B_n) x and its gradients as Triton kernels. Needs triton; imported only when used.

The op has two steps, in the order that `factors.cheaper_order` picks (see torch_impl.py for the symbols):

    gemm    multiplies the last index by mB:   dst[t, s, c] = sum_d src[t, s, d] mB[d, c]
    mix     multiplies the middle index by mA: dst[t, p, w] = sum_q mA[p, q] src[t, q, w]

b_first is gemm, then mix; a_first is mix, then gemm; the way back takes the transposed matrices in the opposite order.
mA (P, Q) and mB (D, C) are A and B with the sum over the r terms in an inner dimension. They exist as index arithmetic
alone: the kernels read the factors as they are stored, scale and cast them on the way, and write gradients in the same
place, so that a step of an adapted layer is three launches, whatever the factors' dtype. A layout is two strides of y.

A program owns a chunk of tokens and does both steps for it. What lies between them, h, is thin (1/16 of x for a
1280-wide layer at (64, 4)) and goes through memory rather than registers: the steps want it in different shapes,
backward needs it anyway, and it is read back from the cache by the program that has just written it. So x, base and y
move once, every side is tiled (any factor shape works), and no step holds a whole factor in registers.

Both factors' gradients are sums over tokens: every program writes its own part in fp32, and a second kernel adds the
parts in a fixed order. No float atomics, so two runs are bitwise equal.
"""

from __future__ import annotations

import functools
import math
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .torch_impl import Plan


class Sizes(NamedTuple):
    """What the kernels are specialised on, besides dtypes. One argument: each costs every launch part of a microsecond.

    b_first, r to b_in: the product. y_i, y_u: strides of y's two indices. P to W: see the top of the file.
    BT tokens, BP x BQ of mA, BW of the last index; BM rows, BD x BC of mB: tile sizes, powers of two.
    """

    b_first: bool
    r: int
    a_out: int
    a_in: int
    b_out: int
    b_in: int
    y_i: int
    y_u: int
    P: int
    Q: int
    W: int
    S: int
    D: int
    C: int
    BT: int
    BP: int
    BQ: int
    BW: int
    BM: int
    BD: int
    BC: int
    precision: str = "ieee"  # fp32 products are fp32, as torch's are by default; 16-bit dtypes ignore it


@triton.jit
def _in_A(p, q, z: tl.constexpr):
    """Where mA[p, q] is in A (r, a_out, a_in)."""
    if z.b_first:  # (a_out, a_in r)
        at = p * z.a_in + q // z.r + q % z.r * (z.a_out * z.a_in)
    else:  # (a_out r, a_in)
        at = (p // z.r + p % z.r * z.a_out) * z.a_in + q
    return at


@triton.jit
def _in_B(d, c, z: tl.constexpr):
    """Where mB[d, c] is in B (r, b_out, b_in)."""
    if z.b_first:  # (b_in, r b_out)
        at = c * z.b_in + d
    else:  # (r b_in, b_out)
        at = (d // z.b_in * z.b_out + c) * z.b_in + d % z.b_in
    return at


# Tensors move as tiles of three dimensions, in the order that gives neighbouring lanes neighbouring bytes. Where lanes
# are left after the last dimension, Triton up to 3.6 takes the first one next, from 3.7 on the second one.
TOKENS_FIRST: tl.constexpr = tl.constexpr(tuple(int(n) for n in triton.__version__.split(".")[:2]) >= (3, 7))


@triton.jit
def _at(t, a, b):
    """The indices of a tile: tokens, the middle index, the last index. The tile is (t, a, b), or (a, t, b)."""
    if TOKENS_FIRST:
        return t[:, None, None], a[None, :, None], b[None, None, :]
    else:
        return t[None, :, None], a[:, None, None], b[None, None, :]


@triton.jit
def _load(src, t, a, b, T, s_t, S_A, S_B, N_A, N_B):
    """src[t, a, b] as a tile, 0 outside."""
    t, a, b = _at(t, a, b)
    return tl.load(src + t * s_t + a * S_A + b * S_B, (t < T) & (a < N_A) & (b < N_B), other=0.0)


@triton.jit
def _store(dst, tile, t, a, b, T, d_t, D_A, D_B, N_A, N_B):
    """dst[t, a, b] = tile, in dst's dtype."""
    t, a, b = _at(t, a, b)
    tl.store(dst + t * d_t + a * D_A + b * D_B, tile.to(dst.dtype.element_ty), (t < T) & (a < N_A) & (b < N_B))


@triton.jit
def _fold(tile):
    """A tile as (a, t b), what a dot takes."""
    if TOKENS_FIRST:
        tile = tl.permute(tile, (1, 0, 2))
    return tl.reshape(tile, (tile.shape[0], tile.shape[1] * tile.shape[2]))


@triton.jit
def _unfold(matrix, BT: tl.constexpr):
    """(a, t b) as a tile."""
    tile = tl.reshape(matrix, (matrix.shape[0], BT, matrix.shape[1] // BT))
    if TOKENS_FIRST:
        tile = tl.permute(tile, (1, 0, 2))
    return tile


@triton.jit
def _rows_at(m0, start, chunk, T, z: tl.constexpr):
    """Token and index s of the BM rows from m0 on, (rows, 1), and whether the program has them."""
    row = m0 + tl.arange(0, z.BM)[:, None]
    t, s = start + row // z.S, row % z.S
    return t, s, (row < chunk * z.S) & (t < T)


@triton.jit
def _mA(A, scale, p, q, dtype, z: tl.constexpr):
    """s mA[p, q], 0 outside; p and q are two axes of a tile, in either order."""
    return (tl.load(A + _in_A(p, q, z), (p < z.P) & (q < z.Q), other=0.0).to(tl.float32) * scale).to(dtype)


@triton.jit
def _mB(B, d, c, dtype, z: tl.constexpr):
    """mB[d, c], 0 outside; d and c are two axes of a tile, in either order."""
    return tl.load(B + _in_B(d, c, z), (d < z.D) & (c < z.C), other=0.0).to(dtype)


@triton.jit
def _mix(
    src, A, scale, dst, base, start, chunk, T, s_t, d_t, b_t,
    S_Q: tl.constexpr, S_W: tl.constexpr, D_P: tl.constexpr, D_W: tl.constexpr,
    BACK: tl.constexpr, z: tl.constexpr,
):  # fmt: skip
    """dst[t, p, w] = base[t, p, w] + sum_q mA[p, q] src[t, q, w] for the program's tokens. base may be dst or None.

    BACK: with the transpose of mA.
    """
    P: tl.constexpr = z.Q if BACK else z.P
    Q: tl.constexpr = z.P if BACK else z.Q
    BP: tl.constexpr = z.BQ if BACK else z.BP
    BQ: tl.constexpr = z.BP if BACK else z.BQ
    COLUMNS: tl.constexpr = z.BT * z.BW
    ONE: tl.constexpr = P <= BP and Q <= BQ  # mA is one tile: read once, not again for every tile of tokens
    dtype: tl.constexpr = src.dtype.element_ty
    p, q = tl.arange(0, BP), tl.arange(0, BQ)
    if ONE:
        a = _mA(A, scale, q[None, :], p[:, None], dtype, z) if BACK else _mA(A, scale, p[:, None], q[None, :], dtype, z)
    for t0 in range(0, chunk, z.BT):
        t = start + t0 + tl.arange(0, z.BT)
        for p0 in range(0, P, BP):
            p = p0 + tl.arange(0, BP)
            for w0 in range(0, z.W, z.BW):
                w = w0 + tl.arange(0, z.BW)
                if base is not None:  # on its way while the rest is computed
                    old = _load(base, t, p, w, T, b_t, D_P, D_W, P, z.W)
                acc = tl.zeros((BP, COLUMNS), tl.float32)
                for q0 in range(0, Q, BQ):
                    q = q0 + tl.arange(0, BQ)
                    if not ONE:
                        if BACK:
                            a = _mA(A, scale, q[None, :], p[:, None], dtype, z)
                        else:
                            a = _mA(A, scale, p[:, None], q[None, :], dtype, z)
                    tile = _fold(_load(src, t, q, w, T, s_t, S_Q, S_W, Q, z.W))
                    acc = tl.dot(a, tile, acc, input_precision=z.precision)
                out = _unfold(acc, z.BT)
                if base is not None:
                    out += old.to(tl.float32)
                _store(dst, out, t, p, w, T, d_t, D_P, D_W, P, z.W)


@triton.jit
def _gemm(
    src, B, dst, base, start, chunk, T, s_t, d_t, b_t,
    S_S: tl.constexpr, S_D: tl.constexpr, D_S: tl.constexpr, D_C: tl.constexpr,
    BACK: tl.constexpr, z: tl.constexpr,
):  # fmt: skip
    """dst[t, s, c] = base[t, s, c] + sum_d src[t, s, d] mB[d, c] for the program's tokens. base may be dst or None.

    BACK: with the transpose of mB.
    """
    D: tl.constexpr = z.C if BACK else z.D
    C: tl.constexpr = z.D if BACK else z.C
    BD: tl.constexpr = z.BC if BACK else z.BD
    BC: tl.constexpr = z.BD if BACK else z.BC
    BM: tl.constexpr = z.BM  # tl.zeros of triton 3.6 takes no z.BM
    dtype: tl.constexpr = src.dtype.element_ty
    for m0 in range(0, chunk * z.S, z.BM):
        t, s, live = _rows_at(m0, start, chunk, T, z)
        for c0 in range(0, C, BC):
            c = c0 + tl.arange(0, BC)
            inside = live & (c < C)[None, :]
            if base is not None:  # on its way while the rest is computed
                old = tl.load(base + t * b_t + s * D_S + c[None, :] * D_C, inside, other=0.0)
            acc = tl.zeros((BM, BC), tl.float32)
            for d0 in range(0, D, BD):
                d = d0 + tl.arange(0, BD)
                b = _mB(B, c[None, :], d[:, None], dtype, z) if BACK else _mB(B, d[:, None], c[None, :], dtype, z)
                tile = tl.load(src + t * s_t + s * S_S + d[None, :] * S_D, live & (d < D)[None, :], other=0.0)
                acc = tl.dot(tile, b, acc, input_precision=z.precision)
            if base is not None:
                acc += old.to(tl.float32)
            tl.store(dst + t * d_t + s * D_S + c[None, :] * D_C, acc.to(dst.dtype.element_ty), inside)


@triton.jit
def _mix_back(
    dout, src, A, scale, dsrc, base, dA, start, chunk, T, g_t, s_t, d_t,
    G_P: tl.constexpr, G_W: tl.constexpr, NEED_SRC: tl.constexpr, NEED_A: tl.constexpr, z: tl.constexpr,
):  # fmt: skip
    """The way back through mix, for the program's tokens; each if needed:

    dsrc[t, q, w] = base[t, q, w] + sum_p mA[p, q] dout[t, p, w]        base may be dsrc or None
    dmA[p, q] = sum_{t, w} dout[t, p, w] src[t, q, w]                   stored as A is
    """
    BP: tl.constexpr = z.BP
    BQ: tl.constexpr = z.BQ
    ONE: tl.constexpr = z.P <= BP and z.Q <= BQ  # mA is one tile: a pass over the tokens gives both
    dtype: tl.constexpr = dout.dtype.element_ty
    if NEED_SRC and not (ONE and NEED_A):
        _mix(dout, A, scale, dsrc, base, start, chunk, T, g_t, d_t, d_t, G_P, G_W, z.W, 1, True, z)
    if NEED_A:
        for p0 in range(0, z.P, BP):
            p = p0 + tl.arange(0, BP)
            for q0 in range(0, z.Q, BQ):
                q = q0 + tl.arange(0, BQ)
                if NEED_SRC and ONE:
                    a = _mA(A, scale, p[None, :], q[:, None], dtype, z)
                acc = tl.zeros((BP, BQ), tl.float32)
                for t0 in range(0, chunk, z.BT):
                    t = start + t0 + tl.arange(0, z.BT)
                    for w0 in range(0, z.W, z.BW):
                        w = w0 + tl.arange(0, z.BW)
                        g = _fold(_load(dout, t, p, w, T, g_t, G_P, G_W, z.P, z.W))
                        if NEED_SRC and ONE:
                            if base is not None:
                                old = _load(base, t, q, w, T, d_t, z.W, 1, z.Q, z.W)
                            out = _unfold(tl.dot(a, g, input_precision=z.precision), z.BT)
                            if base is not None:
                                out += old.to(tl.float32)
                            _store(dsrc, out, t, q, w, T, d_t, z.W, 1, z.Q, z.W)
                        tile = _fold(_load(src, t, q, w, T, s_t, z.W, 1, z.Q, z.W))
                        acc = tl.dot(g, tl.trans(tile), acc, input_precision=z.precision)
                inside = (p < z.P)[:, None] & (q < z.Q)[None, :]
                tl.store(dA + _in_A(p[:, None], q[None, :], z), acc, inside)


@triton.jit
def _gemm_back(
    dout, src, B, dsrc, base, dB, start, chunk, T, g_t, s_t, d_t,
    G_S: tl.constexpr, G_C: tl.constexpr, NEED_SRC: tl.constexpr, NEED_B: tl.constexpr, z: tl.constexpr,
):  # fmt: skip
    """The way back through gemm, for the program's tokens; each if needed:

    dsrc[t, s, d] = base[t, s, d] + sum_c dout[t, s, c] mB[d, c]        base may be dsrc or None
    dmB[d, c] = sum_{t, s} src[t, s, d] dout[t, s, c]                   stored as B is
    """
    BD: tl.constexpr = z.BD
    BC: tl.constexpr = z.BC
    ONE: tl.constexpr = z.C <= BC  # one tile of c: a pass over the rows gives both
    dtype: tl.constexpr = dout.dtype.element_ty
    if NEED_SRC and not (ONE and NEED_B):
        _gemm(dout, B, dsrc, base, start, chunk, T, g_t, d_t, d_t, G_S, G_C, z.D, 1, True, z)
    if NEED_B:
        for d0 in range(0, z.D, BD):
            d = d0 + tl.arange(0, BD)
            for c0 in range(0, z.C, BC):
                c = c0 + tl.arange(0, BC)
                if NEED_SRC and ONE:
                    b = _mB(B, d[None, :], c[:, None], dtype, z)
                acc = tl.zeros((BD, BC), tl.float32)
                for m0 in range(0, chunk * z.S, z.BM):
                    t, s, live = _rows_at(m0, start, chunk, T, z)
                    inside = live & (d < z.D)[None, :]
                    g = tl.load(dout + t * g_t + s * G_S + c[None, :] * G_C, live & (c < z.C)[None, :], other=0.0)
                    tile = tl.load(src + t * s_t + s * z.D + d[None, :], inside, other=0.0)
                    if NEED_SRC and ONE:
                        if base is not None:
                            old = tl.load(base + t * d_t + s * z.D + d[None, :], inside, other=0.0)
                        out = tl.dot(g, b, input_precision=z.precision)
                        if base is not None:
                            out += old.to(tl.float32)
                        tl.store(dsrc + t * d_t + s * z.D + d[None, :], out.to(dsrc.dtype.element_ty), inside)
                    acc = tl.dot(tl.trans(tile), g, acc, input_precision=z.precision)
                tl.store(dB + _in_B(d[:, None], c[None, :], z), acc, (d < z.D)[:, None] & (c < z.C)[None, :])


@triton.jit(do_not_specialize=["T", "chunk"])
def forward_kernel(x, A, B, base, h, y, T, chunk, x_t, b_t, scale, z: tl.constexpr):
    """y = base + product and h, the intermediate, (T, S, C) = (T, Q, W) for b_first, (T, P, W) = (T, S, D) else."""
    start = tl.program_id(0).to(tl.int64) * chunk  # 64 bits: T * width may exceed 2^31
    h_t: tl.constexpr = z.Q * z.W if z.b_first else z.P * z.W
    if z.b_first:
        _gemm(x, B, h, None, start, chunk, T, x_t, h_t, 0, z.D, 1, z.C, 1, False, z)
        tl.debug_barrier()  # the program's threads see all of its h
        _mix(h, A, scale, y, base, start, chunk, T, h_t, z.P * z.W, b_t, z.W, 1, z.y_i, z.y_u, False, z)
    else:
        _mix(x, A, scale, h, None, start, chunk, T, x_t, h_t, 0, z.W, 1, z.W, 1, False, z)
        tl.debug_barrier()
        _gemm(h, B, y, base, start, chunk, T, h_t, z.S * z.C, b_t, z.D, 1, z.y_i, z.y_u, False, z)


@triton.jit(do_not_specialize=["T", "chunk"])
def backward_kernel(
    dy, x, h, A, B, dh, dx, parts, T, chunk, x_t, dx_t, scale,
    ADD: tl.constexpr, NEED_X: tl.constexpr, NEED_FACTORS: tl.constexpr, z: tl.constexpr,
):  # fmt: skip
    """dh, dx (added to dx with ADD), and this program's part of (dA / s, dB) in row `program_id` of `parts`."""
    start = tl.program_id(0).to(tl.int64) * chunk
    dA = parts + tl.program_id(0).to(tl.int64) * (z.P * z.Q + z.D * z.C)
    dB = dA + z.P * z.Q
    old_dx = dx if ADD else None
    y_t: tl.constexpr = z.P * z.W if z.b_first else z.S * z.C
    h_t: tl.constexpr = z.Q * z.W if z.b_first else z.P * z.W
    need: tl.constexpr = NEED_FACTORS
    if z.b_first:
        _mix_back(dy, h, A, scale, dh, None, dA, start, chunk, T, y_t, h_t, h_t, z.y_i, z.y_u, True, need, z)
        tl.debug_barrier()
        _gemm_back(dh, x, B, dx, old_dx, dB, start, chunk, T, h_t, x_t, dx_t, z.C, 1, NEED_X, need, z)
    else:
        _gemm_back(dy, h, B, dh, None, dB, start, chunk, T, y_t, h_t, h_t, z.y_i, z.y_u, True, need, z)
        tl.debug_barrier()
        _mix_back(dh, x, A, scale, dx, old_dx, dA, start, chunk, T, h_t, x_t, dx_t, z.W, 1, NEED_X, need, z)


@triton.jit(do_not_specialize=["rows"])
def sum_kernel(
    parts, dA, dB, rows, scale, N_A: tl.constexpr, N_B: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """dA = s times, and dB = the sums of `parts` (rows, N_A + N_B) over rows; a program for every COLS columns."""
    e = tl.program_id(0) * COLS + tl.arange(0, COLS)
    tile = tl.zeros((ROWS, COLS), tl.float32)  # added up across rows once, at the end: loads need not wait for it
    for r0 in range(0, rows, ROWS):
        row = (r0 + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row < rows)[:, None] & (e < N_A + N_B)[None, :]
        tile += tl.load(parts + row[:, None] * (N_A + N_B) + e[None, :], inside, other=0.0)
    acc = tl.sum(tile, 0)
    tl.store(dA + e, (acc * scale).to(dA.dtype.element_ty), e < N_A)
    tl.store(dB + e - N_A, acc.to(dB.dtype.element_ty), (e >= N_A) & (e < N_A + N_B))


WARPS = 4
STAGES = 3  # buffers of a pipelined load; with two, Triton waits for each tile before it asks for the next
FORWARD_REGISTERS = 128  # a thread at most, in 16 bits with a thin A: four programs to a multiprocessor, not three
SUM_TILE = (128, 32)  # rows, columns of the parts of the gradients that are added at a time; 32 are a line of memory
SHARED_LIMIT = 99 * 1024  # what a program may have on the smallest supported parts (sm_86, sm_89); others: 163 KiB up
ACCUMULATOR_LIMIT = 64  # of the 255 registers of a thread; the rest holds operands and addresses
TILE_BYTES = 128  # a tile's side: one line of memory; in 16-bit dtypes that is also the M = 64 of Hopper's wgmma
SMALLEST = 16  # what tl.dot takes
# Programs that shall share the tokens, so that every multiprocessor has several, and most tokens for one. The counts,
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
    r, a_out, a_in, b_out, b_in, layout, order, _ = plan
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


def forward(
    x: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    base: torch.Tensor | None,
    y: torch.Tensor,
    scale: float,
    plan: Plan,
) -> torch.Tensor:
    """y = base + the product; returns the intermediate for `backward`.

    Args:
        x: (T, in), rows of any stride. base: (T, out), rows of any stride; may be y, or None.
        A: (r, a_out, a_in), B: (r, b_out, b_in), of any floating dtype: s A and B are rounded to x's.
        y: (T, out), contiguous, of x's dtype, to write to.
    """
    x, base, T = _rows(x), None if base is None else _rows(base), x.shape[0]
    h = x.new_empty(T, plan.intermediate)
    if T:
        z = sizes(plan, x.element_size())
        read_again, moved = 4 * (A.numel() + B.numel()), x.element_size() * (x.shape[1] + 2 * y.shape[1])
        chunk = _chunk(T, FORWARD_PROGRAMS, FORWARD_CHUNK, z.BT, read_again / moved)
        base_t = 0 if base is None else base.stride(0)
        with _device_of(x):
            forward_kernel[(triton.cdiv(T, chunk),)](
                x, _stored(A), _stored(B), base, h, y, T, chunk, x.stride(0), base_t, scale, z,
                num_warps=WARPS, num_stages=STAGES, maxnreg=forward_registers(z, x.element_size()),
            )  # fmt: skip
    return h


def backward(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    dx: torch.Tensor | None,
    h: torch.Tensor | None,
    A: torch.Tensor,
    B: torch.Tensor,
    scale: float,
    plan: Plan,
    add: bool,
    need_factors: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """dX into dx; returns (dA, dB) in the dtypes of A and B, None for both if they are not needed.

    Args:
        dy: (T, out), contiguous. x, h: as in `forward`; not read without `need_factors`.
        dx: (T, in), contiguous, to write to, or with `add` to add to. None if dX is not needed.
    """
    x, T = None if x is None else _rows(x), dy.shape[0]
    z = sizes(plan, dy.element_size())
    N_A, N_B, n_in = A.numel(), B.numel(), plan.a_in * plan.b_in
    parts_moved, moved = 8 * (N_A + N_B), dy.element_size() * (dy.shape[1] + 3 * n_in)  # written and read in fp32
    chunk = _chunk(T, BACKWARD_PROGRAMS, BACKWARD_CHUNK, z.BT, parts_moved / moved)
    programs, need_x = triton.cdiv(T, chunk), dx is not None
    parts = dy.new_empty(programs if need_factors else 0, N_A + N_B, dtype=torch.float32)
    dA = dB = None
    with _device_of(dy):
        if T and (need_x or need_factors):
            dh, x_t = dy.new_empty(T, plan.intermediate), 0 if x is None else x.stride(0)
            backward_kernel[(programs,)](
                dy, x, h, _stored(A), _stored(B), dh, dx, parts, T, chunk, x_t, n_in,
                scale, add, need_x, need_factors, z, num_warps=WARPS, num_stages=STAGES,
            )  # fmt: skip
        if need_factors:
            dA, dB = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (A, B))
            rows, columns = SUM_TILE
            sum_kernel[(triton.cdiv(N_A + N_B, columns),)](parts, dA, dB, programs, scale, N_A, N_B, rows, columns)
    return dA, dB


def _stored(factor: torch.Tensor) -> torch.Tensor:
    """As the kernels read it; tiles are chosen for factors of up to 4 bytes a value."""
    return (factor.float() if factor.dtype == torch.float64 else factor).contiguous()


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _chunk(T: int, programs: int, most: int, BT: int, overhead: float) -> int:
    """Tokens a program, a power of two.

    overhead: bytes that every program moves besides its tokens (the factors, its part of their gradients) over the
        bytes of a token. A program gets tokens enough that they are the greater share, within `most`.
    """
    wanted = max(triton.next_power_of_2(triton.cdiv(max(T, 1), programs)), triton.next_power_of_2(math.ceil(overhead)))
    return max(BT, min(wanted, most, triton.next_power_of_2(max(T, 1))))


def _device_of(x: torch.Tensor) -> AbstractContextManager:
    """A context in which x's device is the current one; where it is so already, one that costs nothing."""
    if x.device.type != "cuda" or x.get_device() == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device_of(x)

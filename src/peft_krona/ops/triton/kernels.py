# SPDX-License-Identifier: Apache-2.0
"""y = base + s (sum_n A_n (x) B_n) x and its gradients as Triton kernels. Needs triton; launch.py calls them.

The op has two steps, in the order that `factors.cheaper_order` picks (see ../operands.py for the symbols):

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

from typing import NamedTuple

import triton
import triton.language as tl


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
    """Backward of mix, for the program's tokens; each if needed:

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
    """Backward of gemm, for the program's tokens; each if needed:

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

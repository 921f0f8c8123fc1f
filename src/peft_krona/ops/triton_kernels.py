# SPDX-License-Identifier: Apache-2.0
"""y = base + (sum_n A_n (x) B_n) x and its gradients as one Triton kernel each. Needs triton; imported only when used.

The op has two steps, in the order that `factors.cheaper_order` picks (see torch_impl.py for the symbols):

    gemm    multiplies the last index by mB:   dst[t, s, c] = sum_d src[t, s, d] mB[d, c]
    mix     multiplies the middle index by mA: dst[t, p, w] = sum_q mA[p, q] src[t, q, w]

b_first is gemm, then mix; a_first is mix, then gemm; the way back takes the transposed matrices in the opposite order.
The sum over the r terms rides along in an inner dimension, and a layout is nothing but two strides of y. A program owns
a chunk of tokens and does both steps for it. What lies between them, h, is thin (1/16 of x for a 1280-wide layer at
(64, 4)) and goes through memory rather than registers: the steps want it in different shapes, backward needs it anyway,
and it is read back from the cache by the program that has just written it. So x, base and y move once, every side is
tiled (any factor shape works), and no step holds a whole factor in registers.

Both factors' gradients are sums over tokens: every program writes its own part in fp32, and a second step adds the
parts in a fixed order. No float atomics, so two runs are bitwise equal.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .torch_impl import Plan


@triton.jit
def _load(src, t, a, b, T, s_t, S_A, S_B, N_A, N_B):
    """src[t, a, b] as a (t, a, b) tile, 0 outside. In this shape neighbouring lanes read neighbouring bytes."""
    inside = (t < T)[:, None, None] & (a < N_A)[None, :, None] & (b < N_B)[None, None, :]
    return tl.load(src + t[:, None, None] * s_t + a[None, :, None] * S_A + b[None, None, :] * S_B, inside, other=0.0)


@triton.jit
def _fold(z):
    """(t, a, b) -> (a, t b), what a dot takes."""
    return tl.reshape(tl.permute(z, (1, 0, 2)), (z.shape[1], z.shape[0] * z.shape[2]))


@triton.jit
def _mix(
    src, m, dst, base, start, chunk, T, s_t, d_t, b_t,
    S_Q: tl.constexpr, S_W: tl.constexpr, M_P: tl.constexpr, M_Q: tl.constexpr, D_P: tl.constexpr, D_W: tl.constexpr,
    P: tl.constexpr, Q: tl.constexpr, W: tl.constexpr,
    BT: tl.constexpr, BP: tl.constexpr, BQ: tl.constexpr, BW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dst[t, p, w] = base[t, p, w] + sum_q m[p, q] src[t, q, w] for the program's tokens. base may be dst or None."""
    for t0 in range(0, chunk, BT):
        t = start + t0 + tl.arange(0, BT)
        for p0 in range(0, P, BP):
            p = p0 + tl.arange(0, BP)
            for w0 in range(0, W, BW):
                w = w0 + tl.arange(0, BW)
                acc = tl.zeros((BP, BT * BW), tl.float32)
                for q0 in range(0, Q, BQ):
                    q = q0 + tl.arange(0, BQ)
                    inside = (p < P)[:, None] & (q < Q)[None, :]
                    a = tl.load(m + p[:, None] * M_P + q[None, :] * M_Q, inside, other=0.0)
                    z = _fold(_load(src, t, q, w, T, s_t, S_Q, S_W, Q, W))
                    acc = tl.dot(a, z, acc, input_precision=PRECISION)
                out = tl.permute(tl.reshape(acc, (BP, BT, BW)), (1, 0, 2))
                if base is not None:
                    out += _load(base, t, p, w, T, b_t, D_P, D_W, P, W).to(tl.float32)
                inside = (t < T)[:, None, None] & (p < P)[None, :, None] & (w < W)[None, None, :]
                at = dst + t[:, None, None] * d_t + p[None, :, None] * D_P + w[None, None, :] * D_W
                tl.store(at, out.to(dst.dtype.element_ty), inside)


@triton.jit
def _gemm(
    src, m, dst, base, start, chunk, T, s_t, d_t, b_t,
    S_S: tl.constexpr, S_D: tl.constexpr, M_D: tl.constexpr, M_C: tl.constexpr, D_S: tl.constexpr, D_C: tl.constexpr,
    S: tl.constexpr, D: tl.constexpr, C: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dst[t, s, c] = base[t, s, c] + sum_d src[t, s, d] m[d, c] for the program's tokens. base may be dst or None."""
    for m0 in range(0, chunk * S, BM):
        row = m0 + tl.arange(0, BM)
        t, s = start + row // S, row % S
        live = (row < chunk * S) & (t < T)
        for c0 in range(0, C, BC):
            c = c0 + tl.arange(0, BC)
            acc = tl.zeros((BM, BC), tl.float32)
            for d0 in range(0, D, BD):
                d = d0 + tl.arange(0, BD)
                z_at = src + (t * s_t + s * S_S)[:, None] + d[None, :] * S_D
                z = tl.load(z_at, live[:, None] & (d < D)[None, :], other=0.0)
                b_at = m + d[:, None] * M_D + c[None, :] * M_C
                b = tl.load(b_at, (d < D)[:, None] & (c < C)[None, :], other=0.0)
                acc = tl.dot(z, b, acc, input_precision=PRECISION)
            inside = live[:, None] & (c < C)[None, :]
            if base is not None:
                acc += tl.load(base + (t * b_t + s * D_S)[:, None] + c[None, :] * D_C, inside, other=0.0).to(tl.float32)
            at = dst + (t * d_t + s * D_S)[:, None] + c[None, :] * D_C
            tl.store(at, acc.to(dst.dtype.element_ty), inside)


@triton.jit
def _mix_gradient(
    src, dout, dm, start, chunk, T, s_t, g_t,
    S_Q: tl.constexpr, S_W: tl.constexpr, G_P: tl.constexpr, G_W: tl.constexpr,
    P: tl.constexpr, Q: tl.constexpr, W: tl.constexpr,
    BT: tl.constexpr, BP: tl.constexpr, BQ: tl.constexpr, BW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dm[p, q] = sum_{t, w} dout[t, p, w] src[t, q, w] over the program's tokens; dm is contiguous."""
    for p0 in range(0, P, BP):
        p = p0 + tl.arange(0, BP)
        for q0 in range(0, Q, BQ):
            q = q0 + tl.arange(0, BQ)
            acc = tl.zeros((BP, BQ), tl.float32)
            for t0 in range(0, chunk, BT):
                t = start + t0 + tl.arange(0, BT)
                for w0 in range(0, W, BW):
                    w = w0 + tl.arange(0, BW)
                    g = _fold(_load(dout, t, p, w, T, g_t, G_P, G_W, P, W))
                    z = _fold(_load(src, t, q, w, T, s_t, S_Q, S_W, Q, W))
                    acc = tl.dot(g, tl.trans(z), acc, input_precision=PRECISION)
            tl.store(dm + p[:, None] * Q + q[None, :], acc, (p < P)[:, None] & (q < Q)[None, :])


@triton.jit
def _gemm_gradient(
    src, dout, dm, start, chunk, T, s_t, g_t,
    S_S: tl.constexpr, S_D: tl.constexpr, G_S: tl.constexpr, G_C: tl.constexpr, M_D: tl.constexpr, M_C: tl.constexpr,
    S: tl.constexpr, D: tl.constexpr, C: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dm[d, c] = sum_{t, s} src[t, s, d] dout[t, s, c] over the program's tokens."""
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        for c0 in range(0, C, BC):
            c = c0 + tl.arange(0, BC)
            acc = tl.zeros((BD, BC), tl.float32)
            for m0 in range(0, chunk * S, BM):
                row = m0 + tl.arange(0, BM)
                t, s = start + row // S, row % S
                live = ((row < chunk * S) & (t < T))[:, None]
                z = tl.load(src + (t * s_t + s * S_S)[:, None] + d[None, :] * S_D, live & (d < D)[None, :], other=0.0)
                g = tl.load(dout + (t * g_t + s * G_S)[:, None] + c[None, :] * G_C, live & (c < C)[None, :], other=0.0)
                acc = tl.dot(tl.trans(z), g, acc, input_precision=PRECISION)
            tl.store(dm + d[:, None] * M_D + c[None, :] * M_C, acc, (d < D)[:, None] & (c < C)[None, :])


@triton.jit(do_not_specialize=["T", "chunk"])
def forward_kernel(
    x, mA, mB, base, h, y, T, chunk, x_t, b_t,
    B_FIRST: tl.constexpr, Y_I: tl.constexpr, Y_U: tl.constexpr, A_P: tl.constexpr, A_Q: tl.constexpr,
    B_D: tl.constexpr, B_C: tl.constexpr, S: tl.constexpr, D: tl.constexpr, C: tl.constexpr,
    P: tl.constexpr, Q: tl.constexpr, W: tl.constexpr,
    BT: tl.constexpr, BP: tl.constexpr, BQ: tl.constexpr, BW: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y = base + product and h, the intermediate, (T, S, C) = (T, Q, W) for b_first, (T, P, W) = (T, S, D) else."""
    start = tl.program_id(0).to(tl.int64) * chunk  # 64 bits: T * width may exceed 2^31
    if B_FIRST:
        _gemm(x, mB, h, None, start, chunk, T, x_t, S * C, 0, D, 1, B_D, B_C, C, 1, S, D, C, BM, BD, BC, PRECISION)
        tl.debug_barrier()  # the program's threads see all of its h
        _mix(h, mA, y, base, start, chunk, T, Q * W, P * W, b_t, W, 1, A_P, A_Q, Y_I, Y_U, P, Q, W,
             BT, BP, BQ, BW, PRECISION)  # fmt: skip
    else:
        _mix(x, mA, h, None, start, chunk, T, x_t, P * W, 0, W, 1, A_P, A_Q, W, 1, P, Q, W, BT, BP, BQ, BW, PRECISION)
        tl.debug_barrier()
        _gemm(h, mB, y, base, start, chunk, T, S * D, S * C, b_t, D, 1, B_D, B_C, Y_I, Y_U, S, D, C,
              BM, BD, BC, PRECISION)  # fmt: skip


@triton.jit(do_not_specialize=["T", "chunk"])
def backward_kernel(
    dy, x, h, mA, mB, dh, dx, d_factors, T, chunk, x_t, dx_t,
    ADD: tl.constexpr, NEED_X: tl.constexpr, NEED_FACTORS: tl.constexpr,
    B_FIRST: tl.constexpr, Y_I: tl.constexpr, Y_U: tl.constexpr, A_P: tl.constexpr, A_Q: tl.constexpr,
    B_D: tl.constexpr, B_C: tl.constexpr, S: tl.constexpr, D: tl.constexpr, C: tl.constexpr,
    P: tl.constexpr, Q: tl.constexpr, W: tl.constexpr,
    BT: tl.constexpr, BP: tl.constexpr, BQ: tl.constexpr, BW: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dh, dx (added to dx with ADD), and this program's part of (dmA, dmB) in row `program_id` of d_factors.

    The matrices' gradients have the shapes that `Plan.matrices` gives: (P, Q), and (C, D) for b_first, (D, C) else.
    """
    start = tl.program_id(0).to(tl.int64) * chunk
    d_mA = d_factors + tl.program_id(0).to(tl.int64) * (P * Q + D * C)
    d_mB = d_mA + P * Q
    old_dx = dx if ADD else None
    if B_FIRST:
        _mix(dy, mA, dh, None, start, chunk, T, P * W, Q * W, 0, Y_I, Y_U, A_Q, A_P, W, 1, Q, P, W,
             BT, BQ, BP, BW, PRECISION)  # fmt: skip
        tl.debug_barrier()
        if NEED_X:
            _gemm(dh, mB, dx, old_dx, start, chunk, T, S * C, dx_t, dx_t, C, 1, B_C, B_D, D, 1, S, C, D,
                  BM, BC, BD, PRECISION)  # fmt: skip
        if NEED_FACTORS:
            _mix_gradient(h, dy, d_mA, start, chunk, T, Q * W, P * W, W, 1, Y_I, Y_U, P, Q, W,
                          BT, BP, BQ, BW, PRECISION)  # fmt: skip
            _gemm_gradient(x, dh, d_mB, start, chunk, T, x_t, S * C, D, 1, C, 1, 1, D, S, D, C,
                           BM, BD, BC, PRECISION)  # fmt: skip
    else:
        _gemm(dy, mB, dh, None, start, chunk, T, S * C, S * D, 0, Y_I, Y_U, B_C, B_D, D, 1, S, C, D,
              BM, BC, BD, PRECISION)  # fmt: skip
        tl.debug_barrier()
        if NEED_X:
            _mix(dh, mA, dx, old_dx, start, chunk, T, P * W, dx_t, dx_t, W, 1, A_Q, A_P, W, 1, Q, P, W,
                 BT, BQ, BP, BW, PRECISION)  # fmt: skip
        if NEED_FACTORS:
            _gemm_gradient(h, dy, d_mB, start, chunk, T, S * D, S * C, D, 1, Y_I, Y_U, C, 1, S, D, C,
                           BM, BD, BC, PRECISION)  # fmt: skip
            _mix_gradient(x, dh, d_mA, start, chunk, T, x_t, P * W, W, 1, W, 1, P, Q, W,
                          BT, BP, BQ, BW, PRECISION)  # fmt: skip


WARPS = 4
STAGES = 2  # tiles in flight a program; several programs share a multiprocessor, and memory is the bottleneck
SHARED_LIMIT = 99 * 1024  # what a program may have on the smallest supported parts (sm_86, sm_89); others: 163 KiB up
ACCUMULATOR_LIMIT = 64  # of the 255 registers of a thread; the rest holds operands and addresses
TILE_BYTES = 128  # a tile's side: one line of memory; in 16-bit dtypes that is also the M = 64 of Hopper's wgmma
SMALLEST = 16  # what tl.dot takes
# Tokens a program: as few as give every multiprocessor several programs, as many as pay for reading mA and mB again
# (forward) or for writing a part of the gradients (backward). The counts, and so the results, don't vary by device.
FORWARD_PROGRAMS, FORWARD_CHUNK = 512, 32
BACKWARD_PROGRAMS, BACKWARD_CHUNK = 128, 128


class Blocks(NamedTuple):
    """Tile sizes, powers of two: BT tokens, BP x BQ of mA, BW of the last index; BM rows, BD x BC of mB."""

    BT: int
    BP: int
    BQ: int
    BW: int
    BM: int
    BD: int
    BC: int

    def shared_bytes(self, itemsize: int) -> int:
        """Estimate of what a program needs in shared memory, from above.

        A step keeps both operands of its dot there, STAGES deep where its inner loop is pipelined, or the fp32 result
        on its way from the dot's register layout to one that stores whole lines. The steps follow each other and take
        the same memory; any of BP and BQ, BD and BC may be the inner dimension.
        """
        BT, BP, BQ, BW, BM, BD, BC = self
        mix = STAGES * (BP * BQ + max(BP, BQ) * BT * BW) * itemsize + 4 * max(BP, BQ) * BT * BW
        gradient = STAGES * (BP + BQ) * BT * BW * itemsize
        gemm = STAGES * (BM * max(BD, BC) + BD * BC) * itemsize + 4 * BM * max(BC, BD)
        return max(mix, gradient, gemm)

    def accumulators(self) -> int:
        """fp32 registers a thread that the largest dot's result takes."""
        BT, BP, BQ, BW, BM, BD, BC = self
        return max(max(BP, BQ) * BT * BW, BM * max(BD, BC), BD * BC) // (32 * WARPS)


def block_sizes(P: int, Q: int, W: int, D: int, C: int, itemsize: int) -> Blocks:
    """Tiles no larger than the matrices, halved at their largest side until both estimates are within the limits."""

    tile = TILE_BYTES // itemsize

    def fit(side: int, smallest: int = SMALLEST) -> int:
        return min(tile, max(smallest, triton.next_power_of_2(side)))

    BW = fit(W, 1)
    blocks = Blocks(2 * tile // BW, fit(P), fit(Q), BW, tile, fit(D), fit(C))
    while blocks.shared_bytes(itemsize) > SHARED_LIMIT or blocks.accumulators() > ACCUMULATOR_LIMIT:
        if blocks.BT * blocks.BW > tile:
            blocks = blocks._replace(BT=blocks.BT // 2)
            continue
        name = max(("BP", "BQ", "BD", "BC"), key=lambda n: getattr(blocks, n))
        blocks = blocks._replace(**{name: getattr(blocks, name) // 2})
    return blocks


def constants(plan: Plan, mA: torch.Tensor, mB: torch.Tensor) -> dict[str, object]:
    """Sizes, strides and tiles of a product: what the kernels are specialised on, besides dtypes.

    Args:
        mA: (P, Q). mB: (C, D) for b_first, (D, C) for a_first.
    """
    return dict(_constants(plan, *mA.shape, mA.stride(), mB.stride(), mA.element_size()))


@functools.cache  # asked for in every call
def _constants(
    plan: Plan, P: int, Q: int, mA_stride: tuple[int, int], mB_stride: tuple[int, int], itemsize: int
) -> dict[str, object]:
    r, a_out, a_in, b_out, b_in, layout, order, _ = plan
    b_first = order == "b_first"
    S, D, C, W = (a_in, b_in, r * b_out, b_out) if b_first else (a_out, r * b_in, b_out, b_in)
    b_d, b_c = mB_stride[::-1] if b_first else mB_stride
    return {
        "B_FIRST": b_first,
        "Y_I": b_out if layout == "kron" else 1,
        "Y_U": 1 if layout == "kron" else a_out,
        **{"A_P": mA_stride[0], "A_Q": mA_stride[1], "B_D": b_d, "B_C": b_c},
        **{"S": S, "D": D, "C": C, "P": P, "Q": Q, "W": W},
        **block_sizes(P, Q, W, D, C, itemsize)._asdict(),
        "PRECISION": "ieee",  # fp32 products are fp32, as torch's are by default; 16-bit dtypes ignore it
    }


def forward(
    x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, base: torch.Tensor | None, plan: Plan
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, h): y = base + the product as a new (T, out) tensor, and the intermediate for `backward`.

    Args:
        x: (T, in), rows of any stride. A: (r, a_out, a_in), B: (r, b_out, b_in), base: (T, out) or None; one dtype.
    """
    y = x.new_empty(x.shape[0], plan.a_out * plan.b_out)
    return y, _forward(x, A, B, None if base is None else _rows(base), y, plan)


def forward_(x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, y: torch.Tensor, plan: Plan) -> torch.Tensor:
    """y (T, out) += the product, in place; returns h. y must be contiguous and owned by the caller."""
    return _forward(x, A, B, y, y, plan)


def _forward(
    x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, base: torch.Tensor | None, y: torch.Tensor, plan: Plan
) -> torch.Tensor:
    x, (mA, mB) = _rows(x), _matrices(A, B, plan)
    h = x.new_empty(x.shape[0], plan.intermediate)
    T, sizes = x.shape[0], constants(plan, mA, mB)
    if T:
        chunk = _chunk(T, FORWARD_PROGRAMS, FORWARD_CHUNK, sizes["BT"])
        base_t = 0 if base is None else base.stride(0)
        with torch.cuda.device_of(x):
            forward_kernel[(triton.cdiv(T, chunk),)](
                x, mA, mB, base, h, y, T, chunk, x.stride(0), base_t, **sizes, num_warps=WARPS, num_stages=STAGES
            )
    return h


def backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    h: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    plan: Plan,
    dx: torch.Tensor | None = None,
    need_x: bool = True,
    need_factors: bool = True,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """(dX, dA, dB) from dy (T, out), x and h of `forward`; None for what is not needed.

    Args:
        dx: (T, in), contiguous and owned by the caller: dX is added to it in place. None makes a new one.
        dtype: of dA and dB; None means A's.
    """
    x, dy, (mA, mB) = _rows(x), dy.contiguous(), _matrices(A, B, plan)
    T, sizes = x.shape[0], constants(plan, mA, mB)
    chunk = _chunk(T, BACKWARD_PROGRAMS, BACKWARD_CHUNK, sizes["BT"])
    programs, add = triton.cdiv(T, chunk), dx is not None
    if need_x and dx is None:
        dx = x.new_empty(x.shape)
    parts = x.new_empty(programs if need_factors else 0, mA.numel() + mB.numel(), dtype=torch.float32)
    if T and (need_x or need_factors):
        with torch.cuda.device_of(x):
            backward_kernel[(programs,)](
                dy, x, h, mA, mB, torch.empty_like(h), dx, parts, T, chunk, x.stride(0), x.shape[1], add, need_x,
                need_factors, **sizes, num_warps=WARPS, num_stages=STAGES,
            )  # fmt: skip
    if not need_factors:
        return dx, None, None
    dmA, dmB = parts.sum(0).split([mA.numel(), mB.numel()])
    plan = plan._replace(layout="kron")
    dA, dB = plan.unmatrix_A(dmA.view(mA.shape)), plan.unmatrix_B(dmB.view(mB.shape))
    # not two views of one buffer
    own = {"dtype": dtype or A.dtype, "memory_format": torch.contiguous_format, "copy": True}
    return dx, dA.to(**own), dB.to(**own)


def _matrices(A: torch.Tensor, B: torch.Tensor, plan: Plan) -> tuple[torch.Tensor, torch.Tensor]:
    # The kernels take the kron layout's matrices for either layout: theirs differ only in y's strides.
    return plan._replace(layout="kron").matrices(A.contiguous(), B.contiguous())


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _chunk(T: int, programs: int, largest: int, BT: int) -> int:
    return max(BT, min(largest, triton.next_power_of_2(triton.cdiv(max(T, 1), programs))))

# SPDX-License-Identifier: Apache-2.0
"""What is gained if the adapters of q, k and v share their reads of x.

The library adapts each layer on its own, so that q, k and v each multiply x by their B, and each add to dX. Here one
autograd node holds all three layers: one product x [Bq Bk Bv]^T forward, one each for (dBq, dBk, dBv) and dX backward.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from peft_krona.ops import Frozen, kron_linear
from peft_krona.ops.apply_A import apply_A, backward_A
from peft_krona.ops.plan import Plan

from . import cases
from .measure import interleaved, median_added, peak_bytes, quantiles

Steps = dict[str, Callable[[], tuple[torch.Tensor, ...]]]


def qkv_suite(args: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """q, k and v of self-attention, forward + backward, adapted one by one and together."""
    rows: list[dict[str, Any]] = []
    for case in cases.layers(args.device, args.only):
        if case.n_in != case.n_out:
            continue
        for a_out, a_in in cases.FACTORS:
            steps = qkv_steps(case.tokens, case.n_in, a_out, a_in, args.dtype, args.device)
            times = interleaved(steps, args.repetitions, args.device, f"{case.name} ({a_out},{a_in})")
            for name in steps:
                row: dict[str, Any] = {"case": case._asdict(), "factors": [a_out, a_in], "provider": name}
                row["training"] = {**quantiles(times[name]), "added": median_added(times[name], times["frozen"])}
                row["peak_bytes"] = peak_bytes(steps[name], args.device)
                rows.append(row)
                print(
                    f"{case.name} ({a_out},{a_in}) {name:12} {row['training']['p50'] * 1e3:8.3f} ms  "
                    f"+{row['training']['added'] * 1e3:8.3f} ms  peak {row['peak_bytes'] / 2**20:7.1f} MiB"
                )
            yield rows


class _Joint(torch.autograd.Function):
    """Three frozen layers with their adapters (r = 1, layout "kron", B first), x (T, in)."""

    @staticmethod
    def forward(ctx, x, plan: Plan, weights, biases, *factors):
        As, B = factors[:3], torch.cat(factors[3:], 1).squeeze(0)
        T, u = x.shape[0], plan.b_out
        h = (x.view(T * plan.a_in, plan.b_in) @ B.t()).view(T, plan.a_in, 3 * u)
        ys, hs = [], [part.contiguous() for part in h.split(u, 2)]
        for A, part, weight, bias in zip(As, hs, weights, biases, strict=True):
            y = F.linear(x, weight, bias)
            ys.append(apply_A(y, *_as_multiplied(A, part, plan), plan))
        ctx.save_for_backward(x, B, *As, *hs)
        ctx.plan, ctx.weights = plan, weights
        return tuple(ys)

    @staticmethod
    def backward(ctx, *dys):
        x, B, *rest = ctx.saved_tensors
        As, hs, plan = rest[:3], rest[3:], ctx.plan
        T, u = x.shape[0], plan.b_out
        each = zip(dys, As, hs, strict=True)
        backward = [backward_A(dy, *_as_multiplied(A, h, plan), plan, (True, True)) for dy, A, h in each]
        dhs, dAs = zip(*backward, strict=True)
        dh = torch.cat([dh.view(T, plan.a_in, u) for dh in dhs], 2)
        rows = dh.view(T * plan.a_in, 3 * u)
        dB = rows.t() @ x.view(T * plan.a_in, plan.b_in)
        dx = (rows @ B).view(x.shape)
        for dy, weight in zip(dys, ctx.weights, strict=True):
            dx.addmm_(dy, weight)
        return (
            dx,
            None,
            None,
            None,
            *(dA.to(dy.dtype) for dA, dy in zip(dAs, dys, strict=True)),
            *(part.unsqueeze(0) for part in dB.split(u)),
        )


def _as_multiplied(A: torch.Tensor, h: torch.Tensor, plan: Plan) -> tuple[torch.Tensor, torch.Tensor]:
    """A (1, a_out, a_in) and h (T, a_in, b_out) as the plan's variant takes them (ops/apply_A.py)."""
    if plan.variant != "expanded":
        return A, h
    return A.squeeze(0) if plan.b_out == 1 else A, h.flatten(1)


def qkv_steps(tokens: int, width: int, a_out: int, a_in: int, dtype: torch.dtype, device: str) -> Steps:
    """Forward + backward of three layers that read one x: frozen, adapted one by one, adapted together.

    Raises:
        RuntimeError: if the two adapted ones disagree.
    """
    torch.manual_seed(0)
    linears = [nn.Linear(width, width, dtype=dtype, device=device).requires_grad_(False) for _ in range(3)]
    x = torch.randn(tokens, width, dtype=dtype, device=device, requires_grad=True)
    dys = [torch.randn(tokens, width, dtype=dtype, device=device) for _ in linears]

    def factors(rows: int, columns: int) -> list[torch.Tensor]:
        scale = columns**-0.5
        return [(torch.randn(1, rows, columns, device=device) * scale).to(dtype).requires_grad_() for _ in linears]

    As, Bs = factors(a_out, a_in), factors(width // a_out, width // a_in)
    plan = Plan.of(As[0], Bs[0], "kron", "b_first")
    weights, biases = [m.weight for m in linears], [m.bias for m in linears]
    leaves = [x, *As, *Bs]

    def frozen() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad([m(x) for m in linears], [x], dys)

    def one_by_one() -> tuple[torch.Tensor, ...]:
        layers = zip(weights, biases, As, Bs, strict=True)
        ys = [kron_linear(x, A, B, base=Frozen(weight, bias)) for weight, bias, A, B in layers]
        return torch.autograd.grad(ys, leaves, dys)

    def together() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(_Joint.apply(x, plan, weights, biases, *As, *Bs), leaves, dys)

    for a, b in zip(one_by_one(), together(), strict=True):
        if (error := ((a - b).norm() / a.norm()).item()) > 8 * torch.finfo(dtype).eps * tokens**0.5:
            raise RuntimeError(f"q, k and v together differ from one by one by {error:.1e}.")
    return {"frozen": frozen, "one by one": one_by_one, "together": together}

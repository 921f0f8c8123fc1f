# SPDX-License-Identifier: Apache-2.0
"""How long the op takes in each variant and on each backend, beside what the fixed rule takes: `--suite variants`.

The library has one rule, `ops.plan.default_variant`, and measures nothing itself. This makes the table by which the
rule is judged, on any device: per product, seconds of forward + backward by candidate ("torch batched", "torch paired",
"torch gathered", "torch expanded", "triton"), medians of interleaved repetitions. A candidate that raises, or whose
results are not those of the first one up to rounding, is out, with the reason.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch

from peft_krona.ops.backend import why_not_triton
from peft_krona.ops.linear import compute
from peft_krona.ops.operands import Update
from peft_krona.ops.plan import Plan, Target, at_least, can_pair, make_plan

from . import cases
from .measure import interleaved, quantiles

TF32 = 2**-9  # relative error that two products with TF32's inputs may have
Step = Callable[[], list[torch.Tensor]]


def variants_suite(args: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """The product of every layer, added to a tensor (the layer's own time would hide it), by every candidate."""
    rows: list[dict[str, Any]] = []
    for case in cases.layers(args.device, args.only):
        for a_out, a_in in cases.FACTORS:
            A, B = (1, a_out, a_in), (1, case.n_out // a_out, case.n_in // a_in)
            target = Target(args.device, args.dtype, at_least(case.tokens))
            plan = make_plan(A, B, "kron", None, target)
            seconds, out = measure(plan, case.tokens, args)
            row = {"case": case._asdict(), "factors": [a_out, a_in], "rule": plan.variant}
            rows.append({**row, "order": plan.order, "seconds": seconds, "out": out})
            times = ", ".join(f"{name} {1e3 * t:.3f} ms" for name, t in seconds.items())
            print(f"{case.name} ({a_out},{a_in}): {times}; the rule takes {plan.variant}")
            yield rows


def candidates(plan: Plan, device: torch.device, dtype: torch.dtype) -> list[str]:
    """What there is to choose from: first plain torch in the variant that every shape has."""
    names = ["torch batched"]
    if plan.order == "b_first":  # the order that has variants
        small = 2 * plan.r * plan.a_in * plan.b_out <= plan.n_in  # the expanded matrix, beside dW
        names += ["torch paired"] * can_pair(plan) + ["torch gathered"] * (plan.layout == "kron")
        names += ["torch expanded"] * small
    if device.type == "cuda" and why_not_triton(device, dtype) is None:  # on a CPU: the interpreter, which takes ages
        names.append("triton")
    return names


def measure(plan: Plan, tokens: int, args: argparse.Namespace) -> tuple[dict[str, float], dict[str, str]]:
    """(median seconds of forward + backward, why it is out), each by candidate, on random tensors."""
    steps, expected, out = {}, None, {}
    for name in candidates(plan, torch.device(args.device), args.dtype):
        step = _step(name, plan, tokens, args)
        try:
            results = step()
            expected = expected or results
            _check(results, expected, max(8 * torch.finfo(args.dtype).eps, TF32))
            steps[name] = step
        except Exception as error:
            if not steps:
                raise  # without the first candidate there is nothing to compare with
            out[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    times = interleaved(steps, args.repetitions, args.device, "variants")
    return {name: quantiles(values)["p50"] for name, values in times.items()}, out


def _step(name: str, plan: Plan, tokens: int, args: argparse.Namespace) -> Step:
    """Forward and backward by a candidate: y, dx, dA, dB, of the same values for each."""
    generator = torch.Generator(args.device).manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = args.dtype, terms: int = 1) -> torch.Tensor:
        values = torch.randn(*shape, device=args.device, generator=generator) * terms**-0.5
        return values.to(dtype)

    # Factors in at least fp32, as PEFT keeps them under a 16-bit model: casting them is part of what it costs.
    wide = torch.promote_types(args.dtype, torch.float32)
    x, base, dy = (normal(tokens, n) for n in (plan.n_in, plan.n_out, plan.n_out))
    A = normal(plan.r, plan.a_out, plan.a_in, dtype=wide, terms=plan.r * plan.a_in)
    B = normal(plan.r, plan.b_out, plan.b_in, dtype=wide, terms=plan.b_in)
    leaves = [t.requires_grad_() for t in (x, A, B)]
    backend, _, variant = name.partition(" ")
    mine = plan._replace(variant=variant or plan.variant)

    def step() -> list[torch.Tensor]:
        y = compute(x, Update(A, B), base, mine, backend)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    return step


def _check(results: list[torch.Tensor], expected: list[torch.Tensor], allowed: float) -> None:
    for what, got, want in zip(("y", "dx", "dA", "dB"), results, expected, strict=True):
        error = ((got - want).float().norm() / want.float().norm()).item()
        if not error <= allowed:
            raise ArithmeticError(f"{what} has a relative error of {error:.1e}, and {allowed:.1e} is allowed")

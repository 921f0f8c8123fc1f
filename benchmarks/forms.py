# SPDX-License-Identifier: Apache-2.0
"""How long the op takes in each form of the product with A, and which one the rule takes where nothing is measured."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch

from peft_krona.ops.linear import _apply
from peft_krona.ops.torch_impl import Plan
from peft_krona.ops.tuning import candidates, measure

from . import cases


def forms_suite(args: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """What `backend="auto"` measures, for the product added to a tensor (the layer's own time would hide it)."""
    rows: list[dict[str, Any]] = []
    device = torch.device(args.device)
    for case in cases.layers(args.device, args.only):
        for a_out, a_in in cases.FACTORS:
            shapes = (1, a_out, a_in), (1, case.n_out // a_out, case.n_in // a_in)
            plan = Plan.of_shapes(*shapes, "kron", None, None, args.device, args.dtype, case.tokens)
            names = candidates(plan, device, args.dtype)
            seconds, failed = measure(names, plan, case.tokens, device, args.dtype, "base", _apply)
            row = {"case": case._asdict(), "factors": [a_out, a_in], "rule": plan.form}
            rows.append({**row, "order": plan.order, "seconds": seconds, "out": failed})
            times = ", ".join(f"{name} {1e3 * t:.3f} ms" for name, t in seconds.items())
            print(f"{case.name} ({a_out},{a_in}): {times}; the rule takes {plan.form}")
            yield rows

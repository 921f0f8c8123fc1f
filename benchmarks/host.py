# SPDX-License-Identifier: Apache-2.0
"""What a call costs before any arithmetic: Python, dispatch and autograd, in microseconds a layer.

On a GPU an eager training step at batch 1 waits for that. It can be measured on a CPU with products so small that they
take no time (`cases.HOST`, 64 x 64), beside layers as real as SDXL's k and v, whose 77 tokens are few too. Measured is
the CPU time of the process, not the time on the wall, so that other work on the machine counts little; on a GPU it is
the time until the step's launches are queued.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import LoKrConfig, LoraConfig, get_peft_model
from torch import nn

from peft_krona import KronAConfig

from . import cases
from .measure import interleaved, median_added, quantiles
from .providers import backend_of, measured_on, on_backend, on_backends

Row = dict[str, Any]
LORA = "PEFT LoRA r=4"


def host_suite(args: argparse.Namespace) -> Iterator[list[Row]]:
    """Every case of `cases.HOST`; all rows so far after each."""
    rows: list[Row] = []
    for case in cases.HOST:
        if not args.only or args.only in case.name:
            rows += _one_case(case, args)
            yield rows


class _Stack(nn.Module):
    """The layers one after the other where they fit, else each on the same x (..., in)."""

    def __init__(self, case: cases.HostCase, args: argparse.Namespace) -> None:
        super().__init__()
        torch.manual_seed(0)
        linears = [nn.Linear(case.n_in, case.n_out, dtype=args.dtype, device=args.device) for _ in range(case.layers)]
        self.layers = nn.ModuleList(linears).requires_grad_(False)
        self.chained = case.n_in == case.n_out

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if not self.chained:
            return tuple(layer(x) for layer in self.layers)
        for layer in self.layers:
            x = layer(x)
        return (x,)


def _configs(case: cases.HostCase) -> dict[str, Any]:
    names = [f"layers.{n}" for n in range(case.layers)]
    configs: dict[str, Any] = {
        "frozen": None,
        LORA: LoraConfig(target_modules=names, r=4, lora_alpha=4, init_lora_weights=False),
    }
    if (
        case.n_in <= 64
    ):  # of real sizes it builds matrices as large as the weights, and takes the others' memory and cache
        lokr = LoKrConfig(target_modules=names, r=32, alpha=32, decompose_factor=-1, init_weights=False)
        configs["PEFT LoKr"] = lokr
    for a_out, a_in in case.factors:
        krona = KronAConfig(target_modules=names, a_out=a_out, a_in=a_in, init_weights=False)
        configs |= on_backends(f"KronA ({a_out},{a_in})", krona)
    return configs


def _one_case(case: cases.HostCase, args: argparse.Namespace) -> list[Row]:
    x = torch.randn(case.tokens, case.n_in, dtype=args.dtype, device=args.device, requires_grad=True)
    dy = torch.randn(case.tokens, case.n_out, dtype=args.dtype, device=args.device)
    configs = _configs(case)
    rows = {name: {"case": case._asdict(), "provider": name} for name in measured_on(args.device, configs)}
    steps: dict[str, dict[str, Callable[[], None]]] = {"forward": {}, "training": {}}
    for name in rows:
        model: nn.Module = _Stack(case, args)
        if configs[name] is not None:
            model = get_peft_model(model, configs[name])
        steps["forward"][name] = on_backend(backend_of(name), _forward(model, x))
        steps["training"][name] = on_backend(backend_of(name), _training(model, x, dy))
    for kind, of_kind in steps.items():
        # what is added to large products is a small difference of large numbers
        repetitions = args.repetitions if case.layers > 8 else 2 * args.repetitions
        times = interleaved(of_kind, repetitions, args.device, f"{case.name} {kind}", timed=host_seconds)
        times = {name: [seconds / case.layers for seconds in values] for name, values in times.items()}
        lora = median_added(times[LORA], times["frozen"])
        for name, row in rows.items():
            added = [a - b for a, b in zip(times[name], times["frozen"], strict=True)]
            row[kind] = {**quantiles(times[name]), "added": quantiles(added)}
            row[kind]["of_lora"] = row[kind]["added"]["p50"] / lora
    for row in rows.values():
        both = "   ".join(
            f"{kind} +{1e6 * row[kind]['added']['p50']:7.1f} us, {row[kind]['of_lora']:.2f} of LoRA's"
            for kind in ("forward", "training")
        )
        print(f"{case.name:28} {row['provider']:16} {both}")
    return list(rows.values())


def _forward(model: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    def step() -> None:
        with torch.no_grad():
            model(x)

    return step


def _training(model: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> Callable[[], None]:
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]

    def step() -> None:
        ys = model(x)
        torch.autograd.backward(ys, [dy] * len(ys))
        for leaf in leaves:
            leaf.grad = None

    return step


def host_seconds(step: Callable[[], object], device: str) -> float:
    """CPU time of a step; on a GPU the time until its launches are queued."""
    if device == "cuda":
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        seconds = time.perf_counter() - start
        torch.cuda.synchronize()
        return seconds
    start = time.process_time()
    step()
    return time.process_time() - start

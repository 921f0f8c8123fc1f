# SPDX-License-Identifier: Apache-2.0
"""One adapted Linear: what an adapter adds to the frozen layer's time, and how far that is from the floor."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_krona import KronAConfig

from . import cases
from .measure import failure, interleaved, median_added, median_ratio, peak_bytes, quantiles
from .providers import PROVIDERS, Adapted, backend_of, measured_on, on_backend, on_backends

Row = dict[str, Any]


def floor_bytes(tokens: int, n_in: int, n_out: int, dtype: torch.dtype) -> dict[str, int]:
    """Bytes that any adapter beside a frozen layer has to move, in the forward pass and in a training step.

    Forward: read x and the frozen layer's output, write y. Backward: read dY, x and the frozen layer's dX, write dX.
    A training step is both. The factors, their gradients and intermediates are not counted.
    """
    x, y = tokens * n_in * dtype.itemsize, tokens * n_out * dtype.itemsize
    forward = x + 2 * y
    return {"forward": forward, "training": forward + y + 3 * x}


def layer_suite(args: argparse.Namespace) -> Iterator[list[Row]]:
    """Every layer of `cases.layers` with every factor pair and provider; all rows so far after each."""
    rows: list[Row] = []
    for case in cases.layers(args.device, args.only):
        for a_out, a_in in cases.FACTORS:
            label = f"{case.name} ({a_out},{a_in})"
            new = _one_layer(case, a_out, a_in, label, args)
            _print_layer(label, new)
            rows += new
            yield rows


def _one_layer(case: cases.LinearCase, a_out: int, a_in: int, label: str, args: argparse.Namespace) -> list[Row]:
    torch.manual_seed(0)
    linear = nn.Linear(case.n_in, case.n_out, dtype=args.dtype, device=args.device).requires_grad_(False)
    x = torch.randn(case.tokens, case.n_in, dtype=args.dtype, device=args.device, requires_grad=True)
    dy = torch.randn(case.tokens, case.n_out, dtype=args.dtype, device=args.device)
    rows = {name: {"case": case._asdict(), "factors": [a_out, a_in], "provider": name} for name in args.providers}
    steps: dict[str, dict[str, Callable[[], None]]] = {"forward": {}, "training": {}}
    for name, row in rows.items():
        try:
            module = _build(name, linear, a_out, a_in, args)
            row["trainable"] = sum(p.numel() for p in module.parameters() if p.requires_grad)
            if (error := _numeric_error(module, linear, x)) is not None:
                row["wrong"] = error
                continue
            training = _forward_backward(module, x, dy)
            training()
        except Exception as error:  # one provider that does not run here leaves the others their numbers
            row["failed"] = failure(error)
            continue
        steps["forward"][name], steps["training"][name] = _no_grad(module, x), training
    moved = floor_bytes(case.tokens, case.n_in, case.n_out, args.dtype)
    for kind, of_kind in steps.items():
        times = interleaved(of_kind, repetitions(case, args), args.device, f"{label} {kind}")
        for name, mine in times.items():
            rows[name][kind] = quantiles(mine)
            if "frozen" in times:
                added = median_added(mine, times["frozen"])
                rows[name][kind] |= {"added": added, "over_frozen": median_ratio(mine, times["frozen"])}
                if name != "frozen":
                    rows[name][kind] |= _against_the_floor(added, moved[kind], args.copy_bytes_per_second)
    for name, step in steps["training"].items():
        rows[name]["peak_bytes"] = peak_bytes(step, args.device)
    return list(rows.values())


def repetitions(case: cases.LinearCase, args: argparse.Namespace) -> int:
    """Three times as many on a CPU for layers of a few milliseconds, whose added time drowns in noise else."""
    short = case.tokens * case.n_in * case.n_out < 2**29
    return args.repetitions * 3 if short and args.device == "cpu" else args.repetitions


def _against_the_floor(added: float, moved: int, bandwidth: float) -> Row:
    """The floor in seconds, how many times that was taken, and the bandwidth that this comes to.

    Less than 1 means that a cache had part of what was read: large memory is what `bandwidth` was measured in.
    """
    floor = moved / bandwidth
    return {"floor": floor, "over_floor": added / floor, "bytes_per_second": moved / added if added > 0 else None}


def _build(name: str, linear: nn.Linear, a_out: int, a_in: int, args: argparse.Namespace) -> Adapted:
    base = copy.deepcopy(linear) if "LyCORIS" in name else linear  # LyCORIS patches the layer itself
    return PROVIDERS[name](base, a_out, a_in).to(args.device).train()


def _numeric_error(module: Adapted, linear: nn.Linear, x: torch.Tensor) -> str | None:
    """None if the output is base + dW x up to rounding, else what it is off by."""
    x = x if x.is_cuda else x[:64]  # in float64, which takes a CPU long
    with torch.no_grad():
        delta = module.delta_weight()
        weight = linear.weight.double() + (0 if delta is None else delta.double())
        expected = torch.nn.functional.linear(x.double(), weight, linear.bias.double())
        error = ((module(x).double() - expected).norm() / expected.norm()).item()
    # bf16 keeps 8 bits; a product of three roundings each well within two of its ulps
    allowed = 8 * torch.finfo(x.dtype).eps
    return None if error <= allowed else f"relative error {error:.1e} (allowed {allowed:.1e})"


def _no_grad(module: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    def step() -> None:
        with torch.no_grad():
            module(x)

    return step


def _forward_backward(module: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> Callable[[], None]:
    parameters = [p for p in module.parameters() if p.requires_grad]

    def step() -> None:
        torch.autograd.grad(module(x), [x, *parameters], dy)

    return step


def _print_layer(label: str, rows: list[Row]) -> None:
    print(f"\n{label}")
    for row in rows:
        if "wrong" in row or "failed" in row:
            print(
                f"  {row['provider']:22} "
                + (f"WRONG: {row['wrong']}" if "wrong" in row else f"FAILED: {row['failed']}")
            )
            continue
        times = (
            f"{kind} {row[kind]['p50'] * 1e3:8.3f} ms  +{row[kind].get('added', float('nan')) * 1e3:8.3f}"
            for kind in ("forward", "training")
        )
        print(f"  {row['provider']:22} {'   '.join(times)}   peak {row['peak_bytes'] / 2**20:7.1f} MiB")


def scaling_suite(args: argparse.Namespace) -> Iterator[list[Row]]:
    """One square layer through get_peft_model: what it costs as one of `cases.SCALING` grows."""
    rows: list[Row] = []
    for axis, values in cases.SCALING.items():
        for value in values:
            rows += _one_point(axis, cases.POINT | {axis: value}, args)
            yield rows


def _one_point(axis: str, point: dict[str, int], args: argparse.Namespace) -> list[Row]:
    width, rank = point["width"], 4 * point["r"]
    torch.manual_seed(0)
    x = torch.randn(point["tokens"], width, dtype=args.dtype, device=args.device, requires_grad=True)
    linear = nn.Linear(width, width, dtype=args.dtype, device=args.device).requires_grad_(False)
    lora = LoraConfig(target_modules=["0"], r=rank, lora_alpha=rank, init_lora_weights=False)
    krona = KronAConfig(target_modules=["0"], r=point["r"], a_out=64, a_in=4, init_weights=False)
    configs = {"frozen": None, "PEFT LoRA 4 r": lora, **on_backends("KronA", krona)}
    steps: dict[str, dict[str, Callable[[], None]]] = {"forward": {}, "training": {}}
    for name in measured_on(args.device, configs):
        model: nn.Module = nn.Sequential(linear)
        if (config := configs[name]) is not None:
            model = get_peft_model(model, config)
            names = ["default", *(f"adapter{n}" for n in range(1, point["adapters"]))]
            for other in names[1:]:
                model.add_adapter(other, config)
            model.base_model.set_adapter(names)
        steps["forward"][name] = on_backend(backend_of(name), _no_grad(model, x))
        steps["training"][name] = on_backend(backend_of(name), _forward_backward(model, x, torch.randn_like(x)))
    label = f"{axis} {point[axis]}"
    rows = {name: {"axis": axis, **point, "provider": name} for name in steps["forward"]}
    for kind, of_kind in steps.items():
        times = interleaved(of_kind, args.repetitions, args.device, f"{label} {kind}")
        for name, row in rows.items():
            row[kind] = {**quantiles(times[name]), "added": median_added(times[name], times["frozen"])}
    for name, row in rows.items():
        print(
            f"{label:14} {name:16} forward +{row['forward']['added'] * 1e3:8.3f} ms   "
            f"training +{row['training']['added'] * 1e3:8.3f} ms"
        )
    return list(rows.values())

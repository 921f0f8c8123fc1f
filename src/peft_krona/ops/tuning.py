# SPDX-License-Identifier: Apache-2.0
"""backend="auto": the implementation that was the quickest on this device, measured once a shape and kept on disk.

A table holds the seconds that forward + backward took, by product ("linear bfloat16 kron b_first ..."), tokens (rounded
up to a power of two) and candidate ("torch batched", "torch expanded", "triton", ...). There is one for each device, in
memory and as a JSON file. docs/performance.md says what a user has to know about them.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import operator
import os
import platform
import random
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib import metadata

import torch
from torch.autograd.graph import saved_tensors_hooks

from .._compat import dispatch_modes, sees_single_ops
from .backend import why_not_triton
from .mix import FORMS, can_pair
from .torch_impl import Plan, no_autocast

MOST_TOKENS = 2**14  # more are measured as so many: it bounds memory, and times only grow with the tokens from there
REPETITIONS, PATIENCE = 9, 2.0  # timed runs of every candidate; seconds after which three have to do
TF32 = 2**-9  # relative error that two products with TF32's inputs may have

Run = Callable[..., torch.Tensor]  # x, A, B, scale, base or None, weight or None, bias or None, plan, backend -> y
Table = dict[str, dict[int, dict[str, float]]]  # product -> tokens -> candidate -> seconds
_tables: dict[str, Table] = {}
_choices: dict[tuple[object, ...], str] = {}
_warned: set[str] = set()
logger = logging.getLogger(__name__)


def choose(plan: Plan, x: torch.Tensor, into: str, run: Run) -> tuple[str, Plan]:
    """The backend, "torch" or "triton", and the plan in the form to take. Measures where it may and has to.

    Args:
        x: (..., in) in the compute dtype.
        into: what the product is added to: "linear" (a frozen layer's GEMM), "base" (a tensor) or "none".
        run: the op.
    """
    name, T = "", x.numel() // x.shape[-1]
    if not _may_measure(x) or not T:
        sizes = [operator.index(size) for size in plan[:5]]  # constants in a graph, also where shapes are dynamic
        for tokens, name in _recorded(x.device, x.dtype, into, *sizes, *plan[5:]):  # noqa: B007
            if T <= tokens:  # the next larger number that was measured, or the largest. T may be symbolic
                break
    else:
        tokens = min(1 << (T - 1).bit_length(), MOST_TOKENS)
        key = (plan, tokens, into, x.dtype, x.device, torch.get_num_threads())
        if key not in _choices:
            _choices[key] = _measured(plan, tokens, x.device, x.dtype, into, run)
        name = _choices[key]
    return _parts(name, plan) if name else ("torch", plan)


def candidates(plan: Plan, device: torch.device, dtype: torch.dtype) -> list[str]:
    """What there is to choose from: first plain torch in the form that every shape has."""
    names = ["torch batched"]
    if plan.order == "b_first":  # the order that has forms
        small = 2 * plan.r * plan.a_in * plan.b_out <= plan.a_in * plan.b_in  # the expanded matrix, beside dW
        exists = {"paired": can_pair(plan.a_out, plan.layout), "expanded": small}
        names += [f"torch {form}" for form in FORMS[1:] if exists[form]]
    if device.type == "cuda" and why_not_triton(device, dtype) is None:  # on a CPU: the interpreter, which takes ages
        names.append("triton")
    return names


def _parts(name: str, plan: Plan) -> tuple[str, Plan]:
    backend, _, form = name.partition(" ")
    return backend, plan._replace(form=form or plan.form)


def _may_measure(x: torch.Tensor) -> bool:
    """Not in CI, and only where tensors are real and a few more runs of the op go unnoticed."""
    return not (
        torch.compiler.is_compiling()
        or sees_single_ops()
        or type(x) not in (torch.Tensor, torch.nn.Parameter)
        or dispatch_modes() > 0
        or x.device.type not in ("cpu", "cuda")
        or (x.device.type == "cuda" and torch.cuda.is_current_stream_capturing())
        or os.environ.get("CI")
    )


@torch.compiler.assume_constant_result  # torch.compile takes what this returns and does not look into it
def _recorded(device: torch.device, dtype: torch.dtype, into: str, *sizes: int | str) -> tuple[tuple[int, str], ...]:
    """(tokens, the quickest candidate, "" if there is none) of what was measured for this product, fewest first."""
    plan = Plan(*sizes)  # which torch.compile would not take for a constant
    measured = _table(_device_name(device, torch.get_num_threads())).get(_product_name(plan, dtype, into), {})
    names = candidates(plan, device, dtype)
    return tuple((tokens, _quickest(measured[tokens], names)) for tokens in sorted(measured))


def _measured(plan: Plan, tokens: int, device: torch.device, dtype: torch.dtype, into: str, run: Run) -> str:
    """The quickest candidate by the table, or else by a measurement; "" where that failed."""
    names = candidates(plan, device, dtype)
    if len(names) == 1:
        return names[0]
    label, product = _device_name(device, torch.get_num_threads()), _product_name(plan, dtype, into)
    known = _table(label).setdefault(product, {})
    if chosen := _quickest(known.get(tokens, {}), names):
        return chosen
    what = f"Kronecker product {product}, {tokens} tokens, on {label}"
    try:
        seconds, lost = measure(names, plan, tokens, device, dtype, into, run)
    except Exception as error:
        seconds, lost = {}, {"every candidate": _reason(error)}
    for name, reason in lost.items():
        logger.warning("%s: %s is out: %s", what, name, reason)
    chosen = _quickest(seconds, names)
    times = ", ".join(f"{name} {1e3 * t:.3f} ms" for name, t in seconds.items())
    logger.info("%s: %s. Chosen: %s.", what, times or "nothing measured", chosen or "the default")
    if not lost:  # what failed now, such as for want of memory, may work the next time
        known[tokens] = seconds
        _write(label)
    return chosen


def _quickest(seconds: dict[str, float], names: list[str]) -> str:
    return min((name for name in names if name in seconds), key=seconds.__getitem__, default="")


def measure(
    names: list[str], plan: Plan, tokens: int, device: torch.device, dtype: torch.dtype, into: str, run: Run
) -> tuple[dict[str, float], dict[str, str]]:
    """(median seconds of forward + backward, why it is out), each by candidate, on random tensors.

    A candidate is out if it raises, or if its results are not those of the first one up to rounding.

    Raises:
        Exception: whatever making the tensors, or the first candidate's first run, raises.
    """
    times: dict[str, list[float]] = {name: [] for name in names}
    lost: dict[str, str] = {}
    # An own pair of hooks hides the caller's, such as activation checkpointing's, from these runs.
    hooks = saved_tensors_hooks(lambda t: t, lambda t: t)
    on_device = torch.cuda.device(device if device.type == "cuda" else -1)
    with torch.inference_mode(False), torch.enable_grad(), no_autocast(device), hooks, on_device:
        step = _random_step(plan, tokens, device, dtype, into, run)
        expected, allowed = step(names[0]), max(8 * torch.finfo(dtype).eps, TF32)
        order, begin = random.Random(0), time.perf_counter()
        for repetition in range(-2, REPETITIONS):  # two to warm up, and to check the results
            good = [name for name in names if name not in lost]
            for name in order.sample(good, len(good)):
                try:
                    seconds, results = _timed(functools.partial(step, name), device)
                    if repetition < 0:
                        _check(results, expected, allowed)
                    else:
                        times[name].append(seconds)
                except Exception as error:
                    lost[name] = _reason(error)
            if repetition >= 2 and time.perf_counter() - begin > PATIENCE:
                break
    return {name: statistics.median(times[name]) for name in names if name not in lost}, lost


def _random_step(
    plan: Plan, tokens: int, device: torch.device, dtype: torch.dtype, into: str, run: Run
) -> Callable[[str], list[torch.Tensor]]:
    """Forward and backward by a candidate: y, dx, dA, dB, of values from an own generator.

    Factors have at least fp32, as PEFT keeps them under a 16-bit model: casting them is part of what a candidate costs.
    """
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, terms: int = 1) -> torch.Tensor:  # products of so many terms are near 1
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype) * terms**-0.5

    r, a_out, a_in, b_out, b_in = plan[:5]
    n_out, n_in = a_out * b_out, a_in * b_in
    x, A, B = normal(tokens, n_in), normal(r, a_out, a_in, terms=r * a_in), normal(r, b_out, b_in, terms=b_in)
    A, B = (t.to(torch.promote_types(dtype, torch.float32)) for t in (A, B))
    leaves, dy = [t.requires_grad_() for t in (x, A, B)], normal(tokens, n_out)
    base = normal(tokens, n_out) if into == "base" else None
    weight = normal(n_out, n_in, terms=n_in) if into == "linear" else None

    def step(name: str) -> list[torch.Tensor]:
        backend, own_plan = _parts(name, plan)
        y = run(*leaves, 1.0, base, weight, None, own_plan, backend)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    return step


def _check(results: list[torch.Tensor], expected: list[torch.Tensor], allowed: float) -> None:
    for what, got, want in zip(("y", "dx", "dA", "dB"), results, expected, strict=True):
        error = ((got - want).float().norm() / want.float().norm()).item()
        if not error <= allowed:
            raise ArithmeticError(f"{what} has a relative error of {error:.1e}, and {allowed:.1e} is allowed")


def _timed(run: Callable[[], list[torch.Tensor]], device: torch.device) -> tuple[float, list[torch.Tensor]]:
    """(seconds, result). On a GPU until the last kernel is done, launches included: eager code waits for these too."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        result = run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3, result
    begin = time.perf_counter()
    result = run()
    return time.perf_counter() - begin, result


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


# -- the table on disk -----------------------------------------------------------------------------------------------


def table_path(label: str) -> str:
    """The file of a device's table."""
    folder = os.environ.get("PEFT_KRONA_CACHE")
    if not folder:
        folder = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache"), "peft-krona")
    return os.path.join(os.path.expanduser(folder), re.sub(r"[^A-Za-z0-9]+", "-", label).strip("-") + ".json")


@functools.cache
def _device_name(device: torch.device, threads: int) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo", encoding="utf-8") as file:
        name = next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, threads: {threads}"


def _product_name(plan: Plan, dtype: torch.dtype, into: str) -> str:
    r, a_out, a_in, b_out, b_in = plan[:5]
    return f"{into} {str(dtype)[6:]} {plan.layout} {plan.order} r={r} A={a_out}x{a_in} B={b_out}x{b_in}"


@functools.cache
def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"torch": torch.__version__, "triton": None, "peft-krona": None}
    for package in ("triton", "peft-krona"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def _table(label: str) -> Table:
    if label not in _tables:
        _tables[label] = _read(label)
    return _tables[label]


def _read(label: str) -> Table:
    """What the file has for these versions. Nothing, with a warning, if it is none of ours; it gets overwritten."""
    path = table_path(label)
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        if (content["device"], content["versions"]) != (label, _versions()):
            logger.info("%s is ignored: it was measured with other versions.", path)
            return {}
        return {
            product: {int(tokens): {name: float(t) for name, t in by.items()} for tokens, by in measured.items()}
            for product, measured in content["seconds"].items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        _warn_once(f"{path} is ignored: it is no table of measurements ({_reason(error)}).")
        return {}


def _write(label: str) -> None:
    """Put the table into its file, with what other processes put there meanwhile; as a whole or not at all."""
    table, path = _tables[label], table_path(label)
    for product, measured in _read(label).items():
        table[product] = measured | table.get(product, {})
    seconds = {product: dict(measured) for product, measured in list(table.items())}  # other threads may add to it
    temporary = None
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        handle, temporary = tempfile.mkstemp(".tmp", dir=os.path.dirname(path))
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump({"device": label, "versions": _versions(), "seconds": seconds}, file, indent=1)
        os.replace(temporary, path)
    except OSError as error:
        _warn_once(f"{path} cannot be written, so what is measured lasts as long as this process ({_reason(error)}).")
    finally:
        if temporary is not None:  # still there after an error alone
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        logger.warning(message)

# SPDX-License-Identifier: Apache-2.0
"""Interleaved timing and peak memory, on a CPU or a CUDA device."""

from __future__ import annotations

import os
import platform
import random
import subprocess
import time
import traceback
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

Step = Callable[[], object]
HEAD_START = 5_000_000  # cycles, about 3 ms, in which a GPU waits while the step's kernels are queued
OUT_OF_MEMORY = "out of memory"


def interleaved(
    steps: dict[str, Step], repetitions: int, device: str, label: str, timed: Callable[[Step, str], float] | None = None
) -> dict[str, list[float]]:
    """Seconds of every step by `timed`, all of them once in every repetition, so that drift hits all alike.

    Their order is drawn anew each time: what ran before a step leaves it caches and an allocator in a certain state,
    which was seen to move a step's time by several percent.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    order = random.Random(0)
    for repetition in tqdm(range(-2, repetitions), desc=label, leave=False):
        for name in order.sample(list(steps), len(steps)):
            seconds = (timed or _timed)(steps[name], device)
            if repetition >= 0:  # the first two rounds warm up
                times[name].append(seconds)
    return times


def _timed(step: Step, device: str) -> float:
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(HEAD_START)  # else a step of a few small kernels measures Python
        start.record()
        step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def clock(device: str) -> Callable[[Step, str], float]:
    """How whole models are timed. On a CPU in seconds of the process, over all its threads: a step of seconds meets the
    machine's other work, which moved the time on the wall by half and this one by a few percent."""
    return _timed if device == "cuda" else _cpu_seconds


def _cpu_seconds(step: Step, device: str) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


def peak_bytes(step: Step, device: str) -> int:
    """Most memory allocated at any time during the step, beyond what was allocated before it."""
    step()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    allocations = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(allocations, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def quantiles(values: list[float]) -> dict[str, float]:
    """20th, 50th and 80th percentile."""
    ordered = sorted(values)
    return {f"p{q}": ordered[min(len(ordered) - 1, int(len(ordered) * q / 100))] for q in (20, 50, 80)}


def median_ratio(times: list[float], reference: list[float]) -> float:
    """Median over the repetitions of this step's time over the reference's in the same repetition.

    If a run is not through, one of the two may have been measured in more repetitions; those are left out.
    """
    return quantiles([a / b for a, b in zip(times, reference, strict=False)])["p50"]


def median_added(times: list[float], reference: list[float]) -> float:
    """Median over the repetitions of the seconds added to the reference's in the same repetition."""
    return quantiles([a - b for a, b in zip(times, reference, strict=True)])["p50"]


def failure(error: Exception) -> str:
    """One line that says what went wrong; the traceback goes to standard error."""
    if isinstance(error, torch.OutOfMemoryError):
        return OUT_OF_MEMORY
    traceback.print_exception(error)
    return f"{type(error).__name__}: {error}".splitlines()[0]


def copy_bandwidth(device: str) -> float:
    """Bytes per second (read plus written) of a large copy within the device's memory."""
    source = torch.ones(2**28 if device == "cuda" else 2**26, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    times = interleaved({"copy": lambda: target.copy_(source)}, 10, device, "copy bandwidth")["copy"]
    return 2 * source.nbytes / quantiles(times)["p50"]


def environment(device: str) -> dict[str, object]:
    """What a reader needs to judge the numbers: device, versions, threads, commit."""
    packages = ("torch", "peft", "diffusers", "transformers", "lycoris-lora", "triton")
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
        "commit": _output("git", "describe", "--always", "--dirty") or "unknown",
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            name = next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor()
    features = [f for f in ("avx512f", "avx512_bf16", "amx_bf16") if f in _cpu_flags()]
    return " ".join([name, *features])


def _cpu_flags() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line for line in file if line.startswith("flags"))
    except (OSError, StopIteration):
        return ""


def _output(*command: str) -> str | None:
    """The first line that a command prints; None if it cannot run."""
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    except OSError:
        return None
    return lines[0].strip() if lines else None

# SPDX-License-Identifier: Apache-2.0
"""What a training keeps in memory, counted before it starts, and what it needed at most, measured at its end."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn

MIB = 2**20
SMALL = 4096  # bitsandbytes keeps the state of smaller tensors in 32 bits
# bytes of state per trained number, by the optimizer's class; what is not here is not counted
STATES = {"AdamW": 8, "Adam": 8, "Prodigy": 16, "AdamWScheduleFree": 8, "SGD": 0, "RMSprop": 4, "Adagrad": 4}


def is_too_little(error: BaseException) -> bool:
    """Whether it says that memory could not be had, of a GPU or of the host."""
    return isinstance(error, MemoryError) or should_reduce_batch_size(error)


def estimate(
    models: Mapping[str, nn.Module], trained: Iterable[nn.Parameter], optimizer: Any, caches: Mapping[str, Any]
) -> dict[str, dict[str, int | None]]:
    """{device: {what: bytes}} of this process; None: not known.

    Args:
        models: {component: model}, all that is loaded. trained: the adapter's parameters, which are counted as that.
        caches: {what: anything that holds tensors}.
    """
    adapter = {id(p): p for p in trained}
    found: dict[str, dict[str, int | None]] = {}
    for name, model in models.items():
        for tensor in (*model.parameters(), *model.buffers()):
            if id(tensor) not in adapter:
                own = found.setdefault(tensor.device.type, {})
                own[name] = (own.get(name) or 0) + size_of(tensor)
    for parameter in adapter.values():
        own = found.setdefault(parameter.device.type, {})
        for what in ("adapter", "gradients"):
            own[what] = (own.get(what) or 0) + size_of(parameter)
    where = next((p.device.type for p in adapter.values()), "cpu")
    found.setdefault(where, {})["optimizer"] = state_size(optimizer, list(adapter.values()))
    for what, held in caches.items():
        for tensor in tensors_in(held):
            own = found.setdefault(tensor.device.type, {})
            own[what] = (own.get(what) or 0) + size_of(tensor)
    return found


def state_size(optimizer: Any, trained: list[nn.Parameter]) -> int | None:
    """Bytes of an optimizer's state after its first step, None if its class is not known."""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    kind = type(optimizer).__name__
    if kind.endswith("8bit"):
        return sum(local(p).numel() * (8 if p.numel() < SMALL else 2) for p in trained)
    if kind == "SGD":
        return 4 * any(g["momentum"] for g in optimizer.param_groups) * sum(local(p).numel() for p in trained)
    per_number = STATES.get(kind)
    return None if per_number is None else per_number * sum(local(p).numel() for p in trained)


def measured_state(optimizer: Any) -> int:
    """Bytes of the tensors that an optimizer keeps now, but for its counters."""
    optimizer = getattr(optimizer, "optimizer", optimizer)
    return sum(size_of(t) for state in optimizer.state.values() for t in tensors_in(state) if t.dim() > 0)


def size_of(tensor: torch.Tensor) -> int:
    """Bytes in this process, also of a tensor that is spread over several."""
    tensor = local(tensor)
    return tensor.numel() * tensor.element_size()


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else getattr(tensor, "ds_tensor", tensor)


def tensors_in(held: Any) -> Iterable[torch.Tensor]:
    if isinstance(held, torch.Tensor):
        yield held
    elif isinstance(held, Mapping):
        for value in held.values():
            yield from tensors_in(value)
    elif isinstance(held, (list, tuple)):
        for value in held:
            yield from tensors_in(value)


def described(found: Mapping[str, Mapping[str, int | None]]) -> list[str]:
    """One line per device."""
    lines = []
    for device, parts in sorted(found.items(), reverse=True):
        known = {name: size for name, size in parts.items() if size}
        unknown = [name for name, size in parts.items() if size is None]
        shown = ", ".join(f"{name} {mib(size)}" for name, size in known.items())
        apart = f", {' and '.join(unknown)} not known" if unknown else ""
        lines.append(f"memory on {device}, counted: {mib(sum(known.values()))} ({shown}{apart})")
    return lines


def mib(size: int) -> str:
    return f"{size / MIB:,.1f} MiB" if size < 10 * MIB else f"{size / MIB:,.0f} MiB"


def peak() -> int:
    """The most that was needed so far, in bytes: of the GPU's allocations, or of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

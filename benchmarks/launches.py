# SPDX-License-Identifier: Apache-2.0
"""Kernel launches and bytes that an adapter adds to one layer's step on a GPU: counted, not timed.

    python -m benchmarks.launches [--dtype bfloat16] [--only SDXL] [--factors 64 4]

A step runs on tensors without values (the device "meta"), for which every rule of the library is that of a GPU, and
every torch op that it dispatches is noted. One op is one launch, unless it returns a view or makes an empty tensor; an
op reads each of its arguments once and writes its result once. The Triton kernels are stood in for by what notes their
arguments likewise. What a library splits into several kernels (cuBLAS with split-K), and what a cache saves, is not in
these numbers.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peft_krona import _compat
from peft_krona.ops import backend, linear

from . import cases
from .providers import frozen, krona, lora, peft_lokr

PROVIDERS: dict[str, Callable[[nn.Linear, int, int], nn.Module]] = {
    "frozen": frozen,
    "PEFT LoRA r=4": lora(4),
    "PEFT LoKr": peft_lokr,
    "KronA": krona,
    "KronA, triton": krona,
}
# The kernels' arguments that are written; all other tensors are read.
WRITTEN = {"forward_kernel": (4, 5), "backward_kernel": (5, 6, 7), "sum_kernel": (1, 2)}
_NO_LAUNCH = (
    "empty",
    "empty_like",
    "new_empty",
    "empty_strided",
    "new_empty_strided",
    "detach",
    "_unsafe_view",
    "promote_types",
)


class Count(NamedTuple):
    """Launches, and the bytes that they read and write."""

    launches: int = 0
    moved: int = 0

    def __sub__(self, other: Count) -> Count:
        return Count(self.launches - other.launches, self.moved - other.moved)


class Counter(TorchDispatchMode):
    """Notes each launch as (name, bytes)."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not (func.is_view or func.overloadpacket.__name__ in _NO_LAUNCH):
            read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            written = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
            if func.overloadpacket.__name__ in ("copy_", "zero_", "fill_"):
                read = read[1:]
            self.noted.append((str(func), sum(map(distinct_bytes, read + written))))
        return result

    def total(self) -> Count:
        return Count(len(self.noted), sum(moved for _, moved in self.noted))


def distinct_bytes(t: torch.Tensor) -> int:
    """Bytes of a tensor of any shape; an expanded dimension is in memory once."""
    values = 1
    for size, stride in zip(t.shape, t.stride(), strict=True):
        values *= size if stride else min(size, 1)
    return values * t.element_size()


class _Kernel:
    """Stands in for a Triton kernel."""

    def __init__(self, name: str, counter: Counter) -> None:
        self.name, self.counter = name, counter

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            tensors = {place: arg for place, arg in enumerate(args) if isinstance(arg, torch.Tensor) and arg.numel()}
            moved = sum(map(distinct_bytes, tensors.values()))
            if self.name == "backward_kernel" and args[13] and 6 in tensors:  # added to the frozen layer's dX
                moved += distinct_bytes(tensors[6])
            self.counter.noted.append((self.name, moved))

        return launch


@contextmanager
def _as_on_a_gpu(provider: str, counter: Counter) -> Iterator[None]:
    """The op runs as where nothing looks at its single ops, and on the provider's backend."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(_compat, "dispatch_modes", lambda: 0))
        if provider.endswith("triton"):
            from peft_krona.ops.triton import launch, library

            stack.enter_context(patch.object(library, "dispatch_modes", lambda: 0))
            stack.enter_context(patch.object(backend, "DEFAULT", "triton"))
            stack.enter_context(patch.object(linear, "choose_backend", lambda *asked: "triton"))
            for name in WRITTEN:
                stack.enter_context(patch.object(launch, name, _Kernel(name, counter)))
        yield


def count(
    provider: str, case: cases.LinearCase, factors: tuple[int, int], dtype: torch.dtype
) -> dict[str, tuple[Count, list[tuple[str, int]]]]:
    """What the forward pass and a whole training step of one layer launch and move, and each launch."""
    layer = nn.Linear(case.n_in, case.n_out, dtype=dtype, device="meta").requires_grad_(False)
    module = PROVIDERS[provider](layer, *factors).train()
    x = torch.empty(case.tokens, case.n_in, dtype=dtype, device="meta", requires_grad=True)
    leaves = [x, *(p for p in module.parameters() if p.requires_grad)]
    counted = {}
    for kind in ("forward", "training"):
        counter = Counter()
        with _as_on_a_gpu(provider, counter), counter:
            y = module(x)
            if kind == "training":
                torch.autograd.grad(y, leaves, torch.empty_like(y))
        counted[kind] = counter.total(), counter.noted
    return counted


def providers() -> list[str]:
    """Those that can be counted here: the kernels' launches need triton, but no GPU."""
    return [name for name in PROVIDERS if not name.endswith("triton") or backend._TRITON is not None]


def table(layers: Sequence[cases.LinearCase], factors: tuple[int, int], dtype: torch.dtype) -> str:
    """A Markdown table of what each provider adds to the frozen layer."""
    lines = [
        f"| layer, {str(dtype).removeprefix('torch.')} | adapter | forward adds launches | and MiB | "
        "forward + backward adds launches | and MiB |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for case in layers:
        base = count("frozen", case, factors, dtype)
        for provider in providers():
            cells = [f"{case.name}: {case.tokens} x {case.n_in} to {case.n_out}"]
            name = provider.replace("KronA", f"KronA ({factors[0]},{factors[1]})")
            if provider == "frozen":
                name = "(the frozen layer itself)"
            cells.append(name)
            mine = base if provider == "frozen" else count(provider, case, factors, dtype)
            for kind in ("forward", "training"):
                added = mine[kind][0] if provider == "frozen" else mine[kind][0] - base[kind][0]
                cells += [str(added.launches), f"{added.moved / 2**20:.1f}"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--only", help="only layers whose name contains this")
    parser.add_argument("--factors", type=int, nargs=2, default=(64, 4), metavar=("A_OUT", "A_IN"))
    args = parser.parse_args(argv)
    print(table(cases.layers("cuda", args.only), tuple(args.factors), getattr(torch, args.dtype)))


if __name__ == "__main__":
    main()

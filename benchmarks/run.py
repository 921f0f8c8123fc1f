# SPDX-License-Identifier: Apache-2.0
"""Run a benchmark suite and write its numbers as JSON.

    python -m benchmarks.run --suite layer --device cpu --out benchmarks/results/layer-cpu.json
    python -m benchmarks.run --suite unet --device cuda --dtype bfloat16 --only SDXL --batch 1 4 \\
        --gradient-checkpointing off on --out benchmarks/results/unet-cuda.json
    python -m benchmarks.report benchmarks/results/*.json

`layer`: one adapted Linear, forward and forward + backward, added to the frozen layer. `scaling`: the same as tokens,
width, r or the number of active adapters grow. `unet`: one training step of a real UNet (random weights). `inference`:
one denoising step of it, without gradients, KronA merged and not. `qkv`: what q, k and v would gain by sharing x.
`host`: what calls cost before any arithmetic. `variants`: the op in each of its variants and on each backend, beside
what the rule takes. `benchmarks/gpu.sh` runs all of them on a GPU.

All providers of a case run once in every repetition, in a new order each time; ratios are medians of the ratios within
a repetition. A provider whose output is not base + dW x is reported as wrong, without a speed. One that raises is
reported as failed, and the exit status is 1 unless it was out of memory. The file is written anew after every case,
so that a run that is stopped keeps what it has ("complete": false).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from .autotune import variants_suite
from .host import host_suite
from .layers import layer_suite, scaling_suite
from .measure import OUT_OF_MEMORY, copy_bandwidth, environment
from .providers import PROVIDERS, lycoris_kernels, measured_on
from .qkv import qkv_suite
from .unets import adapters, inference_suite, unet_suite

# Every suite yields all its rows so far, again and again.
SUITES: dict[str, Callable[[argparse.Namespace], Iterator[list[dict[str, Any]]]]] = {
    "layer": layer_suite,
    "scaling": scaling_suite,
    "unet": unet_suite,
    "inference": inference_suite,
    "qkv": qkv_suite,
    "variants": variants_suite,
    "host": host_suite,
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line, with the suite's default providers filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=tuple(SUITES), required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--only", help="only the cases whose name contains this")
    parser.add_argument("--providers", nargs="+", metavar="NAME", help="layer, unet, inference: only these and frozen")
    parser.add_argument("--steps", type=int, default=1, help="unet, inference: steps timed per swap of adapters")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="unet, inference: images per step")
    parser.add_argument("--gradient-checkpointing", choices=("off", "on"), nargs="+", default=["off"], help="unet")
    parser.add_argument(
        "--compile",
        nargs="?",
        const="inductor",
        metavar="BACKEND",
        help="unet, inference: torch.compile the transformer blocks, each shape by itself (default backend: inductor)",
    )
    args = parser.parse_args(argv)
    in_unets = args.suite in ("unet", "inference")
    if not in_unets and (args.compile or args.batch != [1]):
        parser.error(f"--compile and --batch do not apply to the suite {args.suite!r}")
    if args.suite != "unet" and args.gradient_checkpointing != ["off"]:
        parser.error(f"--gradient-checkpointing does not apply to the suite {args.suite!r}")
    known = list(adapters(args.suite) if in_unets else PROVIDERS if args.suite == "layer" else ())
    if args.providers and (unknown := [name for name in args.providers if name not in known]):
        parser.error(f"unknown to the suite {args.suite!r}: {unknown}; it has {known}")
    asked = args.providers or measured_on(args.device, known)
    args.providers = ["frozen", *(name for name in asked if name != "frozen")]
    return args


def save(result: dict[str, Any], path: Path | None) -> None:
    """Write the JSON file whole or not at all."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, run the suite, write the file after every case; the exit status."""
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    args.copy_bytes_per_second = copy_bandwidth(args.device)
    result: dict[str, Any] = {
        "suite": args.suite,
        "device": args.device,
        "dtype": args.dtype,
        "repetitions": args.repetitions,
        "steps": args.steps,
        "compile": args.compile,
        "clock": "cpu" if args.device == "cpu" and args.suite in ("host", "unet", "inference") else "wall",
        "environment": environment(args.device),
        "copy_bytes_per_second": args.copy_bytes_per_second,
        "complete": False,
        "rows": [],
    }
    save(result, args.out)
    args.dtype = getattr(torch, args.dtype)
    try:
        for rows in SUITES[args.suite](args):
            result["rows"] = rows
            if args.suite == "layer":
                result["lycoris_kernels"] = lycoris_kernels(args.device)  # it may have given one up by now
            save(result, args.out)
    except KeyboardInterrupt:
        print(f"\ninterrupted after {len(result['rows'])} rows" + (f", which {args.out} has" if args.out else ""))
        return 130
    if not result["rows"]:
        print(f"no case has {args.only!r} in its name")
        return 1
    result["complete"] = True
    save(result, args.out)
    if args.out:
        print(f"\nwrote {args.out}")
    failed = [row for row in result["rows"] if row.get("failed", OUT_OF_MEMORY) != OUT_OF_MEMORY]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

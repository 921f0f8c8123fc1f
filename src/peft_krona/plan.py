# SPDX-License-Identifier: Apache-2.0
"""python -m peft_krona plan: which factors a size budget buys on a model. Imports nothing until it runs."""

from __future__ import annotations

import argparse
from typing import Any

NAME, HELP = "plan", "factors, terms and a learning rate for a size budget"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument(
        "model",
        metavar="MODEL_OR_CLASS",
        help="folder of a pipeline or model, its config.json, a class of diffusers, or an id on the Hub",
    )
    parser.add_argument("--budget", required=True, metavar="5MB|1M", help="of the saved file, or of parameters")
    parser.add_argument("--component", help="which part of a pipeline; its denoiser if left out")
    parser.add_argument(
        "--target-modules", nargs="+", metavar="NAME", help="layers to adapt; the model's default if left out"
    )
    parser.add_argument(
        "--dtype",
        choices=("fp32", "fp16", "bf16"),
        default="fp32",
        help="of the file that --budget in bytes is for: fp32 is what training saves, fp16 what convert writes",
    )
    parser.add_argument("--a-out", type=int, default=64, help="rows of the left factor")
    parser.add_argument("--r", type=int, help="Kronecker terms; chosen if left out")


def run(options: argparse.Namespace) -> None:
    """Print the plan."""
    from .suggest import suggest_factors

    print(suggest_factors(options.model, options.budget, **_settings(options)))


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    names = options.target_modules
    return {
        "target_modules": "all-linear" if names == ["all-linear"] else names,
        "component": options.component,
        "dtype": options.dtype,
        "a_out": options.a_out,
        "r": options.r,
    }

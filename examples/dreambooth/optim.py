# SPDX-License-Identifier: Apache-2.0
"""Optimizers and their parameter groups."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import nn

from . import TrainingError
from .arguments import BETAS, EPSILON, USUAL_DECAY

# left factors: KronA's A, LoRA's A, LoKr's w1; everything else counts as B
LEFT = ("krona_A", "lora_A", "lokr_w1")

PRODIGY = ("beta3", "decouple", "use_bias_correction", "safeguard_warmup")  # its flags, all as --prodigy_...


def parameter_groups(
    parts: Mapping[str, nn.Module],
    rates: Mapping[str, float],
    decays: Mapping[str, float],
    ratio_a: float = 1.0,
    ratio_b: float = 1.0,
) -> list[dict[str, Any]]:
    """Groups by model and by side of the product, each with its learning rate and weight decay.

    `rates`, `decays`: by component. `ratio_a`, `ratio_b`: of the two sides' learning rates to the component's.
    """
    groups = []
    for name, model in parts.items():
        trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        for side, ratio in (("a", ratio_a), ("b", ratio_b)):
            params = [p for n, p in trained if any(left in n for left in LEFT) == (side == "a")]
            if params:
                settings = {"lr": rates[name] * ratio, "weight_decay": decays[name], "name": f"{name}.{side}"}
                groups.append({"params": params, **settings})
    return groups


def build_optimizer(
    groups: list[dict[str, Any]],
    name: str,
    lr: float,
    *,
    betas: tuple[float, float] = BETAS,
    eps: float = EPSILON,
    eight_bit: bool = False,
    warmup_steps: int = 0,
    prodigy: Mapping[str, Any] | None = None,
    more: Sequence[str] = (),
) -> torch.optim.Optimizer:
    """AdamW, 8-bit AdamW, Prodigy, schedule-free, or the class that `name` names.

    `warmup_steps`: for schedule-free. `prodigy`: more of Prodigy's arguments. `more`: "NAME=VALUE" of any other.

    Raises:
        TrainingError: if the class, its package or one of its arguments does not exist.
    """
    kind = name.lower()
    if kind == "prodigy":
        cls = find_class("prodigyopt.Prodigy")
        if len({g["lr"] for g in groups}) > 1:  # pragma: no cover  (the arguments exclude it)
            raise TrainingError("Prodigy needs the same learning rate for all parameters.")
        if lr <= 0.1:
            print(f"note: --learning_rate {lr:g} is small for Prodigy, which wants about 1.")
        settings = {"betas": betas, "eps": eps, **(prodigy or {})}
    elif eight_bit:
        cls, settings = find_class("bitsandbytes.optim.AdamW8bit"), {"betas": betas, "eps": eps}
    elif kind == "schedulefree":
        cls = find_class("schedulefree.AdamWScheduleFree")
        settings = {"betas": betas, "eps": eps, "warmup_steps": warmup_steps}
    elif kind == "adamw":
        cls, settings = torch.optim.AdamW, {"betas": betas, "eps": eps}
    else:
        cls, settings = find_class(name), {}
        if cls is torch.optim.SparseAdam:
            raise TrainingError(f"--optimizer {name} is for sparse gradients, which adapters do not have.")
        accepted = inspect.signature(cls.__init__).parameters
        given = {"betas": (betas, BETAS), "eps": (eps, EPSILON)}  # with what they are if nobody sets them
        settings = {
            k: value
            for k, (value, usual) in given.items()
            if k in accepted and (value != usual or is_same_kind(accepted[k].default, value))
        }
        idle = [flag for flag, (value, usual) in given.items() if value != usual and flag not in accepted]
        if "weight_decay" not in accepted and any(g.get("weight_decay", USUAL_DECAY) != USUAL_DECAY for g in groups):
            idle.append("weight_decay")
        if idle:
            flags = {
                "betas": "--adam_beta1 and --adam_beta2",
                "eps": "--adam_epsilon",
                "weight_decay": "--adam_weight_decay",
            }
            print(f"warning: {', '.join(flags[k] for k in idle)} has no effect: {name} does not take it.")
        if "weight_decay" not in accepted:
            groups = [{k: v for k, v in g.items() if k != "weight_decay"} for g in groups]
    settings |= parse_settings(more)
    try:
        return cls(groups, lr=lr, **settings)
    except (TypeError, ValueError) as error:
        raise TrainingError(f"--optimizer {name} does not take {settings}: {error}.") from error


def build_schedule(
    optimizer: torch.optim.Optimizer,
    name: str,
    total: int,
    *,
    warmup_steps: int = 0,
    cycles: int = 1,
    power: float = 1.0,
    step_rules: str | None = None,
) -> torch.optim.lr_scheduler.LRScheduler:
    """diffusers' schedule `name` over `total` updates.

    Raises:
        TrainingError: if --lr_step_rules cannot be read.
    """
    try:
        return get_scheduler(
            name, optimizer, step_rules=step_rules, num_warmup_steps=warmup_steps, num_training_steps=total,
            num_cycles=cycles, power=power,
        )  # fmt: skip
    except (ValueError, IndexError) as error:
        raise TrainingError(
            f"--lr_scheduler {name} with --lr_step_rules {step_rules!r}: {error}; expected e.g. "
            '"1:100,0.1:400,0.01" (factor:step pairs, then the last factor).'
        ) from error


def is_same_kind(default: Any, value: Any) -> bool:
    """Adafactor's eps, for one, is a pair."""
    if default is inspect.Parameter.empty:
        return True
    if isinstance(value, tuple):
        return isinstance(default, (tuple, list)) and len(default) == len(value)
    return isinstance(default, (int, float))


def find_class(name: str) -> type:
    """`Name` from torch.optim, or `package.module.Name`."""
    module, _, cls = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module or "torch.optim"), cls)
    except ImportError as error:
        raise TrainingError(
            f"{name} needs a package that is missing: pip install {module.partition('.')[0]}"
        ) from error
    except AttributeError as error:
        unfit = ("Optimizer", "SparseAdam", "LBFGS")
        known = [n for n, c in vars(torch.optim).items() if inspect.isclass(c) and n not in unfit]
        raise TrainingError(
            f"--optimizer {name!r} is unknown; expected AdamW, prodigy, schedulefree, one of torch.optim's "
            f"({', '.join(known)}), or package.module.Class."
        ) from error


def parse_settings(pairs: Sequence[str]) -> dict[str, Any]:
    """["momentum=0.9"] -> {"momentum": 0.9}."""
    found = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise TrainingError(f"--optimizer_args {pair!r}: expected NAME=VALUE.")
        try:
            found[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[key] = value
    return found


def set_train_mode(optimizer: Any, training: bool) -> None:
    """Schedule-free optimizers keep two sets of weights: one to train, one to use."""
    inner = getattr(optimizer, "optimizer", optimizer)
    if hasattr(inner, "train") and hasattr(inner, "eval"):
        inner.train() if training else inner.eval()

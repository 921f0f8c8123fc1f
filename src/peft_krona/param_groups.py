# SPDX-License-Identifier: Apache-2.0
"""`krona_param_groups`: a learning rate for each side of the Kronecker product, weight decay where it is usual."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Any

from torch import nn

from .config import KronAConfig
from .errors import ConfigError, ConfigTypeError
from .layers import KronALayer

RANDOM, ZERO = "krona.random", "krona.zero"  # names of groups: the factors that start random, and at zero


def krona_param_groups(
    model: nn.Module, lr: float, ratio: float = 1.0, *, weight_decay: float | None = None
) -> list[dict[str, Any]]:
    """Parameter groups for any optimizer of torch, with a learning rate of its own for the zero-initialised factor.

    As LoRA+ (Hayou et al. 2024, arXiv:2402.12354) does, the factor that starts at zero gets `lr * ratio`, the one that
    starts random gets `lr`. Which is which follows `init_weights`: B starts at zero, but with "cdka" A does; with False
    neither does, and B counts as the one. Everything else that is trainable gets `lr`: other adapters' weights, whole
    modules of `modules_to_save`, biases.

    Weight decay is 0 for biases, for what belongs to a norm, and for every other vector.

    Args:
        model: what `get_peft_model` returned, or a model that `add_adapter` was called on. For several models (a UNet
            and its text encoders) add the lists.
        lr: learning rate, >= 0.
        ratio: of the two sides' learning rates, > 0. LoRA+ has values above 1; docs/settings.md says what is known of
            KronA.
        weight_decay: of the groups that decay; None leaves it to the optimizer.

    Returns:
        Groups with the keys "params", "lr", "name" and, where it is not the optimizer's own, "weight_decay". Every
        trainable parameter is in exactly one. Names: "krona.random", "krona.zero", "other", "no_decay".

    Raises:
        ConfigError: if a number is out of its range, or the model has no trainable factors.
        ConfigTypeError: if `model` is no module.

    >>> import torch, peft_krona
    >>> from peft import get_peft_model
    >>> base = torch.nn.Sequential(torch.nn.Linear(128, 256))
    >>> model = get_peft_model(base, peft_krona.KronAConfig(target_modules=["0"]))
    >>> groups = krona_param_groups(model, lr=1e-3, ratio=4)
    >>> {group["name"]: group["lr"] for group in groups}
    {'krona.random': 0.001, 'krona.zero': 0.004}
    >>> optimizer = torch.optim.AdamW(groups, weight_decay=1e-2)
    """
    if not isinstance(model, nn.Module):
        raise ConfigTypeError(
            f"krona_param_groups: expected a model (torch.nn.Module), got {type(model).__name__}. Of a pipeline, pass "
            "its parts, and add the lists: krona_param_groups(pipe.unet, 1e-4) + krona_param_groups(pipe.text_encoder, "
            "5e-5)."
        )
    _check("lr", lr, lambda value: value >= 0, "a number >= 0")
    _check("ratio", ratio, lambda value: value > 0, "a number > 0")
    _check("lr * ratio", lr * ratio, lambda value: True, "a finite number")
    if weight_decay is not None:
        _check("weight_decay", weight_decay, lambda value: value >= 0, "a number >= 0, or None for the optimizer's own")
    side = _sides(model)
    undecayed = _without_decay(model)
    groups: dict[str, list[nn.Parameter]] = {RANDOM: [], ZERO: [], "other": [], "no_decay": []}
    for parameter in model.parameters():  # each once, however many modules share it
        if parameter.requires_grad:
            other = "no_decay" if id(parameter) in undecayed else "other"
            groups[side.get(id(parameter), other)].append(parameter)
    if not groups[RANDOM] and not groups[ZERO]:
        raise ConfigError(_nothing_trains(model))
    decays = {} if weight_decay is None else {"weight_decay": weight_decay}
    return [
        {
            "params": parameters,
            "lr": lr * ratio if name == ZERO else lr,
            "name": name,
            **({"weight_decay": 0.0} if name == "no_decay" else decays),
        }
        for name, parameters in groups.items()
        if parameters
    ]


_ONLY_FOR_LORA = {
    "create_loraplus_optimizer": "both of KronA's get the same learning rate, and loraplus_lr_ratio has no effect on "
    "them. Use optimizer_cls(peft_krona.krona_param_groups(model, lr, ratio)).",
    "create_lorafa_optimizer": "it trains both of KronA's as AdamW does, and freezes none. Freeze krona_A yourself "
    "(requires_grad_(False)) and use AdamW.",
}


def warn_that_it_is_for_lora(parameters: Iterable[tuple[str, nn.Parameter]], function: str) -> None:
    """For PEFT's optimizers that find the sides of a LoRA by their names, and leave other adapters as they are."""
    if any(parameter.requires_grad and ".krona_" in f".{name}" for name, parameter in parameters):
        # stacklevel: this < the wrapper of `_register` < PEFT's function < its caller
        warnings.warn(f"{function} knows LoRA's factors only: {_ONLY_FOR_LORA[function]}", RuntimeWarning, stacklevel=4)


def _check(name: str, value: Any, ok: Any, allowed: str) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not ok(value):
        raise ConfigError(f"krona_param_groups: {name}={value!r} is not allowed; expected {allowed}.")


def _layers(model: nn.Module) -> list[KronALayer]:
    return [module for module in model.modules() if isinstance(module, KronALayer)]


def _sides(model: nn.Module) -> dict[int, str]:
    """{id of a factor: the name of its group}"""
    sides: dict[int, str] = {}
    for holder in model.modules():  # PEFT leaves its configs on the model itself, or on the one inside
        configs = getattr(holder, "peft_config", None)
        for name, config in configs.items() if isinstance(configs, dict) else ():
            if isinstance(config, KronAConfig):
                a, b = (ZERO, RANDOM) if config.init_weights == "cdka" else (RANDOM, ZERO)
                for layer in _layers(holder):
                    if name in layer.krona_A:
                        sides |= {id(layer.krona_A[name]): a, id(layer.krona_B[name]): b}
    for layer in _layers(model):
        unknown = next((name for name in layer.krona_A if id(layer.krona_A[name]) not in sides), None)
        if unknown is not None:
            raise ConfigError(
                f"krona_param_groups: nothing in the model passed says how adapter {unknown!r} was initialised. Pass "
                "the whole model that the adapter was added to, not a part of it."
            )
    return sides


def _without_decay(model: nn.Module) -> set[int]:
    """Ids of biases, of norms' parameters and of vectors. A sharded parameter (ZeRO-3) keeps its shape apart."""
    return {
        id(parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if "norm" in type(module).__name__.lower()
        or name.endswith("bias")
        or len(getattr(parameter, "ds_shape", parameter.shape)) <= 1
    }


def _nothing_trains(model: nn.Module) -> str:
    start = f"krona_param_groups: {type(model).__name__} has no trainable KronA factors"
    if not _layers(model):
        return f"{start}: no layer of it is adapted. Call get_peft_model(model, KronAConfig(...)) first."
    return (
        f"{start}: its adapter is loaded for inference, or not the active one. Load it with is_trainable=True, or "
        "call set_adapter(name)."
    )

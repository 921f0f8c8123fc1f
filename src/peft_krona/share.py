# SPDX-License-Identifier: Apache-2.0
"""How much of a model its KronA adapters see: layers, and the share of its weights."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from math import prod
from typing import NamedTuple

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from .layers import KronALayer

logger = logging.getLogger(__name__)

MANY_TERMS = 4  # above it, r is likely to be a LoRA's
_said_that_r_counts_terms = False
SMALL = 0.2  # below this share of the weights, a guess at the layers to adapt is reported


class Share(NamedTuple):
    """Layers and weights that adapters sit on, and how many there are.

    Attributes:
        linear: adapted Linear layers. all_linear: the model's Linear layers. other: adapted layers of other kinds.
        weights: entries of the adapted layers' weights. all_weights: parameters of the base model.
    """

    linear: int
    all_linear: int
    other: int
    weights: int
    all_weights: int

    @property
    def of_weights(self) -> float:
        """Share of the model's weights, from 0 to 1."""
        return self.weights / self.all_weights if self.all_weights else 0.0

    def __str__(self) -> str:
        others = f" and {self.other} other layers" if self.other else ""
        return f"{self.linear} of {self.all_linear} Linear layers{others}, {self.of_weights:.1%} of the weights"


def share_of(model: nn.Module, adapter_name: str | None = None) -> Share:
    """What the KronA adapters of a model sit on.

    Args:
        model: a `PeftModel`, or any model that KronA was injected into.
        adapter_name: count this adapter's layers; None: those of the active adapters.

    >>> import peft_krona
    >>> from peft import get_peft_model
    >>> base = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 24))
    >>> model = get_peft_model(base, peft_krona.KronAConfig(target_modules=["0"], a_out=4, a_in=2))
    >>> print(share_of(model))
    1 of 2 Linear layers, 22.2% of the weights
    """
    linear = all_linear = other = weights = all_weights = 0
    seen: set[int] = set()
    for module, layer in _base_modules(model):
        is_linear = isinstance(module, (nn.Linear, Conv1D))
        all_linear += is_linear
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in seen:  # tied weights count once
                seen.add(id(parameter))
                all_weights += _numel(module, parameter)
        if layer is None:
            continue
        names = layer.active_adapters if adapter_name is None else [adapter_name]
        name = next((name for name in names if name in layer.krona_A), None)
        if name is not None:
            linear += is_linear
            other += not is_linear
            weights += layer.out_features * layer.in_features * prod(layer.krona_B[name].shape[3:])
    return Share(linear, all_linear, other, weights, all_weights)


def warn_if_small(model: nn.Module, adapter_name: str) -> None:
    """Warn where the layers of an adapter were a guess, and little of the model was hit."""
    share = share_of(model, adapter_name)
    if share.of_weights < SMALL:
        warnings.warn(
            f"KronAConfig.target_modules is None and {type(model).__name__} has no entry in "
            f"peft_krona.targets.DIFFUSERS_TARGET_MODULES, so its attention projections are adapted: {share}. Pass "
            "target_modules (or 'all-linear') to choose the layers yourself.",
            RuntimeWarning,
            stacklevel=2,
        )


def number_of_parameters(model: nn.Module, adapter_name: str) -> tuple[int, int]:
    """(numbers in the factors of one adapter, the same with one term on every layer)."""
    counts = [
        (layer.krona_A[adapter_name].numel() + layer.krona_B[adapter_name].numel(), len(layer.krona_A[adapter_name]))
        for layer in model.modules()
        if isinstance(layer, KronALayer) and adapter_name in layer.krona_A
    ]
    return sum(n for n, _ in counts), sum(n // r for n, r in counts)


def say_that_r_counts_terms(model: nn.Module, adapter_name: str, r: int) -> None:
    """One log line in a program's life: whoever has replaced a LoRA by its r has r times the parameters."""
    global _said_that_r_counts_terms
    if not _said_that_r_counts_terms:
        _said_that_r_counts_terms = True
        has, would_have = number_of_parameters(model, adapter_name)
        logger.warning(
            "KronAConfig(r=%d): r counts Kronecker terms, it is not a rank as LoRA's is. This adapter has %s "
            "parameters; with r=1 it has %s. (Said once.)",
            r,
            f"{has:,}",
            f"{would_have:,}",
        )


def line(model: nn.Module) -> str | None:
    """What `print_trainable_parameters` adds for a model with active KronA adapters; None without."""
    share = share_of(model)
    return f"KronA adapts {share}" if share.linear or share.other else None


def _base_modules(module: nn.Module, layer: KronALayer | None = None) -> Iterator[tuple[nn.Module, KronALayer | None]]:
    """Every module of the base model with the KronA layer around it, if any; the adapters' own are left out."""
    if isinstance(module, BaseTunerLayer):
        yield from _base_modules(
            module.get_submodule("base_layer"), module if isinstance(module, KronALayer) else layer
        )
    elif isinstance(module, AuxiliaryTrainingWrapper):
        yield from _base_modules(module.get_submodule("original_module"))
    else:
        yield module, layer
        for child in module.children():
            yield from _base_modules(child)


def _numel(module: nn.Module, parameter: nn.Parameter) -> int:
    if isinstance(module, nn.Linear) and parameter is module.weight:
        return module.in_features * module.out_features  # a quantized weight is packed
    return getattr(parameter, "ds_numel", parameter.numel())  # ZeRO-3 keeps the size apart

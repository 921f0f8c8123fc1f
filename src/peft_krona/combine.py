# SPDX-License-Identifier: Apache-2.0
"""Exact linear combinations of adapters: the terms of a sum of Kronecker sums are the terms of its parts."""

from __future__ import annotations

import re
from dataclasses import replace
from math import isfinite

import torch
from peft.tuners.tuners_utils import BaseTuner

from .errors import ConfigError, FactorError
from .layers import KronALayer


def combine_adapters(
    model: BaseTuner, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str
) -> None:
    """See `KronAModel.add_weighted_adapter`."""
    _check_arguments(model, adapters, weights, adapter_name, combination_type)
    layers = {name: m for name, m in model.model.named_modules() if isinstance(m, KronALayer)}
    parts = {
        name: [(a, w) for a, w in zip(adapters, weights, strict=True) if a in m.krona_A] for name, m in layers.items()
    }
    parts = {name: present for name, present in parts.items() if present}
    _check_same_layout({a: model.peft_config[a].layout for a in adapters})
    for name, present in parts.items():
        _check_same_factors(name, layers[name], [a for a, _ in present])

    config = replace(
        model.peft_config[adapters[0]],
        target_modules="|".join(re.escape(name) for name in sorted(parts)),  # a regex has to match a whole name
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        modules_to_save=None,
        r=1,
        alpha=1.0,
        scaling="alpha",
        layout=model.peft_config[adapters[0]].layout,
        bias="none",
        strict_factors=True,
        rank_pattern={_exactly(name): sum(layers[name].r[a] for a, _ in present) for name, present in parts.items()},
        alpha_pattern={},
        factor_pattern={_exactly(name): layers[name].factors(present[0][0]) for name, present in parts.items()},
    )
    model.peft_config[adapter_name] = config
    model.inject_adapter(model.model, adapter_name)
    with torch.no_grad():
        for name, present in parts.items():
            layer = layers[name]
            source = layer.krona_A[present[0][0]]
            dtype = torch.promote_types(source.dtype, torch.float32)
            A = torch.cat([layer.krona_A[a].to(dtype) * (w * layer.scaling[a]) for a, w in present])
            B = torch.cat([layer.krona_B[a].to(dtype) for a, _ in present])
            layer.krona_A[adapter_name].data = A.to(source.device, source.dtype)
            layer.krona_B[adapter_name].data = B.to(source.device, source.dtype)
            layer.set_requires_grad(adapter_name, False)


def _exactly(name: str) -> str:
    """A pattern key that matches this module and no other."""
    return f"^{re.escape(name)}"


def _check_arguments(
    model: BaseTuner, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str
) -> None:
    if combination_type != "linear":
        raise ConfigError(
            f"combination_type={combination_type!r} is not offered; use 'linear', which is exact for KronA."
        )
    if not adapters or len(adapters) != len(weights):
        raise ConfigError(f"Expected one weight an adapter, got {len(adapters)} adapters and {len(weights)} weights.")
    missing = [name for name in adapters if name not in model.peft_config]
    if missing:
        raise ConfigError(f"Adapter(s) {missing} do not exist; there are {sorted(model.peft_config)}.")
    if adapter_name in model.peft_config:
        raise ConfigError(f"Adapter {adapter_name!r} exists already. Delete it first or choose another name.")
    if not all(isfinite(w) for w in weights):
        raise ConfigError(f"Weights must be finite, got {weights}.")
    if len(set(adapters)) != len(adapters):
        raise ConfigError(f"Each adapter may be named once, got {adapters}.")
    for name in adapters:
        for field, unused in (("modules_to_save", (None, [])), ("bias", ("none",))):
            value = getattr(model.peft_config[name], field)
            if value not in unused:
                raise ConfigError(
                    f"Cannot combine adapter {name!r}: it was trained with {field}={value!r}, which is no part of the "
                    "factors and would be left out. Merge instead, or combine adapters without it."
                )


def _check_same_layout(layouts: dict[str, str]) -> None:
    if len(set(layouts.values())) > 1:
        raise FactorError(
            f"Cannot combine adapters of different layouts, {layouts}: one adapter has one layout. "
            "Use set_adapter with several adapters instead, or merge."
        )


def _check_same_factors(name: str, layer: KronALayer, adapters: list[str]) -> None:
    factors = {a: layer.factors(a) for a in adapters}
    if len(set(factors.values())) > 1:
        raise FactorError(
            f"Cannot combine adapters on '{name}': their (a_out, a_in) differ, {factors}. A sum of Kronecker products "
            "of different shapes is no Kronecker sum; use set_adapter with several adapters instead, or merge."
        )

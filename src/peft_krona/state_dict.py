# SPDX-License-Identifier: Apache-2.0
"""Which tensors of a model are an adapter's, and which adapter's a state dict is."""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from .config import KronAConfig
from .errors import FormatError
from .layers import KronALayer

_NESTED = re.compile(r"(\.base_layer)+(?=\.krona_[AB]$)")
_SETTINGS: MutableMapping[torch.Tensor, KronAConfig] = WeakIdKeyDictionary()


def factor_keys(model: nn.Module, adapter_name: str) -> dict[str, torch.Size]:
    """{key of the model's state dict: shape} of an adapter's factors."""
    return {
        f"{name}.{factor}.{adapter_name}": getattr(layer, factor)[adapter_name].shape
        for name, layer in model.named_modules()
        if isinstance(layer, KronALayer) and adapter_name in layer.krona_A
        for factor in ("krona_A", "krona_B")
    }


def without_nesting(key: str) -> str:
    """A factor's key as it is when no other tuner's layer is around the adapted one.

    Adapters of another tuner over the same layer put ".base_layer" into the keys, which a file must not have: the other
    adapter is not in it.

    >>> without_nesting("attn1.to_q.base_layer.krona_A")
    'attn1.to_q.krona_A'
    """
    return _NESTED.sub("", key)


def unfiltered(
    model: nn.Module, adapter_name: str, state_dict: dict[str, torch.Tensor], others: list[str]
) -> dict[str, torch.Tensor]:
    """`state_dict` with what PEFT took out of it by mistake.

    PEFT leaves out every key that has the name of another adapter as one of its dotted parts (peft#3584). Where that is
    also a layer's name ("attn1", "mlp"), it drops weights of this adapter; they are taken from the model again.

    Raises:
        FormatError: names the other adapter, where its name also stands in a module that is trained and saved whole, or
            where the model is sharded, so that its own tensors are no whole ones.
    """
    keys = factor_keys(model, adapter_name)
    whole = [f"{name}." for name, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    clashing = [other for other in others if any(f".{other}." in f".{key}" for key in (*keys, *whole))]
    if not clashing:
        return state_dict
    own = model.state_dict()
    unsafe = next((other for other in clashing if any(f".{other}." in f".{name}" for name in whole)), None)
    if unsafe is None and any(own.get(key, torch.empty(0)).shape != shape for key, shape in keys.items()):
        unsafe = clashing[0]
    if unsafe is not None:
        raise FormatError(
            f"The adapter {adapter_name!r} cannot be saved beside an adapter named {unsafe!r}, which is also a "
            "layer's name: PEFT would leave out weights. Remove that adapter, or load it under another name."
        )
    layers = {name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    own = {key: tensor for key, tensor in own.items() if key in keys or not _is_an_adapters(key, layers)}
    return {**own, **state_dict}  # what the caller gave comes first


def _is_an_adapters(key: str, layers: set[str]) -> bool:
    """Whether a key is below one of the adapted `layers` and not below its base layer."""
    name, _, rest = key.rpartition(".")
    while name:
        if name in layers:
            return not rest.startswith("base_layer.")
        name, _, last = name.rpartition(".")
        rest = f"{last}.{rest}"
    return False


def remember_settings(state_dict: Mapping[str, torch.Tensor], config: KronAConfig) -> None:
    """Note whose tensors these are: diffusers' scripts pass state dicts on, and the config gets lost on the way."""
    for tensor in state_dict.values():
        _SETTINGS[tensor] = config


def settings_of(state_dict: Mapping[str, Any]) -> KronAConfig | None:
    """The config of the adapter whose tensors these are; None where they were copied since."""
    return next((_SETTINGS[t] for t in state_dict.values() if isinstance(t, torch.Tensor) and t in _SETTINGS), None)

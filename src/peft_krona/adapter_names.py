# SPDX-License-Identifier: Apache-2.0
"""Which names an adapter may have, checked wherever one is added.

PEFT finds an adapter's tensors by names: an entry belongs to another adapter if that one's name is a dotted part of its
key. An adapter that is called like a part of the model (`attn1`, `mlp`, `0`) therefore takes away the others' tensors
when they are saved, without a word (huggingface/peft#3584), and their `requires_grad` when it is added.
"""

from __future__ import annotations

from collections.abc import Iterator

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .errors import ConfigError
from .layers import KronALayer

# Parts that PEFT and this package put into the keys of an adapted model
_OWN_PARTS = {"base_model", "model", "base_layer", "modules_to_save", "original_module", "weight", "bias"}
_OWN_PARTS |= {*KronALayer.adapter_layer_names, "krona_dropout"}


def check_adapter_name(model: nn.Module, adapter_name: str) -> None:
    """Refuse a name under which adapters of this model could not be kept apart.

    Raises:
        ConfigError: if the name is empty, has a dot, is an attribute of torch.nn.ModuleDict, or is a part of the names
            of the model's layers.
    """
    if (
        not (isinstance(adapter_name, str) and adapter_name)
        or "." in adapter_name
        or hasattr(nn.ModuleDict(), adapter_name)
    ):
        raise ConfigError(
            f"adapter_name={adapter_name!r} is not allowed; expected a name that is not empty, has no dots and is no "
            "attribute of torch.nn.ModuleDict. Choose another."
        )
    example = next((key for key in _keys(model) if adapter_name in key.split(".")), None)
    if example is None and adapter_name in _OWN_PARTS:
        example = adapter_name
    if example is not None:
        raise ConfigError(
            f"adapter_name={adapter_name!r} is not allowed: it is a part of the model's own names ('{example}'). PEFT "
            "would take other adapters' tensors there for this one's, and leave them out when they are saved. Choose "
            "another."
        )


def _keys(module: nn.Module, prefix: str = "") -> Iterator[str]:
    """Names of the parameters, buffers and modules, as they are without any adapter."""
    yield from (prefix + name for name in (*module._parameters, *module._buffers))
    for name, child in module.named_children():
        inner = child
        while isinstance(inner, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            inner = inner.get_submodule("base_layer" if isinstance(inner, BaseTunerLayer) else "original_module")
        yield prefix + name
        yield from _keys(inner, f"{prefix}{name}.")

# SPDX-License-Identifier: Apache-2.0
"""Taking a half-added adapter out of a model again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ._compat import ADAPTERS_LOADED


@contextmanager
def undone_on_error(*models: nn.Module) -> Iterator[None]:
    """If the block raises, take out what it added to the models: modules, adapters, flags are as they were before."""
    before = [_ModelState(model) for model in models]
    try:
        yield
    except BaseException:
        for state in before:
            state.restore()
        raise


def forget_adapter(model: nn.Module, configs: dict[str, Any], adapter_name: str) -> None:
    """After a failed add: take the config of an adapter that no layer has out of `configs`, which callers fill first.

    diffusers and transformers also note first that the model has adapters, and then expect a `peft_config`.
    """
    if not any(
        isinstance(m, BaseTunerLayer) and adapter_name in m._all_available_adapter_names() for m in model.modules()
    ):
        configs.pop(adapter_name, None)
    if getattr(model, ADAPTERS_LOADED, False) and not hasattr(model, "peft_config"):
        setattr(model, ADAPTERS_LOADED, False)


class _ModelState:
    """What adding an adapter changes in a model: its modules, adapters, flags."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.children = [(m, dict(m._modules)) for m in model.modules()]
        self.layers = [
            (m, m._all_available_adapter_names(), list(m.active_adapters))
            for m in model.modules()
            if isinstance(m, BaseTunerLayer)
        ]
        self.requires_grad = [(p, p.requires_grad) for p in model.parameters()]
        self.peft_config = getattr(model, "peft_config", None)
        self.configs = dict(self.peft_config or {})
        self.loaded = getattr(model, ADAPTERS_LOADED, None)

    def restore(self) -> None:
        for layer, names, active in self.layers:
            for name in set(layer._all_available_adapter_names()) - set(names):
                for attribute in layer.adapter_layer_names + layer.other_param_names:
                    if name in getattr(layer, attribute):
                        del getattr(layer, attribute)[name]
            layer.set_adapter(active)
        for module, children in self.children:
            if not isinstance(module, (nn.ParameterDict, nn.ModuleDict)):
                module._modules.update(children)
        if self.peft_config is None:
            self.model.__dict__.pop("peft_config", None)
        else:  # the same dict: tuner, PeftModel and model share it
            self.peft_config.clear()
            self.peft_config.update(self.configs)
            self.model.peft_config = self.peft_config
        if self.loaded is not None:
            setattr(self.model, ADAPTERS_LOADED, self.loaded)
        for parameter, flag in self.requires_grad:
            parameter.requires_grad_(flag)

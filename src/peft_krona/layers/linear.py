# SPDX-License-Identifier: Apache-2.0
"""Adapted dense layers: one autograd node over a plain frozen nn.Linear, two steps over everything else."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .._compat import has_hooks, is_offloaded
from ..config import KronAConfig
from ..ops import Frozen, kron_linear
from ..ops.linear import kron_over_frozen
from ..ops.operands import Update
from .base import KronALayer

_LINEAR = nn.Linear.forward
_PLAIN = (nn.Parameter, torch.Tensor)


class Linear(KronALayer):
    """An adapted dense layer: nn.Linear and its quantized relatives, and transformers' Conv1D."""

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: KronAConfig, fan_in_fan_out: bool = False, **kwargs: Any
    ) -> None:
        self._transposed = fan_in_fan_out
        super().__init__(base_layer, adapter_name, config, **kwargs)
        self.fan_in_fan_out = fan_in_fan_out

    def _in_base_shape(self, delta: torch.Tensor) -> torch.Tensor:
        return delta.T.contiguous() if self.fan_in_fan_out else delta

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Base layer plus active adapters, see `KronALayer.forward`; most calls are one adapter on a plain x.

        Those go straight to the op. What is asked in every call is read from the modules' dicts, and from as few of
        them as possible: of a layer with few tokens, most of the time goes to fetching Python objects from memory.
        """
        if args or kwargs or self._disable_adapters or self.merged_adapters:
            return super().forward(x, *args, **kwargs)
        active: str | list[str] = self._active_adapter
        modules: dict[str, Any] = self._modules
        name = active if isinstance(active, str) else active[0] if len(active) == 1 else ""
        factors_A = modules["krona_A"]
        A, B = factors_A._parameters.get(name), modules["krona_B"]._parameters.get(name)
        if A is None or B is None or is_offloaded(factors_A) or (frozen := self._plain_frozen_base(name)) is None:
            return super().forward(x)
        scale = self._scale(name) if self.training and self.module_dropout[name] else self.scaling[name]
        return kron_over_frozen(x, Update(A, B, scale), frozen, self.layout[name])

    def _adapted(self, x: torch.Tensor, names: list[str], *args: Any, **kwargs: Any) -> torch.Tensor:
        first = names[0]
        frozen = None if args or kwargs else self._plain_frozen_base(first)
        if frozen is None:
            result = self._add_delta(self._base_forward(x, *args, **kwargs), x, first)
        else:
            modules: dict[str, Any] = self._modules  # not by attribute: see _plain_frozen_base
            A, B = modules["krona_A"][first], modules["krona_B"][first]
            result = kron_linear(x, A, B, scale=self._scale(first), base=frozen, layout=self.layout[first])
        for name in names[1:]:
            result = self._add_delta(result, x, name)
        return result

    def _base_forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        result = self.base_layer(x, *args, **kwargs)
        return (
            result if self.quantization_backend is None else self.quantization_backend.maybe_clone_base_result(result)
        )

    def _add_delta(self, result: torch.Tensor, x: torch.Tensor, name: str) -> torch.Tensor:
        x = self.krona_dropout[name](x)
        A, B = self.krona_A[name], self.krona_B[name]
        return kron_linear(x, A, B, scale=self._scale(name), base=result, layout=self.layout[name])

    def _plain_frozen_base(self, name: str) -> Frozen | None:
        """The base layer where base and adapter can be one autograd node, else None.

        They can for a plain frozen nn.Linear, where nothing hooks into it or does anything to the adapter's input. Any
        of that can be replaced by hand at any time, so it is asked in every forward, from the modules' dicts: a
        parameter or module through nn.Module.__getattr__ takes several times as long.
        """
        modules: dict[str, Any] = self._modules
        base, dropout = modules["base_layer"], modules["krona_dropout"]._modules[name]
        if base.__class__.forward is not _LINEAR or has_hooks(base, dropout):
            return None
        if dropout.__class__ is not nn.Identity and (dropout.__class__ is not nn.Dropout or dropout.training):
            return None
        state = base.__dict__
        parameters = state["_parameters"]
        try:  # a plain tensor may stand for either of them; one that is found nowhere is parametrized
            weight = parameters["weight"] if "weight" in parameters else state["weight"]
            bias = parameters["bias"] if "bias" in parameters else state["bias"]
        except KeyError:
            return None
        if weight.__class__ not in _PLAIN or weight.requires_grad or not weight.is_floating_point():
            return None
        return None if bias is not None and bias.requires_grad else Frozen(weight, bias)

# SPDX-License-Identifier: Apache-2.0
"""PEFT folders: KronA both ways, LoKr and LoRA in.

A folder of one model has `adapter_config.json` and `adapter_model.safetensors`; a pipeline's has one such folder per
component (`unet`, `text_encoder`, ...).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from peft.utils.other import get_pattern_key

from ..config import PEFT_PREFIX, KronAConfig, scaling_factor
from ..errors import ConfigError, FormatError
from ..factors import choose_factors
from .adapter import Adapter, KronaLayer
from .lokr import as_krona_factors
from .lora import as_krona_terms
from .names import guess_component, kernel_of, to_file_name
from .pairs import group_by_layer

_LOKR_ENDINGS = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
_FACTOR = re.compile(r"\.(krona|lokr|lora)_")
_LOKR_SETTINGS = (("alpha", "alpha_pattern"), ("r", "rank_pattern"))


def from_peft(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], component: str | None = None) -> Adapter:
    """Read a PEFT adapter of type KRONA, LOKR or LORA: exact.

    Args:
        config: the content of `adapter_config.json`.
        tensors: of `adapter_model.safetensors`: `base_model.model.<module>.krona_A` and so on.
        component: the pipeline's part; without it, guessed from the layers' names.

    Raises:
        FormatError: for another peft_type, or names the layer: halves missing, factors that are not the config's, DoRA.
        ConfigError: if a KRONA config has values that are not allowed.
    """
    kind = config.get("peft_type")
    readers = {"KRONA": _krona_layers, "LOKR": _lokr_layers, "LORA": _lora_layers}
    if not isinstance(kind, str) or kind not in readers:
        raise FormatError(f"adapter_config.json: peft_type={kind!r} cannot be read; expected one of {tuple(readers)}.")
    tensors = {key.removeprefix(PEFT_PREFIX): tensor for key, tensor in tensors.items()}
    extra = next((key for key in tensors if not _FACTOR.search(key)), None)
    if extra is not None:
        raise FormatError(
            f"'{extra}' is a whole weight that was trained beside the adapter (bias or modules_to_save). Only PEFT "
            "itself loads such adapters: PeftModel.from_pretrained(model, folder)."
        )
    component = component or guess_component(tensors)
    layers = readers[kind](config, tensors, component)
    return Adapter(tuple(layers), source=f"peft-{kind.lower()}", metadata=_base_model(config))


def _base_model(config: Mapping[str, Any]) -> dict[str, str]:
    name = config.get("base_model_name_or_path")
    return {"base_model": name} if isinstance(name, str) and name else {}


def _krona_layers(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], component: str) -> list[KronaLayer]:
    known = {field.name for field in fields(KronAConfig)}
    try:
        settings = KronAConfig(**{key: value for key, value in config.items() if key in known})
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:  # PEFT's own checks
        raise FormatError(f"adapter_config.json: {error}") from error
    layers = []
    for module, parts in group_by_layer(tensors, ("krona_A", "krona_B")).items():
        A, B = parts["krona_A"], parts["krona_B"]
        own = settings.for_layer(module)
        layer = KronaLayer(component, to_file_name(component, module), A, B, 1.0, settings.layout)
        wanted = (own.r, *choose_factors(*layer.shape[:2], *own.factors))
        if tuple(A.shape) != wanted:
            raise FormatError(
                f"{layer.name}: krona_A has shape {tuple(A.shape)}, but the config gives this layer (r, a_out, a_in) = "
                f"{wanted}. Config and weights are not of the same adapter."
            )
        scale = scaling_factor(settings.scaling, own.alpha, own.r, A.shape[2])
        layers.append(KronaLayer(component, layer.module, A, B, scale, settings.layout))
    return layers


def _lokr_layers(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], component: str) -> list[KronaLayer]:
    layers = []
    for module, parts in group_by_layer(tensors, (), _LOKR_ENDINGS).items():
        w1, w2 = as_krona_factors(module, parts)
        # PEFT applies alpha / r always, also with two full factors (LyCORIS does not).
        alpha, r = (_setting(config, name, pattern, module) for name, pattern in _LOKR_SETTINGS)
        layer = KronaLayer(component, to_file_name(component, module), w1[None], w2[None], alpha / r)
        layers.append(layer if layer.kernel else layer.with_kernel(kernel_of(component, module, None)))
    return layers


def _lora_layers(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], component: str) -> list[KronaLayer]:
    if config.get("use_dora"):
        raise FormatError(
            "adapter_config.json: use_dora is set; DoRA rescales the base weights and is no fixed update."
        )
    layers = []
    for module, parts in group_by_layer(tensors, ("lora_A.weight", "lora_B.weight")).items():
        A, B = as_krona_terms(module, parts["lora_A.weight"], parts["lora_B.weight"])
        alpha = _setting(config, "lora_alpha", "alpha_pattern", module)
        scale = alpha / (A.shape[0] ** 0.5 if config.get("use_rslora") else A.shape[0])
        layers.append(KronaLayer(component, to_file_name(component, module), A, B, scale))
    return layers


def _setting(config: Mapping[str, Any], name: str, pattern_name: str, module: str) -> float:
    """A layer's alpha or rank: the pattern's where a key of it matches, as PEFT matches it, else the config's."""
    pattern = config.get(pattern_name) or {}
    if not isinstance(pattern, dict):
        raise FormatError(f"adapter_config.json: {pattern_name} is {pattern!r}; expected a table of layers.")
    try:
        value = pattern.get(get_pattern_key(list(pattern), module), config.get(name))
    except re.error as error:
        raise FormatError(f"adapter_config.json: {pattern_name} has a key that is no valid regex: {error}.") from error
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise FormatError(f"{module}: the config's {name} is {value!r}; expected a positive number.")
    return value


def to_peft(
    adapter: Adapter, models: Mapping[str, Any] | None = None, dtype: torch.dtype | None = None
) -> dict[str, tuple[KronAConfig, dict[str, torch.Tensor]]]:
    """{component: (config, state dict)} as `Adapter.peft_components`, weights in `dtype` (None: as they are)."""
    components = adapter.peft_components(models)
    for component, (config, state_dict) in components.items():
        config.base_model_name_or_path = adapter.metadata.get("base_model")
        components[component] = config, {key: t if dtype is None else t.to(dtype) for key, t in state_dict.items()}
    return components

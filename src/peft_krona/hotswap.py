# SPDX-License-Identifier: Apache-2.0
"""Other weights in an adapter's place: same layers and factor sizes, any s, any number of terms up to a prepared one.

Tensors are copied into those that are there, so that a compiled model is not compiled again and memory does not grow.
A term whose factors are zero adds exactly nothing; that is how an adapter of fewer terms, or of fewer layers, fits.

PEFT's `hotswap_adapter` and `prepare_model_for_compiled_hotswap`, diffusers' `load_lora_adapter(..., hotswap=True)` and
`enable_lora_hotswap`, and `load_krona_weights(..., hotswap=True)` end here.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import nn

from .config import PEFT_PREFIX, KronAConfig, scaling_factor
from .errors import ConfigError, FormatError, MergeError
from .layers import KronALayer
from .state_dict import without_nesting

logger = logging.getLogger(__name__)

_WRAPPERS = re.compile(r"(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
MANY_TERMS = 16  # more than anyone has trained; LoRA's default of `enable_lora_hotswap` is 128


def prepare(model: nn.Module, max_r: int) -> bool:
    """Pad every KronA adapter of a model to `max_r` terms, and let its s change without compiling again.

    Call it after the first adapter is loaded, and before torch.compile. Outputs stay the same but for the order of
    summation; forward takes the time of `max_r` terms.

    Returns:
        Whether there was an adapter.

    Raises:
        ConfigError: if an adapter has more terms than `max_r`, or that is no number of terms. Nothing is changed.
        MergeError: if an adapter is merged.
    """
    layers = _layers(model)
    if layers and (isinstance(max_r, bool) or not isinstance(max_r, int) or max_r < 1):
        raise ConfigError(f"target_rank={max_r!r} is not allowed; expected an integer >= 1, the terms to pad to.")
    for name, layer in layers.items():
        _refuse_merged(layer, "prepare the model for hotswapping")
        for adapter, r in layer.r.items():
            if r > max_r:
                raise ConfigError(f"Cannot pad adapter {adapter!r} to {max_r} terms: it has {r} on {name}.")
    if layers and max_r > MANY_TERMS:
        logger.warning(
            "KronA adapters are padded to %d Kronecker terms, which takes %d times the memory and time of one. A "
            "LoRA rank is not a number of terms: pass target_rank=1 or the largest r of your adapters.",
            max_r,
            max_r,
        )
    for layer in layers.values():
        for adapter in list(layer.r):
            for factors in (layer.krona_A, layer.krona_B):
                factors[adapter] = _padded(factors[adapter], max_r)
            layer.r[adapter] = max_r
    make_scalings_tensors(model)
    configs = getattr(model, "peft_config", {})
    for adapter, config in list(configs.items()):
        if isinstance(config, KronAConfig):
            _set_config(configs, adapter, config, {name: m for name, m in layers.items() if adapter in m.krona_A})
    return bool(layers)


def make_scalings_tensors(model: nn.Module) -> bool:
    """Keep every s as a tensor, whose value a compiled graph does not depend on. Returns whether there was any."""
    layers = _layers(model)
    for layer in layers.values():
        for adapter, scale in layer.scaling.items():
            if not isinstance(scale, torch.Tensor):
                device = layer.krona_A[adapter].device
                dtype = torch.float32 if device.type == "mps" else torch.float64
                layer.scaling[adapter] = torch.tensor(float(scale), device=device, dtype=dtype)
    return bool(layers)


def swap(model: nn.Module, config: KronAConfig, state_dict: Mapping[str, torch.Tensor], adapter_name: str) -> None:
    """Put other weights in the place of those of the adapter `adapter_name`; see `plan_swap`."""
    plan_swap(model, config, state_dict, adapter_name)()


def plan_swap(
    model: nn.Module,
    config: KronAConfig,
    state_dict: Mapping[str, torch.Tensor],
    adapter_name: str,
    where: str = "the new adapter",
) -> Callable[[], None]:
    """Check that an adapter fits in another's place; the function that is returned then puts it there.

    Weights that `set_scale` gave are forgotten, as after loading. Dropout stays what it was.

    Args:
        model: a model with the adapter. config: the new adapter's settings.
        state_dict: its factors; keys with or without PEFT's prefix and adapter names.
            krona_A: (r, a_out, a_in). krona_B: (r, b_out, b_in, *kernel).
        where: what it is read from, for messages.

    Raises:
        ConfigError: if there is no such adapter, or layout, bias or modules_to_save stand against it.
        MergeError: if the adapter is merged.
        FormatError: names the layer that is missing or left over, or whose shape or number of terms does not fit.
    """
    configs = getattr(model, "peft_config", {})
    old = configs.get(adapter_name)
    if not isinstance(old, KronAConfig):
        known = sorted(name for name, c in configs.items() if isinstance(c, KronAConfig))
        raise ConfigError(f"There is no KronA adapter {adapter_name!r} to hotswap; this model has {known or 'none'}.")
    if config.layout != old.layout:
        raise ConfigError(
            f"Cannot hotswap {where} into adapter {adapter_name!r}: its layout is {config.layout!r}, and that of the "
            f"one that is there is {old.layout!r}. Load it under another name."
        )
    for one in (old, config):
        if one.bias != "none" or one.modules_to_save:
            raise ConfigError(
                f"Cannot hotswap {where} into adapter {adapter_name!r}: bias={one.bias!r} and modules_to_save="
                f"{one.modules_to_save!r} mean whole weights, which are not swapped. Load it under another name."
            )
    layers = {name: layer for name, layer in _layers(model).items() if adapter_name in layer.krona_A}
    for layer in layers.values():
        _refuse_merged(layer, f"hotswap adapter {adapter_name!r}", adapter_name)
    new = {without_nesting(_plain(key).removesuffix(f".{adapter_name}")): t for key, t in state_dict.items()}
    problems = list(_problems(config, layers, new, adapter_name))
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise FormatError(
            f"{where} cannot take the place of adapter {adapter_name!r}: {'; '.join(problems[:3])}{more}. The adapter "
            "that is there is unchanged. Load the other one under another name."
        )

    def apply() -> None:
        for name, layer in layers.items():
            r = 0
            for factor in layer.adapter_layer_names:
                tensor, values = getattr(layer, factor)[adapter_name], new.get(f"{name}.{factor}")
                r = 0 if values is None else len(values)
                _copy_terms(tensor, values)
            _, alpha, _ = config.for_layer(name)
            s = scaling_factor(config.scaling, alpha, r, layer.factors(adapter_name)[1]) if r else 0.0
            layer.alpha[adapter_name] = alpha
            layer.base_scaling[adapter_name] = s
            layer.set_scale(adapter_name, 1.0)
        _set_config(configs, adapter_name, old, layers)

    return apply


def _problems(
    config: KronAConfig, layers: Mapping[str, KronALayer], new: Mapping[str, torch.Tensor], adapter_name: str
) -> Iterator[str]:
    for key in new:
        name, _, factor = key.rpartition(".")
        if name not in layers or factor not in KronALayer.adapter_layer_names:
            yield f"no layer for {key}"
    for name, layer in layers.items():
        A, B = (new.get(f"{name}.{factor}") for factor in ("krona_A", "krona_B"))
        if (A is None) != (B is None):
            yield f"{name} has only one of krona_A and krona_B"
        elif A is not None and B is not None:
            old_A, old_B = layer.krona_A[adapter_name], layer.krona_B[adapter_name]
            if A.shape[1:] != old_A.shape[1:] or B.shape[1:] != old_B.shape[1:] or len(A) != len(B):
                yield (
                    f"{name} has krona_A {tuple(A.shape)} and krona_B {tuple(B.shape)} for {tuple(old_A.shape)} and "
                    f"{tuple(old_B.shape)}"
                )
            elif len(A) != config.for_layer(name).r:
                yield f"{name} has {len(A)} terms, and its settings say {config.for_layer(name).r}"
            elif len(A) > len(old_A):
                yield (
                    f"{name} has {len(A)} terms and there is room for {len(old_A)} (make room with "
                    f"enable_lora_hotswap(target_rank={len(A)}) before the first one is loaded, or PEFT's "
                    "prepare_model_for_compiled_hotswap before the model is compiled)"
                )


@torch.no_grad()
def _copy_terms(tensor: torch.Tensor, values: torch.Tensor | None) -> None:
    r = 0 if values is None else len(values)
    tensor.data[r:].zero_()
    if values is not None:
        tensor.data[:r].copy_(values)


def _padded(factor: nn.Parameter, r: int) -> nn.Parameter:
    padded = factor.data.new_zeros(r, *factor.shape[1:])
    padded[: len(factor)] = factor.data
    return nn.Parameter(padded, requires_grad=factor.requires_grad)


def _set_config(
    configs: dict[str, KronAConfig], adapter: str, config: KronAConfig, layers: Mapping[str, KronALayer]
) -> None:
    """Let the config say what the layers have: their s as alpha, and as many terms as there is room for."""
    alphas = {name: float(layer.base_scaling[adapter]) for name, layer in layers.items()}
    rs = {name: len(layer.krona_A[adapter]) for name, layer in layers.items()}
    alpha = max(set(alphas.values()), key=list(alphas.values()).count, default=1.0)
    r = max(set(rs.values()), key=list(rs.values()).count, default=1)
    configs[adapter] = replace(
        copy.copy(config),
        r=r,
        alpha=alpha,
        scaling="alpha",
        rank_pattern={f"^{re.escape(name)}": n for name, n in rs.items() if n != r},
        alpha_pattern={f"^{re.escape(name)}": s for name, s in alphas.items() if s != alpha},
    )


def _layers(model: nn.Module) -> dict[str, KronALayer]:
    """The adapted layers by their names in the plain model; none in another tuner's layer's place."""
    named = ((name, m) for name, m in model.named_modules() if isinstance(m, KronALayer))
    return {without_nesting(f"{_plain(name)}.krona_A").removesuffix(".krona_A"): layer for name, layer in named}


def _plain(key: str) -> str:
    return _WRAPPERS.sub("", key).removeprefix(PEFT_PREFIX)


def _refuse_merged(layer: KronALayer, what: str, adapter_name: str | None = None) -> None:
    if layer.merged_adapters if adapter_name is None else adapter_name in layer.merged_adapters:
        raise MergeError(
            f"Cannot {what} while {layer.merged_adapters} are merged. Unmerge first: unmerge_adapter(), or "
            "unfuse_lora() in diffusers."
        )

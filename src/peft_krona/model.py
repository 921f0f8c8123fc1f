# SPDX-License-Identifier: Apache-2.0
"""`KronAModel`: which layer becomes which adapted layer, and what is done to all of them at once."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, onload_layer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import AuxiliaryTrainingWrapper
from peft.utils.quantization_utils import get_quantization_kwargs, resolve_quantization_backend
from torch import nn
from transformers.pytorch_utils import Conv1D

from ._compat import has_fused_projections, is_left_out_by_fusing
from .adapter_names import check_adapter_name
from .combine import combine_adapters
from .config import KronAConfig
from .errors import FormatError, UnsupportedLayerError
from .layers import Conv1d, Conv2d, Conv3d, Embedding, KronALayer, Linear
from .rollback import forget_adapter, undone_on_error
from .share import MANY_TERMS, say_that_r_counts_terms, warn_if_small
from .state_dict import remember_settings, unfiltered, without_nesting
from .targets import CLIP_TARGET_MODULES, default_target_modules, entry_of, is_diffusers_model

logger = logging.getLogger(__name__)

_MAMBA_MODELS = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}
_MAMBA_UNTARGETABLE = {"out_proj", "conv1d"}

_TARGET_MODULES: dict[str, list[str]] = {
    **{kind: list(names) for kind, names in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.items()},
    "clip_text_model": list(CLIP_TARGET_MODULES),
}


class KronAModel(BaseTuner):
    """A model with KronA adapters on its target layers; what `get_peft_model(model, KronAConfig(...))` builds.

    Args:
        model: the model to adapt. peft_config: `KronAConfig`. adapter_name: name of the first adapter.
        low_cpu_mem_usage: create the adapter weights on the meta device (for loading).
    """

    peft_config: dict[str, KronAConfig]  # type: ignore[assignment]  # PEFT lets a model hold configs of one kind only
    prefix: str = "krona_"
    tuner_layer_cls = KronALayer
    target_module_mapping = _TARGET_MODULES
    layers_mapping: ClassVar[dict[type[nn.Module], type[KronALayer]]] = {
        nn.Linear: Linear,
        Conv1D: Linear,
        nn.Conv1d: Conv1d,
        nn.Conv2d: Conv2d,
        nn.Conv3d: Conv3d,
        nn.Embedding: Embedding,
    }

    def _prepare_adapter_config(self, peft_config: KronAConfig, model_config: dict) -> PeftConfig:
        if peft_config.target_modules is None and is_diffusers_model(self.model):
            peft_config.target_modules = default_target_modules(
                self.model, peft_config.layers_to_transform, peft_config.layers_pattern
            )
        return super()._prepare_adapter_config(peft_config, model_config)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT's, but a target that cannot be adapted leaves nothing of the adapter behind in the others.

        Raises:
            ConfigError: if the name is not allowed, see `check_adapter_name`.
        """
        config = self.peft_config[adapter_name]
        guessed = config.target_modules is None and is_diffusers_model(model) and entry_of(model) is None
        try:
            with undone_on_error(model):
                check_adapter_name(model, adapter_name)
                super().inject_adapter(model, adapter_name, *args, **kwargs)
        except BaseException:
            forget_adapter(model, self.peft_config, adapter_name)
            raise
        if adapter_name == "ref" and config is self.peft_config.get("default"):
            _copy_factors(model, "default", "ref")
        if guessed:
            warn_if_small(model, adapter_name)
        _warn_of_unmatched_factors(model, adapter_name, config)
        # who loads an adapter did not choose its r, and CDKA is made of terms
        r = max(config.r, *config.rank_pattern.values(), 0)
        if r > MANY_TERMS and not config.inference_mode and "cdka" not in (config.scaling, config.init_weights):
            say_that_r_counts_terms(model, adapter_name, r)

    def _check_target_module_compatiblity(self, peft_config: KronAConfig, model: nn.Module, target_name: str) -> None:
        super()._check_target_module_compatiblity(peft_config, model, target_name)
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        if model_type in _MAMBA_MODELS and target_name in _MAMBA_UNTARGETABLE:
            raise ValueError(
                f"Module '{target_name}' of a Mamba model (model_type='{model_type}') is read inside a fused kernel, "
                f"so an adapter on it would have no effect. Remove {sorted(_MAMBA_UNTARGETABLE)} from `target_modules`."
            )

    # Also called on PEFT's MixedModel, with that model as `self`: uses nothing that only KronAModel has.
    def _create_and_replace(
        self,
        config: KronAConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        _check_fused(parent, target_name, current_key)
        if adapter_name in current_key.split("."):  # a MixedModel does not come through `inject_adapter`
            check_adapter_name(self.model, adapter_name)
        if isinstance(target, KronALayer):
            target.update_layer(adapter_name, config, name=current_key)
            layer = target
        else:
            quantization_kwargs = get_quantization_kwargs(self.model)
            layer = new_layer(target, parent, adapter_name, config, current_key, quantization_kwargs)
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)
        wanted, taken = config.for_layer(current_key).factors, layer.factors(adapter_name)
        if taken != wanted:
            logger.info(
                "%s (out=%d, in=%d): factors (a_out, a_in) = %s do not divide it, took %s.",
                current_key,
                layer.out_features,
                layer.in_features,
                wanted,
                taken,
            )

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: KronAConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        # Called by PEFT (>= 0.21) when it collects what is saved.
        state_dict = unfiltered(model, adapter_name, state_dict, unwanted_adapter_names)
        own = super()._get_adapter_state_dict(
            model=model,
            config=config,
            adapter_name=adapter_name,
            state_dict=state_dict,
            unwanted_adapter_names=unwanted_adapter_names,
        )
        remember_settings(own, config)
        return own

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # PEFT (>= 0.21) builds the keys of files, and the way back from them, with it.
        return without_nesting(super()._remove_adapter_name_from_key(key, adapter_name))

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: KronAConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        # Called by PEFT (>= 0.21) before it loads weights; on its own it lets missing and left-over weights pass.
        remapped = super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
        )
        marker, end = f".{cls.prefix}", f".{adapter_name}"
        wanted = {key: None for key, _ in model.named_parameters() if marker in key and key.endswith(end)}
        problems = [f"no weights for {key.removesuffix(end)}" for key in wanted if key not in remapped]
        problems += [f"no layer for {key}" for key in remapped if marker in key and key not in wanted]
        if problems:
            more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
            raise FormatError(
                f"The weights do not fit adapter {adapter_name!r}: {'; '.join(problems[:3])}{more}. Was it trained on "
                "another base model or with other target_modules, or is the file damaged? Nothing was loaded; if this "
                f"call added the adapter, delete_adapter({adapter_name!r}) removes it again."
            )
        return remapped

    def _check_all_mergeable(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        for module in self.model.modules():
            if isinstance(module, KronALayer):
                with onload_layer(module):  # where accelerate has offloaded it
                    module.check_merge(adapter_names, check_finite=safe_merge)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters into the base weights; `unmerge_adapter` restores these bit for bit.

        While merged, every adapted layer keeps its original weight on its device. With `safe_merge` all layers are
        checked for NaN and infinity before the first one is changed.
        """
        self._check_all_mergeable(adapter_names, safe_merge)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def unmerge_adapter(self) -> None:
        """Restore all base weights, in the reverse order of merging, as two layers may share a weight."""
        for module in reversed(list(self.model.modules())):
            if isinstance(module, BaseTunerLayer):
                with onload_layer(module):
                    module.unmerge()

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:  # the base model; PEFT's own says None
        if merge:
            self._check_all_mergeable(adapter_names, safe_merge)
        return super()._unload_and_optionally_merge(
            merge=merge, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
        )

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "linear",
        r: int | None = None,
    ) -> dict[str, float]:
        """Add `adapter_name` = sum_j weights[j] * adapters[j].

        Where the adapters have the same factors and layout it is exact: dW is linear in the terms, so they are
        concatenated. Where they have not, it is the nearest Kronecker sum, with the factors of one of them (exact up to
        rounding if `r` terms suffice); the error of each such layer is logged as a warning.

        Args:
            adapters: names of existing adapters. weights: one factor each (any sign).
            adapter_name: the new adapter's name.
            combination_type: "linear", the only one.
            r: the most terms that the new adapter may have on a layer; None: as many as the adapters have together.

        Returns:
            {layer: relative error ||dW - sum||_F / ||sum||_F} of the layers that are not exact by construction.

        Raises:
            ConfigError: if names, weights, type or r are not as above.
        """
        return combine_adapters(self, adapters, weights, adapter_name, combination_type, r)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # Carries `adapter_names` of a forward or generate call to the layers, as PEFT's LoRA does.
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        known = {name for layer in self.modules() if isinstance(layer, KronALayer) for name in layer.krona_A}
        unknown = set(adapter_names) - known - {"__base__"}
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}")

        num_beams = kwargs.get("num_beams", None)
        beams = num_beams if isinstance(num_beams, int) and num_beams > 1 else 1
        repeated = [name for name in adapter_names for _ in range(beams)]
        # get_encoder of a model without an encoder returns the model itself
        is_encoder_decoder = getattr(getattr(self.model, "config", None), "is_encoder_decoder", False)
        in_encoder = set(self.model.get_encoder().modules()) if beams > 1 and is_encoder_decoder else set()
        handles = []
        for module in self.modules():
            if isinstance(module, (KronALayer, AuxiliaryTrainingWrapper)):
                # Beam search repeats the decoder's inputs, but not the encoder's.
                names = list(adapter_names) if module in in_encoder else repeated
                hook = partial(_inject_adapter_names, adapter_names=names)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _copy_factors(model: nn.Module, source: str, target: str) -> None:
    """What TRL's DPO, KTO, GRPO and RLOO trainers mean by `add_adapter("ref", peft_config["default"])`.

    They then copy the weights by names with ".default.", which LoRA's have and factors in a ParameterDict have not: the
    reference of a trained adapter would be the base model, without a word.
    """
    for layer in model.modules():
        if isinstance(layer, KronALayer) and target in layer.krona_A and source in layer.krona_A:
            with torch.no_grad():
                for factors in (layer.krona_A, layer.krona_B):
                    factors[target].copy_(factors[source])
    logger.warning(
        "Adapter 'ref' starts as a copy of 'default', as it was added with the same config: TRL's trainers mean that. "
        "For a fresh adapter choose another name."
    )


def _warn_of_unmatched_factors(model: nn.Module, adapter_name: str, config: KronAConfig) -> None:
    """As PEFT warns of keys of its own patterns."""
    if not config.factor_pattern:
        return
    names = [n for n, m in model.named_modules() if isinstance(m, KronALayer) and adapter_name in m.krona_A]
    unmatched = sorted(k for k in config.factor_pattern if not any(re.match(rf"(.*\.)?({k})$", n) for n in names))
    if unmatched:
        warnings.warn(
            f"The following factor_pattern keys did not match any targeted module and were ignored: {unmatched}.",
            RuntimeWarning,
            stacklevel=2,
        )


def _inject_adapter_names(module: nn.Module, args: tuple, kwargs: dict, adapter_names: list[str]) -> tuple:
    return args, {**kwargs, "adapter_names": adapter_names}


def _check_fused(parent: nn.Module, target_name: str, name: str) -> None:
    """Raises UnsupportedLayerError where an adapter would have no effect."""
    if has_fused_projections(parent) and is_left_out_by_fusing(parent, target_name):
        raise UnsupportedLayerError(
            f"Cannot adapt '{name}': fuse_qkv_projections() has put its weight into one matrix with others, and the "
            "layer is not called any longer. Call unfuse_qkv_projections() first."
        )


def new_layer(
    target: nn.Module,
    parent: nn.Module,
    adapter_name: str,
    config: KronAConfig,
    name: str,
    quantization_kwargs: dict[str, Any],
) -> KronALayer:
    """The adapted layer for the target module called `name` (which may already be another tuner's layer).

    Raises:
        UnsupportedLayerError: (a TypeError) names the module, its type and what is supported.
    """
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if isinstance(parent, nn.MultiheadAttention):
        raise UnsupportedLayerError(
            f"Cannot adapt '{name}' ({type(base).__name__}): nn.MultiheadAttention reads the weight of its "
            "out_proj without calling it, so an adapter would silently have no effect. Remove it from `target_modules`."
        )
    layer_cls = next((layer for cls, layer in KronAModel.layers_mapping.items() if isinstance(base, cls)), None)
    if layer_cls is None:
        backend = resolve_quantization_backend(base, **quantization_kwargs)
        if backend is None or backend.layer_type != "linear":
            supported = ", ".join(cls.__name__ for cls in KronAModel.layers_mapping)
            raise UnsupportedLayerError(
                f"Cannot adapt '{name}' of type {type(base).__name__}: KronA supports {supported} and "
                "quantized linear layers. Choose other `target_modules`, or leave it out with `exclude_modules`."
            )
        layer_cls = Linear
    kwargs: dict[str, Any] = {"name": name, "quantization_kwargs": quantization_kwargs}
    if layer_cls is Linear:
        kwargs["fan_in_fan_out"] = isinstance(base, Conv1D) or config.fan_in_fan_out
        if config.fan_in_fan_out and isinstance(base, nn.Linear):
            warnings.warn(
                "fan_in_fan_out is set to True but the target module is `torch.nn.Linear`. "
                "Setting fan_in_fan_out to False.",
                stacklevel=2,
            )
            kwargs["fan_in_fan_out"] = False
    return layer_cls(target, adapter_name, config, **kwargs)

# SPDX-License-Identifier: Apache-2.0
"""Whole diffusers pipelines: add KronA to them, save it and load it, every model of the pipeline in one call.

Works with any pipeline that has its models in `pipe.components`: Stable Diffusion 1.x, 2.x and XL, SD3, Flux and the
like. On disk an adapter is one PEFT folder per model, in a subfolder named after the component:

    my-adapter/unet/adapter_config.json           my-adapter/text_encoder/adapter_config.json
    my-adapter/unet/adapter_model.safetensors     my-adapter/text_encoder/adapter_model.safetensors
"""

from __future__ import annotations

import copy
import inspect
import logging
import os
import re
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import cast_adapter_dtype, check_target_module_exists
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from safetensors.torch import save_file
from torch import nn

from ._compat import HOTSWAP_SETTINGS
from .adapter_names import check_adapter_name
from .config import PEFT_PREFIX, KronAConfig, check_is_config
from .convert import read_adapter, shapes_of_models
from .errors import ConfigError, ConfigTypeError, FormatError
from .hotswap import plan_swap
from .layers import KronALayer
from .layers.base import finite_weight
from .rollback import undone_on_error
from .sources import DENOISERS, Components, find, is_krona_config, plain_keys, read_own
from .state_dict import factor_keys, without_nesting
from .targets import DIFFUSERS_TARGET_MODULES

logger = logging.getLogger(__name__)


def add_krona(
    pipe: Any,
    config: KronAConfig | None = None,
    *,
    text_encoder_config: KronAConfig | bool | None = None,
    adapter_name: str = "default",
    autocast_adapter_dtype: bool = True,
) -> dict[str, nn.Module]:
    """Add a new KronA adapter to a pipeline's denoiser and, on request, to its text encoders.

    Args:
        pipe: a diffusers pipeline.
        config: for the UNet or transformer; None: (64, 4) on the layers in `peft_krona.targets`. Copied per model.
        text_encoder_config: for every text encoder; True: (64, 4) on the attention projections; None: leave them alone.
        adapter_name: the adapter's name in all models.
        autocast_adapter_dtype: keep the adapter in float32 if the model is float16 or bfloat16 (as get_peft_model
            does), which training needs.

    Returns:
        {component name: adapted model}, in the pipeline's order. Their trainable parameters are the adapter's.

    Raises:
        ConfigError: if the pipeline has nothing to adapt, the adapter exists already or its name is not allowed (empty,
            or with a dot). The pipeline is unchanged.
        ConfigTypeError: if a config is of another type, LoRA's for instance.
    """
    if config is not None:
        check_is_config(config, "config", " or None")
    if not isinstance(text_encoder_config, bool) and text_encoder_config is not None:
        check_is_config(text_encoder_config, "text_encoder_config", ", True or None")
    models = models_of(pipe)
    configs: dict[str, KronAConfig] = {}
    for name in models:
        if name in DENOISERS:
            configs[name] = copy.deepcopy(config) if config is not None else KronAConfig()
        elif name.startswith("text_encoder") and text_encoder_config:
            configs[name] = KronAConfig() if text_encoder_config is True else copy.deepcopy(text_encoder_config)
    if not configs:
        raise ConfigError(
            f"{type(pipe).__name__} has no model to adapt: expected one of {DENOISERS} among its components, "
            f"got {sorted(models)}."
        )
    adapted = {name: models[name] for name in configs}
    with undone_on_error(*adapted.values()):
        for name, model in adapted.items():
            _add_adapter(model, configs[name], adapter_name, component=name)
            cast_adapter_dtype(model, adapter_name=adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)
    return adapted


def save_krona_weights(
    pipe: Any,
    save_directory: str | os.PathLike,
    adapter_name: str = "default",
    *,
    metadata: Mapping[str, str] | None = None,
    state_dicts: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Path]:
    """Save one adapter of every model of the pipeline, each as a PEFT folder in a subfolder of its component's name.

    A component's folder is written under a temporary name and renamed, so it is never half written. A save replaces
    the adapter that is there: once the new folders are in place, those of components that have no such adapter (any
    longer) are removed if they hold a KronA adapter. Everything else in `save_directory` is left alone.

    Args:
        pipe: the pipeline. save_directory: created if missing. adapter_name: which adapter.
        metadata: texts for the header of every weights file.
        state_dicts: {component name: its whole state dict}, for models whose parameters are spread over processes
            (FSDP, ZeRO-3); the others' are taken from the models.

    Returns:
        The folders written.

    Raises:
        ConfigError: if no model of the pipeline has a KronA adapter of that name.
        FormatError: if `save_directory` holds something else under these names: an adapter of a single model, or a
            component's own weights; or if weights are missing or empty. Nothing is written then.
    """
    configs = {
        name: config
        for name, model in models_of(pipe).items()
        if isinstance(config := _configs(model).get(adapter_name), KronAConfig)
    }
    if not configs:
        raise ConfigError(
            f"No model of this {type(pipe).__name__} has a KronA adapter named {adapter_name!r}; it has "
            f"{_adapter_names(pipe) or 'none'}. Add one with add_krona(pipe) or name another."
        )
    root = _named_path(save_directory, "save_directory")
    place = next(path for path in (root, *root.absolute().parents) if path.exists() or path.is_symlink())
    if not place.is_dir():
        raise FormatError(f"{root}: {place} is no folder. Choose another save_directory.")
    _check_replaceable(root, configs)
    models = models_of(pipe)
    weights = {name: _weights_of(models[name], name, adapter_name, (state_dicts or {}).get(name)) for name in configs}
    root.mkdir(parents=True, exist_ok=True)
    header = {"format": "pt", **(metadata or {})}
    saved = []
    for name, config in configs.items():
        config = copy.deepcopy(config)
        config.inference_mode = True
        config.base_model_name_or_path = config.base_model_name_or_path or _name_of(models[name])
        saved.append(_write_component(weights[name], config, root / name, header))
    _remove_others(root, configs, models)
    return saved


def load_krona_weights(
    pipe: Any,
    source: str | os.PathLike,
    adapter_name: str = "default",
    weight: float | None = None,
    *,
    weight_name: str | None = None,
    subfolder: str | None = None,
    config: KronAConfig | None = None,
    hotswap: bool = False,
    revision: str | None = None,
    token: str | None = None,
    **hub: Any,
) -> list[str]:
    """Load an adapter into a pipeline and make it the active one; all models that it has weights for, in one call.

    Args:
        pipe: the pipeline.
        source: a folder or file, or the id of a repository on the Hugging Face Hub (its cache is used where there is no
            connection). Besides what `save_krona_weights`, PEFT and diffusers' `save_lora_weights` write, everything
            that `peft_krona.convert.read_adapter` reads: released DiffuseKronA checkpoints, LoKr and LoRA files.
        adapter_name: the name to give it; use `pipe.set_adapters` to combine or weight several.
        weight: strength; None leaves it at 1.
        weight_name: a single file within `source`. subfolder: a folder within it.
        config: the settings that a file of KronA weights was trained with, if it was saved without them.
        hotswap: put the weights in the place of those of the adapter that has this name already; a compiled model is
            not compiled again. Layers and factor sizes must be the same; for other numbers of terms, and so that s can
            differ, call `pipe.enable_lora_hotswap(target_rank=...)` with the largest r before the first one is loaded.
        revision, token, hub: for the Hub, as huggingface_hub's `snapshot_download` takes them.

    Returns:
        Names of the components that were adapted.

    Raises:
        FormatError: names the file, layer or component and the reason. The pipeline is then as it was before.
        ConfigError: if an adapter of that name exists already, or the name is not allowed (empty, or with a dot).
        ConfigTypeError: if `config` is of another type, or there is no such argument.
    """
    if config is not None:
        check_is_config(config, "config", " or None")
    for name in hub:  # a local folder would pass them by without a word
        if name not in inspect.signature(snapshot_download).parameters:
            raise ConfigTypeError(
                f"load_krona_weights got an unexpected keyword argument {name!r}: expected one of its own, or of "
                "huggingface_hub's snapshot_download. (What it has loaded can be trained without any.)"
            )
    source = os.fspath(_named_path(source, "source"))
    path = find(source, weight_name, subfolder, revision=revision, token=token, **hub)
    models = models_of(pipe)
    components = read_own(path, models, config)
    if components is None:
        if config is not None:
            raise ConfigError(f"config= is for a file of KronA weights without settings, which {path} is not.")
        components = read_adapter(path, shapes=shapes_of_models(models)).peft_components(models)
    return load_components(pipe, components, adapter_name, weight, hotswap=hotswap, where=str(path))


def _named_path(path: Any, argument: str) -> Path:
    """Raises ConfigTypeError for what is no path, and ConfigError for an empty one, which is the current folder."""
    if not isinstance(path, (str, os.PathLike)):
        hint = " A state dict goes into pipe.load_lora_weights." if isinstance(path, Mapping) else ""
        raise ConfigTypeError(f"{argument} should be a path, got {type(path).__name__}.{hint}")
    if not os.fspath(path):
        raise ConfigError(f"{argument} is empty. Write '.' for the current folder.")
    return Path(path)


def load_components(
    pipe: Any,
    components: Components,
    adapter_name: str,
    weight: float | None = None,
    *,
    hotswap: bool = False,
    where: str = "the state dict",
) -> list[str]:
    """`load_krona_weights` with what was read: {component: (config, state dict)}. `where` is for messages."""
    if weight is not None:
        weight = finite_weight(weight)
    models = models_of(pipe)
    missing = [name for name in components if name not in models]
    if missing:
        raise FormatError(
            f"{where} has weights for {missing}, but this {type(pipe).__name__} has only {sorted(models)}."
        )
    if hotswap:
        others = [
            name
            for name, model in models.items()
            if name not in components and isinstance(getattr(model, "peft_config", {}).get(adapter_name), KronAConfig)
        ]
        if others:
            raise FormatError(
                f"{where} cannot take the place of adapter {adapter_name!r}, which has weights for {others} as well. "
                "The adapter that is there is unchanged. Load the other one under another name."
            )
        plans = [
            _plan_swap(models[name], config, state_dict, adapter_name, f"{where}: {name}")
            for name, (config, state_dict) in components.items()
        ]
        for name, apply in zip(components, plans, strict=True):  # nothing is swapped before all of them fit
            apply()
            _set_weight(models[name], adapter_name, weight)
        return list(components)
    with undone_on_error(*(models[name] for name in components)):
        for name, (config, state_dict) in components.items():
            load_into_model(models[name], config, state_dict, adapter_name, weight, where=where, component=name)
    return list(components)


def load_into_model(
    model: nn.Module,
    config: KronAConfig,
    state_dict: Mapping[str, torch.Tensor],
    adapter_name: str,
    weight: float | None = None,
    *,
    hotswap: bool = False,
    where: str = "the state dict",
    component: str = "model",
) -> None:
    """Load one model's adapter. Raises as `load_krona_weights`."""
    if hotswap:
        _plan_swap(model, config, state_dict, adapter_name, f"{where}: {component}")()
        _set_weight(model, adapter_name, weight)
        return
    state_dict = plain_keys(state_dict)
    _add_adapter(model, _for_this_model(model, config, state_dict, where), adapter_name, component)
    _load_state_dict(model, state_dict, adapter_name, where=f"{where}: {component}")
    prepared = getattr(model, HOTSWAP_SETTINGS, None)  # by diffusers' enable_lora_hotswap
    if prepared is not None:
        prepare_model_for_compiled_hotswap(model, **prepared)
        setattr(model, HOTSWAP_SETTINGS, None)
    _set_weight(model, adapter_name, weight)


def _plan_swap(
    model: nn.Module, config: KronAConfig, state_dict: Mapping[str, torch.Tensor], adapter_name: str, where: str
) -> Callable[[], None]:
    expected = [key.removesuffix(f".{adapter_name}") for key in factor_keys(model, adapter_name)]
    return plan_swap(model, config, _named_as(expected, plain_keys(state_dict)), adapter_name, where)


def _set_weight(model: nn.Module, adapter_name: str, weight: float | None) -> None:
    if weight is not None:
        for layer in _krona_layers(model):
            layer.set_scale(adapter_name, weight)


def _for_this_model(
    model: nn.Module, config: KronAConfig, state_dict: Mapping[str, torch.Tensor], where: str
) -> KronAConfig:
    """The config, held to the layers that have weights where the model has more of these names.

    AnimateDiff's motion modules and IP-Adapter's projections have attention layers too, whose short names are among the
    usual targets (diffusers#7661). Such a layer is told by its place: the adapter has none in blocks of that kind.
    """
    trained = {key.rpartition(".krona_")[0] for key in state_dict if ".krona_" in key}
    layers = {name for name, module in model.named_modules() if type(module) is not nn.ModuleDict}
    if not trained or not trained <= layers:
        return config  # of another model: what is missing is said when the weights are loaded
    wanted = {name for name in layers if _is_target(config, name)}
    kinds = {_kind(name) for name in trained}
    others = sorted(name for name in wanted - trained if _kind(name) not in kinds)
    if not others or wanted - trained - set(others):
        return config
    logger.warning(
        "%s: %d layers of this %s have names that the adapter adapts, but it has no weights for them (e.g. %s); they "
        "are left as they are.",
        where,
        len(others),
        type(model).__name__,
        others[0],
    )
    config = copy.deepcopy(config)
    config.target_modules = trained
    config.layers_to_transform = config.layers_pattern = None
    return config


def _kind(name: str) -> str:
    """The repeated block that a layer is in, numbers aside; where it is in none, the module around it."""
    pattern = re.sub(r"\.\d+(?=\.|$)", ".#", name.removesuffix(".0"))
    block = re.match(r"(.*\.#)\.", pattern)
    return block[1] if block else pattern.rpartition(".")[0]


def _is_target(config: KronAConfig, name: str) -> bool:
    if config.target_modules is None:
        config = copy.copy(config)
        config.target_modules = set(DIFFUSERS_TARGET_MODULES)
    return bool(check_target_module_exists(config, name))


def _load_state_dict(model: nn.Module, state_dict: dict, adapter_name: str, where: str) -> None:
    """Load weights into an adapter that was just added.

    Raises:
        FormatError: names the keys that are missing, left over or of the wrong shape.
    """
    expected = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    state_dict = _named_as(expected, state_dict)
    problems = [f"no weights for {key}" for key in expected if key not in state_dict]
    problems += [f"no layer for {key}" for key in state_dict if key not in expected]
    problems += [
        f"{key} has shape {tuple(tensor.shape)}, the layer needs {tuple(expected[key].shape)}"
        for key, tensor in state_dict.items()
        if key in expected and tensor.shape != expected[key].shape
    ]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise FormatError(
            f"{where}: the adapter does not fit this model: {'; '.join(problems[:3])}{more}. "
            "Was it trained on another base model, or is the file damaged?"
        )
    set_peft_model_state_dict(model, state_dict, adapter_name=adapter_name)


def _named_as(expected: Collection[str], state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict with or without "text_model.", as the model's names have it.

    transformers 5 dropped it from CLIPTextModel's module names, and files are from before and after.
    """
    prefix = "text_model."
    if not state_dict.keys() & set(expected):
        if all(key.startswith(prefix) for key in state_dict):
            return {key.removeprefix(prefix): tensor for key, tensor in state_dict.items()}
        if all(key.startswith(prefix) for key in expected):
            return {prefix + key: tensor for key, tensor in state_dict.items()}
    return dict(state_dict)


def models_of(pipe: Any) -> dict[str, nn.Module]:
    """{component name: model}, wrappers taken off."""
    components = getattr(pipe, "components", None)
    if not isinstance(components, Mapping):
        raise ConfigError(
            f"Expected a diffusers pipeline, got {type(pipe).__name__}. For a single model use "
            "get_peft_model(model, KronAConfig(...)) or model.add_adapter(KronAConfig(...))."
        )
    models = {name: part for name, part in components.items() if isinstance(part, nn.Module)}
    return {name: unwrapped(model) for name, model in models.items()}


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, inside of what torch.compile and PEFT put around it."""
    while True:
        inner = getattr(model, "_orig_mod", model)  # torch.compile(model)
        inner = inner.get_base_model() if isinstance(inner, PeftModel) else inner
        if inner is model:
            return model
        model = inner


def _krona_layers(model: nn.Module) -> Iterator[KronALayer]:
    return (module for module in model.modules() if isinstance(module, KronALayer))


def _adapter_names(pipe: Any) -> list[str]:
    return sorted({name for model in models_of(pipe).values() for name in _configs(model)})


def _configs(model: nn.Module) -> Mapping[str, Any]:
    """{adapter name: its config} of a model."""
    return getattr(model, "peft_config", {})


def _add_adapter(model: Any, config: KronAConfig, adapter_name: str, component: str) -> None:
    check_adapter_name(model, adapter_name)
    if adapter_name in _configs(model):
        raise ConfigError(
            f"The pipeline's {component} already has an adapter named {adapter_name!r}. Choose another adapter_name, "
            f"or remove it first: pipe.delete_adapters({adapter_name!r})."
        )
    model.add_adapter(config, adapter_name)


def _check_replaceable(root: Path, names: Iterable[str]) -> None:
    """That a save into `root` replaces no more than an adapter of a pipeline, and is what a load then reads."""
    if (root / CONFIG_NAME).is_file():  # a load would take this one, and not the subfolders
        raise FormatError(
            f"{root} is the PEFT folder of a single model ({CONFIG_NAME}); expected a new folder or the adapter of a "
            "pipeline. Choose another save_directory, or remove the folder first."
        )
    for folder in (root / name for name in names):
        if folder.is_dir() and any(folder.iterdir()) and not (folder / CONFIG_NAME).is_file():
            raise FormatError(
                f"{folder} is there and holds no adapter ({CONFIG_NAME} is missing), so it is not replaced. Is "
                f"{root} the base model's folder? Choose another save_directory."
            )


def _remove_others(root: Path, saved: Collection[str], components: Collection[str]) -> None:
    """Remove the adapters of other components, also of those that only another kind of pipeline has."""
    others = [
        folder
        for folder in (file.parent for file in sorted(root.glob(f"*/{CONFIG_NAME}")))
        if folder.name not in saved
        and (folder.name in components or folder.name in DENOISERS or re.fullmatch(r"text_encoder(_\d+)?", folder.name))
        and is_krona_config(folder / CONFIG_NAME)
    ]
    if others:
        with tempfile.TemporaryDirectory(dir=root, prefix=".replaced-") as scratch:
            for folder in others:  # renamed first: no folder is ever half removed
                os.replace(folder, Path(scratch, folder.name))


def _weights_of(
    model: nn.Module, component: str, adapter_name: str, whole: Mapping[str, Any] | None
) -> dict[str, torch.Tensor]:
    """{key in the file: tensor} of an adapter. whole: the model's state dict, where it is not in the model itself.

    Raises:
        FormatError: if one of the adapter's weights is missing or empty there.
    """
    state_dict = get_peft_model_state_dict(
        model, state_dict=whole, adapter_name=adapter_name, save_embedding_layers=False
    )
    wrappers = re.compile(r"(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")  # not in saved names
    keys = (key.removesuffix(f".{adapter_name}") for key in factor_keys(model, adapter_name))
    names = [without_nesting(wrappers.sub("", key)) for key in keys]
    lost = [name for name in names if name not in state_dict or not state_dict[name].numel()]
    if lost:
        raise FormatError(
            f"Expected all {len(names)} weights of the adapter {adapter_name!r} of {component!r}, got {len(lost)} of "
            f"them empty or not at all (e.g. {lost[0]}). Where a model is spread over processes, pass "
            f"state_dicts={{{component!r}: accelerator.get_state_dict(model)}}, with the whole model's tensors."
        )
    return {f"{PEFT_PREFIX}{key}": tensor.contiguous().cpu() for key, tensor in state_dict.items()}


def _name_of(model: nn.Module) -> str | None:
    """The path or id that transformers and diffusers have kept of where a model is from; of the Hub's cache, the id."""
    name = getattr(model, "name_or_path", None) or getattr(getattr(model, "config", None), "_name_or_path", None)
    cached = re.search(r"[/\\]models--([^/\\]+)--([^/\\]+)[/\\]snapshots[/\\]", str(name))
    return f"{cached[1]}/{cached[2]}" if cached else name or None


def _write_component(
    weights: dict[str, torch.Tensor], config: KronAConfig, folder: Path, metadata: dict[str, str]
) -> Path:
    """A PEFT folder in the place of what is there, whole or not at all."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        new = Path(scratch, "new")
        new.mkdir()
        config.save_pretrained(str(new))
        save_file(weights, new / SAFETENSORS_WEIGHTS_NAME, metadata=metadata)
        old = Path(scratch, "old")
        if folder.exists():
            os.replace(folder, old)
        try:
            os.replace(new, folder)
        except BaseException:
            if old.exists():
                os.replace(old, folder)
            raise
    return folder

# SPDX-License-Identifier: Apache-2.0
"""Makes diffusers know KronA: its LoRA methods take KronA adapters too, or say in one line which call does.

diffusers has no registration for adapter types. `register` therefore wraps the few methods that look for LoRA's names;
each wrapper hands everything that is not KronA to the original, untouched. Nothing is imported for it: the wrappers are
put in when diffusers' own modules are imported, before or after `import peft_krona`. `unregister` takes them out again.

Functions that scripts import by name (`convert_state_dict_to_diffusers`) are changed in place, by their code object,
as the script may have imported them first.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import inspect
import itertools
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import CodeType, FunctionType, ModuleType
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ._compat import has_fused_projections, is_left_out_by_fusing
from .errors import ConfigError, FormatError, UnsupportedLayerError
from .layers import KronALayer

logger = logging.getLogger(__name__)


def register() -> None:
    """Wrap diffusers' methods, now where they are loaded and else when they will be. Safe to run twice."""
    unregister()
    sys.meta_path.insert(0, _Finder())
    for name, module in list(sys.modules.items()):
        if _patches(name) and module is not None:
            _finder().apply(module)


def unregister() -> None:
    """Put everything of diffusers back as it was."""
    ours: list[Any] = [finder for finder in sys.meta_path if type(finder).__qualname__ == _Finder.__qualname__]
    for finder in ours:  # also of this module before a reload
        sys.meta_path.remove(finder)
        while finder.undo:
            finder.undo.pop()()


class _Finder(importlib.abc.MetaPathFinder):
    """Finds nothing itself: has the modules in question patched once they have run."""

    def __init__(self) -> None:
        self.undo: list[Callable[[], None]] = []
        self.patched: set[str] = set()

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if not _patches(name):
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next((found for finder in others if (found := finder.find_spec(name, path, target))), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                if self in sys.meta_path:
                    self.apply(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec

    def apply(self, module: ModuleType) -> None:
        if module.__name__ not in self.patched:
            self.patched.add(module.__name__)
            for patch in _patches(module.__name__):
                patch(module)


def _finder() -> _Finder:
    return next(finder for finder in sys.meta_path if type(finder) is _Finder)


def _patches(name: str) -> list[Callable[[ModuleType], None]]:
    """What is done to a module of diffusers."""
    if not name.startswith("diffusers."):
        return []
    found = [patch for module, patch in _BY_MODULE.items() if name == module]
    if name.startswith(("diffusers.models.controlnets.", "diffusers.models.unets.")):
        found.append(_patch_copies)
    if name.startswith("diffusers.models."):
        found.append(_patch_fusing)
    return found


def _wrap(owner: Any, name: str, make: Callable[[Callable], Callable]) -> None:
    """Replace a method that `owner` defines itself by make(original); class and static methods stay what they are.

    A diffusers without that method is left usable, with a warning.
    """
    descriptor = owner.__dict__.get(name)
    if descriptor is None:
        logger.warning(
            "diffusers %s has no %s.%s, so that it knows KronA in part only. Install diffusers >= 0.40, or load and "
            "save with load_krona_weights and save_krona_weights.",
            getattr(sys.modules.get("diffusers"), "__version__", ""),
            owner.__name__,
            name,
        )
        return
    original = descriptor.__func__ if isinstance(descriptor, (classmethod, staticmethod)) else descriptor
    wrapper = functools.wraps(original)(make(original))
    kind = type(descriptor) if descriptor is not original else (lambda function: function)
    setattr(owner, name, kind(wrapper))
    _finder().undo.append(lambda: setattr(owner, name, descriptor))


# -- state dicts -------------------------------------------------------------------------------------------------------


def _patch_state_dict_utils(module: ModuleType) -> None:
    for name in ("convert_state_dict_to_diffusers", "convert_state_dict_to_peft", "convert_all_state_dict_to_peft"):
        _extend_in_place(getattr(module, name), _same_state_dict)
    _extend_in_place(module.convert_state_dict_to_kohya, _no_kohya)


def _extend_in_place(function: Any, ours: Callable[[dict], dict]) -> None:
    """Let `function` return ours(state_dict) for a KronA state dict, for everyone who holds it already."""
    original = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    original.__kwdefaults__ = function.__kwdefaults__
    kept: tuple[CodeType, Any, Any] = function.__code__, function.__defaults__, function.__kwdefaults__
    _ORIGINALS[function.__name__] = original, ours

    def dispatch(*args, **kwargs):  # runs with diffusers' globals, so it finds ours by an import
        from peft_krona._diffusers import call_converter

        return call_converter("NAME", *args, **kwargs)

    code = dispatch.__code__
    constants = tuple(function.__name__ if c == "NAME" else c for c in code.co_consts)
    function.__code__ = code.replace(co_consts=constants, co_name=function.__name__)
    function.__defaults__ = function.__kwdefaults__ = None
    function.__signature__ = inspect.signature(original)

    def restore() -> None:
        function.__code__, function.__defaults__, function.__kwdefaults__ = kept
        del function.__signature__

    _finder().undo.append(restore)


_ORIGINALS: dict[str, tuple[Callable, Callable]] = {}


def call_converter(name: str, *args: Any, **kwargs: Any) -> dict:
    """What the converters of diffusers' state dicts do now: KronA's keys are the same in all of its formats."""
    from .sources import has_krona_keys

    original, ours = _ORIGINALS[name]
    state_dict = args[0] if args else kwargs.get("state_dict")
    return ours(state_dict) if has_krona_keys(state_dict) else original(*args, **kwargs)


def _same_state_dict(state_dict: dict) -> dict:
    return state_dict


def _no_kohya(state_dict: dict) -> dict:
    raise FormatError(
        "convert_state_dict_to_kohya writes LoRA files only, and these are KronA weights. For ComfyUI, A1111 and the "
        "like use: python -m peft_krona convert FOLDER FILE.safetensors, or peft_krona.convert."
    )


# -- pipelines ---------------------------------------------------------------------------------------------------------


def _patch_lora_base(module: ModuleType) -> None:
    _wrap(module.LoraBaseMixin, "_save_lora_weights", _saving)
    _wrap(module.LoraBaseMixin, "set_lora_device", _set_device)
    _wrap(module.LoraBaseMixin, "unfuse_lora", _unfusing)


def _patch_lora_pipelines(module: ModuleType) -> None:
    wrappers = {
        "load_lora_weights": _loading,
        "lora_state_dict": _reading,
        "load_lora_into_text_encoder": _into_text_encoder,
    }
    for mixin in _classes_of(module):
        for name, wrapper in wrappers.items():
            if name in mixin.__dict__:
                _wrap(mixin, name, wrapper)


def _classes_of(module: ModuleType) -> list[type]:
    return [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__]


def _loading(original: Callable) -> Callable:
    def load_lora_weights(self, pretrained_model_name_or_path_or_dict, adapter_name=None, hotswap=False, **kwargs):
        source = pretrained_model_name_or_path_or_dict
        if _holds_krona(source, **kwargs):
            return _load_pipeline(self, source, adapter_name, hotswap, **kwargs)
        try:
            return original(self, source, adapter_name, hotswap=hotswap, **kwargs)
        except (ValueError, OSError):  # diffusers does not know a folder of KronA on the Hub for what it is
            folder = _on_hub(source, **kwargs)
            if folder is None:
                raise
        return _load_pipeline(self, folder, adapter_name, hotswap)

    return load_lora_weights


def _reading(original: Callable) -> Callable:
    def lora_state_dict(cls, pretrained_model_name_or_path_or_dict, **kwargs):
        source = pretrained_model_name_or_path_or_dict
        if isinstance(source, Mapping) or not _holds_krona(source, **kwargs):
            return original(cls, source, **kwargs)
        from . import sources

        path = sources.find(os.fspath(source), kwargs.get("weight_name"), kwargs.get("subfolder"))
        components = sources.read_krona(path, cls._lora_loadable_modules, needs_settings=False)
        own = {f"{name}.{key}": t for name, (_, part) in components.items() for key, t in part.items()}
        return original(cls, own, **{k: v for k, v in kwargs.items() if k not in ("weight_name", "subfolder")})

    return lora_state_dict


def _into_text_encoder(original: Callable) -> Callable:
    signature = inspect.signature(original)

    def load_lora_into_text_encoder(cls, *args, **kwargs):
        from .sources import has_krona_keys

        given = signature.bind(cls, *args, **kwargs)
        given.apply_defaults()
        if not has_krona_keys(given.arguments["state_dict"]):
            return original(cls, *args, **kwargs)
        a = given.arguments
        prefix = a.get("prefix") or cls.text_encoder_name
        return _load_model(
            a["text_encoder"], a["state_dict"], prefix, a["adapter_name"], a.get("hotswap", False), a.get("metadata")
        )

    return load_lora_into_text_encoder


def _saving(original: Callable) -> Callable:
    def _save_lora_weights(cls, save_directory, lora_layers, lora_metadata, *args, **kwargs):
        from .sources import has_krona_keys
        from .state_dict import settings_of

        lora_metadata = dict(lora_metadata)
        for component, weights in lora_layers.items():
            if has_krona_keys(weights) and not lora_metadata.get(component):
                config = settings_of(weights)
                lora_metadata[component] = config and config.to_dict()
                if config is None:
                    logger.warning(
                        "The settings of %s's KronA adapter are unknown here and are not in the file, as its weights "
                        "were copied on the way. Pass %s_lora_adapter_metadata=%s.peft_config['default'].to_dict(), or "
                        "read the file with load_krona_weights(pipe, file, config=KronAConfig(...)).",
                        component,
                        component,
                        component,
                    )
        if any(has_krona_keys(weights) for weights in lora_layers.values()) and not kwargs.get(
            "safe_serialization", True
        ):
            raise ConfigError("KronA weights are saved as safetensors only; leave safe_serialization at True.")
        return original(cls, save_directory, lora_layers, lora_metadata, *args, **kwargs)

    return _save_lora_weights


class _Others:
    """A pipeline as `set_lora_device` sees it, without the layers of KronA."""

    def __init__(self, pipe: Any) -> None:
        self._lora_loadable_modules = [name for name in pipe._lora_loadable_modules if getattr(pipe, name, None)]
        for name in self._lora_loadable_modules:
            setattr(self, name, _OtherModules(getattr(pipe, name)))


class _OtherModules:
    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def modules(self) -> Iterator[nn.Module]:
        return (module for module in self._model.modules() if not isinstance(module, KronALayer))


def _set_device(original: Callable) -> Callable:
    def set_lora_device(self, adapter_names, device):
        for component in self._lora_loadable_modules:
            model = getattr(self, component, None)
            for layer in model.modules() if isinstance(model, nn.Module) else ():
                if isinstance(layer, KronALayer):
                    for factors in (layer.krona_A, layer.krona_B):
                        for name in set(adapter_names) & set(factors):
                            factors[name] = nn.ParameterDict({name: factors[name]}).to(device)[name]
        original(_Others(self), adapter_names, device)

    return set_lora_device


def _holds_krona(source: Any, weight_name: str | None = None, subfolder: str | None = None, **_: Any) -> bool:
    from . import sources

    return sources.is_krona_source(source, weight_name, subfolder)


def _on_hub(source: Any, weight_name: str | None = None, subfolder: str | None = None, **kwargs: Any) -> Any:
    """The local copy of a repository's KronA adapter; None if it has none, or there is no such repository."""
    from . import sources

    if not isinstance(source, str) or source.count("/") != 1 or os.path.exists(source):
        return None
    hub = {name: kwargs[name] for name in ("revision", "token", "cache_dir", "local_files_only") if name in kwargs}
    try:
        path = sources.find(source, weight_name, subfolder, **hub)
    except FormatError:  # then diffusers' own message is the better one
        return None
    return path if sources.is_krona_source(path) else None


def _load_pipeline(
    pipe: Any, source: Any, adapter_name: str | None, hotswap: bool, weight_name=None, subfolder=None, **kwargs: Any
) -> None:
    """`pipe.load_lora_weights` for KronA."""
    from . import pipelines, sources

    models = pipelines.models_of(pipe)
    adapter_name = adapter_name or _free_name(models.values())
    if isinstance(source, Mapping):
        components, where = sources.from_state_dict(source, models, kwargs.get("metadata")), "The state dict"
    else:
        path = sources.find(os.fspath(source), weight_name, subfolder)
        components, where = sources.read_krona(path, models), str(path)
    pipelines.load_components(pipe, components, adapter_name, hotswap=hotswap, where=where)


def _load_model(
    model: nn.Module,
    source: Any,
    prefix: str | None,
    adapter_name: str | None,
    hotswap: bool = False,
    metadata: Mapping[str, Any] | None = None,
    weight_name: str | None = None,
    subfolder: str | None = None,
    **_: Any,
) -> None:
    """`model.load_lora_adapter` for KronA: the weights of the component `prefix`, or of a single model."""
    from . import pipelines, sources

    names = [prefix] if prefix else []
    if isinstance(source, Mapping):
        where = "The state dict"
        if prefix and not any(key.startswith(f"{prefix}.") for key in source):
            logger.warning("There are no KronA weights for %r among the keys, e.g. %r.", prefix, next(iter(source)))
            return
        own = {key: t for key, t in source.items() if not prefix or key.startswith(f"{prefix}.")}
        components = sources.from_state_dict(own, names, metadata, where=where)
    else:
        path = sources.find(os.fspath(source), weight_name, subfolder)
        components, where = sources.read_krona(path, names), str(path)
    name = prefix if prefix is not None and prefix in components else next(iter(components))
    if len(components) > 1 and name != prefix:
        raise FormatError(f"{where} has weights for {sorted(components)}; pass prefix= with one of these names.")
    config, state_dict = components[name]
    pipelines.load_into_model(
        pipelines.unwrapped(model),
        config,
        state_dict,
        adapter_name or _free_name([model]),
        hotswap=hotswap,
        where=where,
        component=name,
    )


def _free_name(models: Iterable[nn.Module]) -> str:
    """default_0, default_1, ...: the first that no model has, as diffusers names adapters."""
    taken = {name for model in models for name in getattr(model, "peft_config", {})}
    return next(name for i in itertools.count() if (name := f"default_{i}") not in taken)


# -- models ------------------------------------------------------------------------------------------------------------


def _patch_adapter_mixin(module: ModuleType) -> None:
    _wrap(module.PeftAdapterMixin, "load_lora_adapter", _loading_one)
    _wrap(module.PeftAdapterMixin, "unfuse_lora", _unfusing)


def _loading_one(original: Callable) -> Callable:
    def load_lora_adapter(
        self, pretrained_model_name_or_path_or_dict, prefix="transformer", hotswap=False, adapter_name=None, **kwargs
    ):
        source = pretrained_model_name_or_path_or_dict
        if _holds_krona(source, **kwargs):
            return _load_model(self, source, prefix, adapter_name, hotswap, **kwargs)
        return original(self, source, prefix, hotswap, adapter_name=adapter_name, **kwargs)

    return load_lora_adapter


def _patch_attn_procs(module: ModuleType) -> None:
    for name in ("load_attn_procs", "save_attn_procs"):
        if name in module.UNet2DConditionLoadersMixin.__dict__:
            _wrap(module.UNet2DConditionLoadersMixin, name, _no_attn_procs)


def _no_attn_procs(original: Callable) -> Callable:
    def attn_procs(self, source, *args, **kwargs):
        saving = original.__name__ == "save_attn_procs"
        if _krona_layers(self) if saving else _holds_krona(source, **kwargs):
            ours = "save_krona_weights(pipe, folder)" if saving else "load_krona_weights(pipe, source)"
            raise ConfigError(f"{original.__name__} does not know KronA adapters; use {ours}.")
        return original(self, source, *args, **kwargs)

    return attn_procs


def _patch_fusing(module: ModuleType) -> None:
    for owner in _classes_of(module):
        for name in ("fuse_qkv_projections", "fuse_projections"):
            if name in owner.__dict__:
                _wrap(owner, name, _fusing)


def _fusing(original: Callable) -> Callable:
    def fuse(self, *args, **kwargs):
        check_fusing(self)
        return original(self, *args, **kwargs)

    return fuse


def check_fusing(model: nn.Module) -> None:
    """Refuse to build one matrix of q, k and v from base weights alone, which would leave adapters out without a word.

    Raises:
        UnsupportedLayerError: names the adapted projections. Merged adapters are in the weights, so they may stay.
    """
    adapted = [
        name
        for name, layer in _krona_layers(model).items()
        if not layer.merged
        and layer.krona_A
        and is_left_out_by_fusing(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2])
    ]
    if adapted:
        raise UnsupportedLayerError(
            f"Cannot fuse the projections of {type(model).__name__}: {len(adapted)} of them have a KronA adapter "
            f"(e.g. {adapted[0]}), which would have no effect any longer. Merge it first (fuse_lora()), or remove it."
        )


def _unfusing(original: Callable) -> Callable:
    def unfuse_lora(self, *args, **kwargs):
        names = getattr(self, "_lora_loadable_modules", None)
        models = [self] if names is None else [getattr(self, name, None) for name in names]
        for model in models:
            check_unmerging(model)
        return original(self, *args, **kwargs)

    return unfuse_lora


def check_unmerging(model: nn.Module | None) -> None:
    """Refuse to take adapters out of single projections while one matrix that was made of them has them still.

    Raises:
        UnsupportedLayerError: names the first of them.
    """
    if not isinstance(model, nn.Module):
        return
    for name, layer in _krona_layers(model).items():
        parent, _, last = name.rpartition(".")
        attention = model.get_submodule(parent)
        if layer.merged and has_fused_projections(attention) and is_left_out_by_fusing(attention, last):
            raise UnsupportedLayerError(
                f"Cannot unfuse the adapter of {name}: fuse_qkv_projections() has put its merged weight into one with "
                "others. Call unfuse_qkv_projections() first."
            )


def _krona_layers(model: nn.Module) -> dict[str, KronALayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, KronALayer)}


def _patch_copies(module: ModuleType) -> None:
    """Models that are made from the weights of another one, by the names in its state dict."""
    for owner in _classes_of(module):
        for name in ("from_unet", "from_transformer", "from_unet2d"):
            if name in owner.__dict__:
                _wrap(owner, name, _copying)


def _copying(original: Callable) -> Callable:
    def copy_of(cls, *args, **kwargs):
        models = [value for value in (*args, *kwargs.values()) if isinstance(value, nn.Module)]
        with _without_adapters(models, f"{cls.__name__}.{original.__name__}"):
            return original(cls, *args, **kwargs)

    return copy_of


@contextmanager
def _without_adapters(models: list[nn.Module], where: str) -> Iterator[None]:
    """The models with base layers in the places of adapted ones, whose weights have other names."""
    replaced: list[tuple[nn.Module, str, KronALayer]] = []
    left: set[str] = set()
    for model in models:
        for parent in list(model.modules()):
            if isinstance(parent, BaseTunerLayer):
                continue
            for name, child in parent._modules.items():
                if isinstance(child, KronALayer):
                    replaced.append((parent, name, child))
                    left |= set(child.krona_A) - set(child.merged_adapters)
    if left:
        logger.warning(
            "%s takes the base model's weights; the adapters %s are not in the new model. Load them there with "
            "load_krona_weights, or merge them first.",
            where,
            sorted(left),
        )
    try:
        for parent, name, child in replaced:
            parent._modules[name] = child.get_base_layer()
        yield
    finally:
        for parent, name, child in replaced:
            parent._modules[name] = child


_BY_MODULE: dict[str, Callable[[ModuleType], None]] = {
    "diffusers.utils.state_dict_utils": _patch_state_dict_utils,
    "diffusers.loaders.lora_base": _patch_lora_base,
    "diffusers.loaders.lora_pipeline": _patch_lora_pipelines,
    "diffusers.loaders.peft": _patch_adapter_mixin,
    "diffusers.loaders.unet": _patch_attn_procs,
}

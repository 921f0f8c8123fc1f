# SPDX-License-Identifier: Apache-2.0
"""A model's layers without its weights: on the meta device, from the model, its class, or the config in its folder."""

from __future__ import annotations

import copy
import importlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from peft import PeftMixedModel, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .errors import ConfigError, FormatError
from .sources import DENOISERS, find_configs

INDEX, CONFIG = "model_index.json", "config.json"
Source = nn.Module | type | str | os.PathLike


def skeleton(source: Source, component: str | None = None) -> tuple[str, nn.Module]:
    """(what it was built from, in words; the model on the meta device). `source` itself is left alone.

    Args:
        source: a model; a model class, or the name of one of diffusers' ("FluxTransformer2DModel"), which gets its
            default configuration; the folder of a pipeline or of one model, or its config.json; an id on the Hub, of
            which only the configs are read.
        component: which part of a pipeline; None is its denoiser.

    Raises:
        FormatError: if there is no such folder, or no config of a model in it.
        ConfigError: if there is no such class, or it needs a configuration.
    """
    if isinstance(source, nn.Module):
        return type(source).__name__, _without_weights(source)
    if isinstance(source, type):
        return _of_class(source)
    if not isinstance(source, (str, os.PathLike)):
        raise ConfigError(
            f"Expected a model, a model class or its name, or the folder of a model or pipeline, got {source!r}."
        )
    path = Path(source)
    if path.exists():
        return _of_path(path, component)
    name = str(source)
    if name.isidentifier() or (os.sep not in name and all(part.isidentifier() for part in name.split("."))):
        return _of_class(_class_named(name))
    return _of_path(find_configs(name), component)


def _without_weights(model: nn.Module) -> nn.Module:
    """A copy whose parameters and buffers are on the meta device, without adapters and bitsandbytes' quantization."""
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    elif isinstance(model, PeftMixedModel):
        model = model.base_model.model
    model = getattr(model, "_orig_mod", model)
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
    copied = copy.deepcopy(model, memo)
    for name, module in list(copied.named_modules()):
        plain = _plain(module)
        if name and plain is not module:
            parent, _, last = name.rpartition(".")
            setattr(copied.get_submodule(parent), last, plain)
    for attribute in ("peft_config", "hf_quantizer"):
        if hasattr(copied, attribute):
            delattr(copied, attribute)
    return copied


def _plain(module: nn.Module) -> nn.Module:
    """What a module was before it was adapted or quantized."""
    if isinstance(module, BaseTunerLayer):
        return _plain(module.get_base_layer())
    if isinstance(module, AuxiliaryTrainingWrapper):
        return module.original_module
    if isinstance(module, nn.Linear) and type(module).__module__.partition(".")[0] == "bitsandbytes":
        return nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
    return module


def _class_named(name: str) -> type:
    if "." in name:
        module, _, attribute = name.rpartition(".")
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"There is no class {name}: {error}.") from error
    import diffusers

    cls = getattr(diffusers, name, None)
    if not isinstance(cls, type):
        raise ConfigError(
            f"{name} is no folder here, and no class of diffusers {diffusers.__version__}. Pass a model's folder, its "
            "config.json, the name of a class of diffusers, or package.module.Class of another one."
        )
    return cls


def _of_class(cls: type) -> tuple[str, nn.Module]:
    try:
        with torch.device("meta"):
            model = cls()
    except TypeError as error:
        raise ConfigError(
            f"{cls.__name__} needs a configuration: {error}. Pass the folder of a model of this class, or a model."
        ) from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{cls.__name__} is no model (torch.nn.Module).")
    return f"{cls.__name__} in its default configuration", model


def _of_path(path: Path, component: str | None) -> tuple[str, nn.Module]:
    if path.is_file():
        return _of_config(path)
    if (path / INDEX).is_file():
        parts = sorted(entry.parent.name for entry in path.glob(f"*/{CONFIG}"))
        name = component or next((part for part in DENOISERS if part in parts), None)
        if name not in parts:
            wanted = f"component={component!r}" if component else f"a denoiser ({', '.join(DENOISERS)})"
            raise FormatError(f"{path}: expected {wanted}; it has {', '.join(parts) or 'no models'}.")
        return _of_config(path / name / CONFIG)
    if component is not None and (path / component / CONFIG).is_file():
        return _of_config(path / component / CONFIG)
    if component is not None:
        raise FormatError(f"{path}: component={component!r} is for a pipeline's folder (with {INDEX}); this is none.")
    if not (path / CONFIG).is_file():
        raise FormatError(f"{path}: expected the folder of a pipeline ({INDEX}) or of a model ({CONFIG}).")
    return _of_config(path / CONFIG)


def _of_config(path: Path) -> tuple[str, nn.Module]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FormatError(f"{path}: not JSON ({error}).") from error
    if not isinstance(config, dict) or not isinstance(config.get("_class_name", config.get("model_type")), str):
        raise FormatError(f"{path}: not the config of a model: it has neither _class_name (diffusers) nor model_type.")
    try:
        model = _of_diffusers(config) if "_class_name" in config else _of_transformers(path)
    except (TypeError, ValueError, KeyError) as error:
        if isinstance(error, ConfigError):
            raise
        raise FormatError(f"{path}: no model can be built from it: {error}") from error
    return f"{type(model).__name__} of {path.parent}", model


def _of_diffusers(config: dict[str, Any]) -> nn.Module:
    import diffusers

    found = getattr(diffusers, config["_class_name"], None)  # no other package: a config may come from anywhere
    if not isinstance(found, type) or not issubclass(found, nn.Module):
        raise ValueError(f"diffusers {diffusers.__version__} has no model {config['_class_name']}")
    cls: Any = found
    with torch.device("meta"):
        return cls.from_config(config)


def _of_transformers(path: Path) -> nn.Module:
    import transformers

    config = transformers.AutoConfig.from_pretrained(path.parent)
    names = config.architectures or []
    cls = next((found for name in names if (found := getattr(transformers, name, None))), None)
    with torch.device("meta"):
        return transformers.AutoModel.from_config(config) if cls is None else cls(config)

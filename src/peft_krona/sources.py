# SPDX-License-Identifier: Apache-2.0
"""Where a pipeline's adapter comes from: a folder, a file, a repository on the Hub, or a state dict.

All of them become {component name: (config, state dict)}. Read here is what KronA itself wrote, with its settings as
they were; what other tools wrote goes through `convert`. KronA writes PEFT folders; diffusers' `save_lora_weights` and
`save_lora_adapter` write one file with the config in its header.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, PeftType
from safetensors import SafetensorError, safe_open

from .config import PEFT_PREFIX, KronAConfig
from .convert.formats.krona import config_from_json
from .convert.names import guess_component
from .convert.read import saved_components
from .convert.safetensors_io import read_safetensors
from .errors import FormatError
from .state_dict import remember_settings, settings_of

DENOISERS = ("unet", "transformer", "transformer_2", "prior")
LORA_FILE = "pytorch_lora_weights.safetensors"  # diffusers' default name
_COMPILED = "_orig_mod."
_MARK = ".krona_"

StateDict = dict[str, torch.Tensor]
Components = dict[str, tuple[KronAConfig, StateDict]]


def plain_keys(state_dict: Mapping[str, torch.Tensor]) -> StateDict:
    """The state dict under the plain model's names: without PEFT's prefix and that of a compiled model."""
    return {key.removeprefix(PEFT_PREFIX).replace(_COMPILED, ""): tensor for key, tensor in state_dict.items()}


def has_krona_keys(state_dict: Any) -> bool:
    """Whether these are the weights of a KronA adapter."""
    return isinstance(state_dict, Mapping) and any(isinstance(key, str) and _MARK in f".{key}" for key in state_dict)


def is_hub_id(source: str) -> bool:
    """Whether it is written as the id of a repository on the Hub is: user/name."""
    return source.count("/") == 1 and not source.startswith((".", "/", "~")) and not source.endswith("/")


# -- finding it --------------------------------------------------------------------------------------------------------


def find(source: str, weight_name: str | None = None, subfolder: str | None = None, **hub: Any) -> Path:
    """A local file or folder for `source`, from the Hub (or its cache) if it is not on disk.

    Args:
        source: path, or id of a repository on the Hub. weight_name: a file in it. subfolder: a folder in it.
        hub: `revision`, `token`, `cache_dir`, ..., as huggingface_hub's `snapshot_download` takes them.

    Raises:
        FormatError: if there is nothing, or no adapter, or the Hub can't be reached and the cache has nothing.
    """
    inside = "/".join(part for part in (subfolder, weight_name) if part)
    path = Path(source)
    if path.exists():
        found = path / inside if inside else path
        if not found.exists():
            raise FormatError(f"{path} holds no {inside}.")
        return found
    if not is_hub_id(source):
        raise FormatError(f"{source} does not exist, and is no id of a repository on the Hugging Face Hub (user/name).")
    if weight_name:
        found = _snapshot(source, [inside], **hub) / inside
        if found.is_file():
            return found
    else:
        below = f"{subfolder}/" if subfolder else ""
        folder = _snapshot(source, [f"{below}*{CONFIG_NAME}", f"{below}*{SAFETENSORS_WEIGHTS_NAME}"], **hub) / below
        if any(folder.rglob(CONFIG_NAME)):
            return folder
        folder = _snapshot(source, [f"{below}*.safetensors"], ignore_patterns=[f"{below}*/*"], **hub) / below
        files = list(folder.glob("*.safetensors"))
        if files:
            return files[0] if len(files) == 1 else folder
    expected = inside if weight_name else f"adapter: expected {CONFIG_NAME} or a .safetensors file"
    raise FormatError(f"The repository {source} holds no {expected}{_offline_hint()}.")


def find_configs(source: str, **hub: Any) -> Path:
    """A folder with the configs, and no weights, of a model or pipeline on the Hub (or in its cache).

    Raises:
        FormatError: if `source` is no id of a repository, or the Hub can't be reached and the cache has nothing.
    """
    if not is_hub_id(source):
        raise FormatError(f"{source} does not exist, and is no id of a repository on the Hugging Face Hub (user/name).")
    return _snapshot(source, ["model_index.json", "config.json", "*/config.json"], **hub)


def _snapshot(source: str, patterns: list[str], **options: Any) -> Path:
    try:
        try:
            return Path(snapshot_download(source, allow_patterns=patterns, **options))
        except OfflineModeIsEnabled:  # huggingface_hub 1.33 asks for the list of files of a commit that it has
            return Path(snapshot_download(source, allow_patterns=patterns, **{**options, "local_files_only": True}))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise FormatError(
            f"{source} is not on disk, and not in the cache of the Hugging Face Hub, which cannot be reached"
            f"{_offline_hint()}. Download it once with a connection, or give the path of its folder."
        ) from error
    except (HfHubHTTPError, HFValidationError) as error:
        raise FormatError(f"{source} cannot be read from the Hugging Face Hub: {str(error).splitlines()[0]}") from error


def _offline_hint() -> str:
    from huggingface_hub.constants import HF_HUB_OFFLINE

    return " (HF_HUB_OFFLINE is set)" if HF_HUB_OFFLINE else ""


# -- what KronA wrote --------------------------------------------------------------------------------------------------


def read_own(
    path: Path, models: Collection[str], config: KronAConfig | None = None, *, needs_settings: bool = True
) -> Components | None:
    """The components of a folder or file that holds KronA weights; None if it holds something else.

    Args:
        path: a folder or file. models: names of the pipeline's models.
        config: the settings, for a file that was saved without. needs_settings: whether that is an error.

    Raises:
        FormatError: names the file and what is missing or wrong in it.
    """
    if path.name == SAFETENSORS_WEIGHTS_NAME and (path.parent / CONFIG_NAME).is_file():
        path = path.parent
    if path.is_dir():
        components = saved_components(path)
        if components is not None:
            return _of_a_folder(components, path, models)
        if (path / CONFIG_NAME).is_file():
            return None
        files = sorted(path.glob("*.safetensors"))
        default = [file for file in files if file.name in (LORA_FILE, SAFETENSORS_WEIGHTS_NAME)]
        files = default or files
        if len(files) != 1:
            return None
        path = files[0]
    if not holds_krona_keys(path):
        return None
    tensors, metadata = read_safetensors(path)
    stored = _stored_settings(metadata, path)
    return from_state_dict(tensors, models, stored, config, needs_settings=needs_settings, where=str(path))


def read_krona(path: Path, models: Collection[str], *, needs_settings: bool = True) -> Components:
    """`read_own` where `is_krona_source` has said that KronA weights are there.

    Raises:
        FormatError: also if the folder has several files of them, and none has the usual name.
    """
    components = read_own(path, models, needs_settings=needs_settings)
    if components is None:
        files = [file.name for file in sorted(path.glob("*.safetensors"))]
        raise FormatError(f"{path} has several files of KronA weights, {files}; pass weight_name= with one of them.")
    return components


def _of_a_folder(components: Components, path: Path, models: Collection[str]) -> Components:
    found = {}
    for name, (config, state_dict) in components.items():
        state_dict = plain_keys(state_dict)
        remember_settings(state_dict, config)
        found[_component(state_dict, models) if (path / CONFIG_NAME).is_file() else name] = config, state_dict
    return found


def _component(state_dict: Mapping[str, torch.Tensor], models: Collection[str]) -> str:
    """The component that a single model's weights belong to, by its layers' names."""
    name = guess_component(state_dict)
    if name in models:
        return name
    return next((denoiser for denoiser in DENOISERS if denoiser in models), name)  # only usual names can be guessed


def from_state_dict(
    state_dict: Mapping[str, torch.Tensor],
    models: Collection[str],
    stored: Mapping[str, Any] | None = None,
    config: KronAConfig | None = None,
    *,
    needs_settings: bool = True,
    where: str = "The state dict",
) -> Components:
    """The components of KronA weights whose keys start with the component's name, or that are of a single model.

    Args:
        state_dict: {key: factor}. models: names of the pipeline's models.
        stored: settings as diffusers keeps them, with the component's name before each, or of a single model.
        config: the settings where none are stored and the tensors do not come straight from a model.
        needs_settings: whether it is an error if there are none; else the config is KronA's default.

    Raises:
        FormatError: if there are no settings, or keys of something else among them.
    """
    state_dict, stored = plain_keys(state_dict), stored or {}
    starts = {key.partition(".")[0] for key in state_dict}
    known = {name for name in starts if name in models or name in DENOISERS or name.startswith("text_encoder")}
    if known and known != starts:
        example = next(key for key in state_dict if key.partition(".")[0] not in known)
        raise FormatError(f"{where} has weights of {sorted(known)}, and the key {example!r}, which is of none of them.")
    if not known:
        settings = _settings(state_dict, stored, config, needs_settings, where)
        return {_component(state_dict, models): (settings, state_dict)}
    components = {}
    for name in sorted(known):
        own = {key.removeprefix(f"{name}."): value for key, value in stored.items() if key.startswith(f"{name}.")}
        weights = {k.removeprefix(f"{name}."): t for k, t in state_dict.items() if k.startswith(f"{name}.")}
        components[name] = _settings(weights, own, config, needs_settings, where), weights
    return components


def _settings(
    weights: StateDict, stored: Mapping[str, Any], config: KronAConfig | None, needed: bool, where: str
) -> KronAConfig:
    if stored:
        if stored.get("peft_type") != PeftType["KRONA"].value:
            raise FormatError(f"{where} has KronA weights, but its settings are of {stored.get('peft_type')!r}.")
        found = config_from_json(stored)
        found.inference_mode = True
        remember_settings(weights, found)
        return found
    config = config or settings_of(weights)
    if config is None and not needed:
        return KronAConfig()
    if config is None:
        raise FormatError(
            f"{where} has KronA weights but no settings, without which scale and layout are unknown. Pass those it was "
            "trained with: load_krona_weights(pipe, source, config=KronAConfig(...))."
        )
    return copy.deepcopy(config)


def _stored_settings(metadata: Mapping[str, str], where: Path) -> dict[str, Any]:
    """What diffusers' save_lora_weights and save_lora_adapter put into a file's header."""
    try:
        stored = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: the header's lora_adapter_metadata is not JSON: {error}.") from error
    if not isinstance(stored, dict):
        raise FormatError(f"{where}: the header's lora_adapter_metadata is not a table.")
    return stored


def holds_krona_keys(path: Path) -> bool:
    """Whether a safetensors file has KronA weights; only its header is read."""
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return any(_MARK in key for key in file.keys())
    except SafetensorError:  # damaged: whoever reads it says so
        return False


def is_krona_source(source: Any, weight_name: str | None = None, subfolder: str | None = None) -> bool:
    """Whether a local folder or file, or a state dict, holds a KronA adapter."""
    if isinstance(source, Mapping):
        return has_krona_keys(source)
    if not isinstance(source, (str, os.PathLike)):
        return False
    path = Path(source, *(part for part in (subfolder, weight_name) if part))
    if not path.is_dir():
        return holds_krona_keys(path)
    configs = [path / CONFIG_NAME] if (path / CONFIG_NAME).is_file() else sorted(path.glob(f"*/{CONFIG_NAME}"))
    if configs:
        return any(is_krona_config(file) for file in configs)
    files = [path / LORA_FILE] if (path / LORA_FILE).is_file() else sorted(path.glob("*.safetensors"))
    return bool(files) and all(holds_krona_keys(file) for file in files)


def is_krona_config(config_file: Path) -> bool:
    """Whether an adapter_config.json is a KronA adapter's; one that cannot be read is nobody's."""
    try:
        found = json.loads(config_file.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        return False
    return isinstance(found, dict) and found.get("peft_type") == PeftType["KRONA"].value

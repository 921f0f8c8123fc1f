# SPDX-License-Identifier: Apache-2.0
"""`read_adapter`: any file or folder of a known format, told apart by its content."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..errors import FormatError, KronAError
from .adapter import Adapter
from .diffusekrona import from_diffusekrona, looks_like_lora
from .files import read_safetensors
from .lokr import from_lokr
from .lora import from_lora
from .names import UNetNames
from .peft import from_peft

# Endings by which a file's keys give its format away. "down" is DiffuseKronA or diffusers' first LoRA format.
_MARKS = {
    "krona": (".krona_A", ".krona_B"),
    "lokr": (".lokr_w1", ".lokr_w1_a", ".lokr_w1_b", ".lokr_w2", ".lokr_w2_a", ".lokr_w2_b", ".lokr_t2"),
    "loha": (".hada_w1_a", ".hada_w1_b", ".hada_w2_a", ".hada_w2_b"),
    "lora": (".lora_down.weight", ".lora_up.weight", ".lora_A.weight", ".lora_B.weight"),
    "down": (".down.weight", ".up.weight"),
    "diff": (".diff",),
}
_FREE_ENDINGS = (".alpha", ".dora_scale", ".lora_mid.weight")
_SINGLE_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")


def read_adapter(path: str | os.PathLike, base: UNetNames | None = None) -> Adapter:
    """Read an adapter of any supported format, told by its content.

    Supported are PEFT folders (KronA, LoKr, LoRA) of one model or of a pipeline's parts, released DiffuseKronA
    checkpoints, LoKr and LoRA files, and folders that hold one of these files.

    Args:
        path: a file or a folder.
        base: the model's kind (`names.BASES`), needed only for LoKr files that store 1 x 1 convolutions as matrices.

    Returns:
        The adapter; `Adapter.peft_components()` makes configs and state dicts of it.

    Raises:
        FormatError: names file, key and reason.
        FileNotFoundError: if there is nothing at `path`.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file or folder.")
    if path.is_dir():
        return _read_folder(path, base)
    if path.name == "adapter_model.safetensors" and (path.parent / "adapter_config.json").is_file():
        return _read_peft_folder(path.parent, None)
    tensors, metadata = read_safetensors(path)
    with _naming(path):
        return from_tensors(tensors, metadata, base)


def _read_folder(path: Path, base: UNetNames | None) -> Adapter:
    if (path / "adapter_config.json").is_file():
        return _read_peft_folder(path, None)
    parts = sorted(part.parent for part in path.glob("*/adapter_config.json"))
    if parts:
        adapters = [_read_peft_folder(part, part.name) for part in parts]
        layers = tuple(layer for adapter in adapters for layer in adapter)
        metadata = {key: value for adapter in adapters for key, value in adapter.metadata.items()}
        return Adapter(layers, source=adapters[0].source, metadata=metadata)
    files = [path / name for name in _SINGLE_FILES if (path / name).is_file()] or sorted(path.glob("*.safetensors"))
    if len(files) == 1:
        return read_adapter(files[0], base)
    found = ", ".join(file.name for file in files) or "no safetensors file"
    raise FormatError(
        f"{path}: expected an adapter_config.json here or one folder deeper, or one safetensors file; found {found}. "
        "Name the file itself."
    )


def _read_peft_folder(path: Path, component: str | None) -> Adapter:
    weights = path / "adapter_model.safetensors"
    if not weights.is_file():
        beside = ", ".join(sorted(p.name for p in path.glob("adapter_model*"))) or "nothing of that kind"
        raise FormatError(
            f"{path}: there is an adapter_config.json but no adapter_model.safetensors ({beside}). Pickled weights "
            "(.bin) are not opened; save the adapter again with safe_serialization=True."
        )
    config_file = path / "adapter_config.json"
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise FormatError(f"{config_file}: not valid JSON: {error}.") from error
    if not isinstance(config, dict):
        raise FormatError(f"{config_file}: expected a JSON object, got {type(config).__name__}.")
    tensors, metadata = read_safetensors(weights)
    with _naming(path):
        adapter = from_peft(config, tensors, component)
    return replace(adapter, metadata={**_known_metadata(metadata), **adapter.metadata})


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Put the file's name before the messages of the readers, which only see tensors."""
    try:
        yield
    except KronAError as error:
        raise type(error)(f"{path}: {error}") from error


def from_tensors(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None, base: UNetNames | None = None
) -> Adapter:
    """The adapter in a file's tensors, whichever supported format that is; see `read_adapter`."""
    metadata = metadata or {}
    kind = detect(tensors)
    config = _stored_config(metadata)
    if config:
        adapter = _from_stored_config(tensors, config)
    elif kind == "krona":
        raise FormatError(
            "The file has KronA weights but no config, without which layout and scale are unknown. Read the folder "
            "with adapter_config.json, not the weights alone."
        )
    elif kind == "lokr":
        adapter = from_lokr(tensors, metadata, base)
    elif kind == "lora":
        adapter = from_lora(tensors)
    else:
        adapter = from_diffusekrona(tensors)
    return replace(adapter, metadata={**_known_metadata(metadata), **adapter.metadata})


def detect(tensors: Mapping[str, torch.Tensor]) -> str:
    """Which of "krona", "lokr", "lora" and "diffusekrona" a file's keys and shapes belong to.

    Raises:
        FormatError: for mixed and foreign files (with an example of a key), and formats that KronA cannot hold.
    """
    found: dict[str, str] = {}
    for key in tensors:
        kind = next((kind for kind, endings in _MARKS.items() if key.endswith(endings)), None)
        if kind is not None:
            found.setdefault(kind, key)
        elif not key.endswith(_FREE_ENDINGS):
            raise FormatError(f"The key '{key}' is of no adapter format that is known here. Is this a full model?")
    if len(found) > 1:
        examples = " and ".join(f"{kind} ('{key}')" for kind, key in found.items())
        raise FormatError(
            f"The file mixes {examples}. Split it: a file of two formats is read by no tool in the same way."
        )
    if not found:
        raise FormatError("The file has no adapter weights.")
    kind = next(iter(found))
    if kind in ("loha", "diff"):
        raise FormatError(
            f"This is a {kind} file ('{found[kind]}'), which in general is no sum of few Kronecker products. Use "
            "nearest_kronecker (or `extract` on two checkpoints) for the best approximation of given factor sizes."
        )
    if kind != "down":
        return kind
    pairs = {key: tensor for key, tensor in tensors.items() if not key.endswith(_FREE_ENDINGS)}
    return "lora" if len(pairs) < len(tensors) or looks_like_lora(pairs) else "diffusekrona"


def _stored_config(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The PEFT config that diffusers' save_lora_adapter and save_lora_weights put into the metadata; {} if none."""
    try:
        config = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except (json.JSONDecodeError, RecursionError) as error:
        raise FormatError(f"The metadata's lora_adapter_metadata is not JSON: {error}.") from error
    if not isinstance(config, dict):
        raise FormatError("The metadata's lora_adapter_metadata is not a table.")
    return config


def _from_stored_config(tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> Adapter:
    """One model's weights, or those of a pipeline's parts with their names as prefixes of keys and config entries."""
    if "peft_type" in config:
        return from_peft(config, tensors)
    components = dict.fromkeys(key.split(".")[0] for key in tensors)
    adapters = [from_peft(_under(name, config), _under(name, tensors), name) for name in components]
    return Adapter(tuple(layer for adapter in adapters for layer in adapter), source=adapters[0].source)


def _under(component: str, table: Mapping[str, Any]) -> dict[str, Any]:
    prefix = f"{component}."
    return {key.removeprefix(prefix): value for key, value in table.items() if key.startswith(prefix)}


def _known_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """What is passed on of a file's metadata: the base model and the trigger words."""
    sources = {
        "base_model": ("base_model", "ss_sd_model_name"),
        "trigger_words": ("trigger_words", "modelspec.trigger_phrase"),
    }
    found = {name: next((metadata[key] for key in keys if metadata.get(key)), "") for name, keys in sources.items()}
    return {name: value for name, value in found.items() if value}

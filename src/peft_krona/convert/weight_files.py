# SPDX-License-Identifier: Apache-2.0
"""Which safetensors files of a base model's folder hold its weights, where there are variants such as "fp16"."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from ..errors import FormatError

# "model.safetensors", "model.fp16.safetensors", and shards "model.fp16-00001-of-00002.safetensors"
_FILE = re.compile(r"^(?P<stem>[^.]+?)(?:\.(?P<variant>[^.]+?))?(?:-\d{5}-of-\d{5})?\.safetensors$")


def variant_of(folder: str | os.PathLike) -> str | None:
    """The variant ("fp16") that some component of a pipeline's folder has weights of and no others; None without one.

    Raises:
        FormatError: if components have only variants of different names, none of which loads the whole pipeline.
    """
    variants = set()
    for component in Path(folder).iterdir():
        found = _by_variant(component) if component.is_dir() else {}
        if found and None not in found:
            variants.add(tuple(sorted(str(name) for name in found)))
    if len(variants) > 1 or any(len(names) > 1 for names in variants):
        names = ", ".join(sorted({name for found in variants for name in found}))
        raise FormatError(
            f"{folder}: its weights are there only as the variants {names}, and which one is meant is not told. Keep "
            "one of them, or save the pipeline once more without a variant."
        )
    return next(iter(variants))[0] if variants else None


def parts_of(folder: str | os.PathLike) -> dict[str, Path]:
    """{component: its folder} of a pipeline's folder, or of the folder of one of its models; empty if there is none.

    Of a single model the folder's name tells which part it is ("unet"), else its config's class, else it is "model".

    Raises:
        FormatError: if a single model's config cannot be read.
    """
    folder = Path(folder)
    config_file = folder / "config.json"
    if not folder.is_dir():
        return {}
    if (folder / "model_index.json").is_file() or not config_file.is_file():
        return {path.name: path for path in sorted(folder.iterdir()) if path.is_dir()}
    name = folder.resolve().name
    if _PART.match(name):
        return {name: folder}
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise FormatError(f"{config_file}: not valid JSON: {error}.") from error
    named = config if isinstance(config, dict) else {}
    cls = str(named.get("_class_name") or next(iter(named.get("architectures") or []), ""))
    return {next((part for end, part in _CLASSES.items() if end in cls), "model"): folder}


_PART = re.compile(r"^(unet|transformer|prior|text_encoder|vae)(_\d+)?$")
_CLASSES = {
    "UNet": "unet",
    "CLIPTextModelWithProjection": "text_encoder_2",
    "CLIPTextModel": "text_encoder",
    "Transformer": "transformer",
}


def weight_files(component: str | os.PathLike, variant: str | None = None) -> list[Path]:
    """The safetensors files from which diffusers loads a component: those of the variant where it has them, else the
    plain ones, else the only ones there are.

    Args:
        component: its folder. variant: that of the whole pipeline, see `variant_of`.

    Raises:
        FormatError: if there are variants only, and several.
    """
    found = _by_variant(Path(component))
    if not found:
        return []
    if variant in found:
        return found[variant]
    if None in found:
        return found[None]
    if len(found) > 1:
        raise FormatError(
            f"{component}: its weights are there as {', '.join(sorted(map(str, found)))}, and which are meant is not "
            "told. Keep one of them."
        )
    return next(iter(found.values()))


def _by_variant(component: Path) -> dict[str | None, list[Path]]:
    files: dict[str | None, list[Path]] = {}
    for path in sorted(component.glob("*.safetensors")):
        match = _FILE.match(path.name)
        files.setdefault(match["variant"] if match else None, []).append(path)
    return files

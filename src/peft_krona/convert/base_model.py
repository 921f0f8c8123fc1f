# SPDX-License-Identifier: Apache-2.0
"""Which kind of Stable Diffusion the base model is: told by an adapter's layers, or by the model's folder."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from ..errors import FormatError
from .record import AdapterFile
from .unet_names import BASES, UNetNames

_BY_CROSS_ATTENTION = {names.cross_attention_dim: kind for kind, names in BASES.items()}
_LATER_BLOCK = re.compile(r"\.transformer_blocks\.[1-9]")


def guess_base(adapter: AdapterFile) -> UNetNames:
    """The kind of Stable Diffusion that an adapter is for, from the sizes and names of its layers.

    Raises:
        FormatError: if neither tells it.
    """
    kinds = _kinds_of_unet(adapter)
    if not kinds and adapter.components == ("text_encoder",):
        hidden = {layer.shape[1] for layer in adapter if layer.module.endswith(("q_proj", "k_proj", "v_proj", "fc1"))}
        kinds = {_BY_CROSS_ATTENTION[size] for size in hidden if size in (768, 1024)}
    if len(kinds) != 1:
        raise FormatError(
            "The adapter's layers do not tell which Stable Diffusion it is for. Say so with base_model: sd15, sd2, "
            "sdxl or the base model's folder."
        )
    return BASES[kinds.pop()]


def check_base(adapter: AdapterFile, name: str) -> None:
    """Refuse a kind of Stable Diffusion (`names.BASES`) that the adapter's layers are not of.

    A first text encoder alone tells nothing: that of SD 1.x and SDXL is the same.

    Raises:
        FormatError: names both kinds.
    """
    kinds = _kinds_of_unet(adapter)
    if kinds and kinds != {name}:
        found = " and ".join(sorted(kinds))
        raise FormatError(
            f"base_model={name}: the adapter's layers have sizes and names of {found}. Give the base model that it was "
            "trained on, or leave base_model out."
        )


def _kinds_of_unet(adapter: AdapterFile) -> set[str]:
    """Kinds that the UNet's layers, or a second text encoder, stand for; empty if they tell nothing."""
    inputs = {
        layer.shape[1]
        for layer in adapter
        if layer.component == "unet" and layer.module.endswith((".attn2.to_k", ".attn2.to_v"))
    }
    kinds = {_BY_CROSS_ATTENTION[size] for size in inputs if size in _BY_CROSS_ATTENTION}
    # Only SDXL has more than one transformer block in an attention.
    deep = any(layer.component == "unet" and _LATER_BLOCK.search(layer.module) for layer in adapter)
    if not kinds and (deep or "text_encoder_2" in adapter.components):
        kinds = {"sdxl"}
    return kinds


def base_of_folder(folder: str | os.PathLike) -> UNetNames | None:
    """The kind of the pipeline in a folder, from its UNet's config; None if it has no UNet.

    Raises:
        FormatError: if the folder is no diffusers pipeline, or its config cannot be read.
    """
    folder = Path(folder)
    if not (folder / "model_index.json").is_file():
        raise FormatError(
            f"{folder}: expected a diffusers pipeline's folder (with model_index.json), or one of {', '.join(BASES)}."
        )
    path = folder / "unet" / "config.json"
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        up_attention = tuple("Attn" in name for name in config["up_block_types"])
        layers_per_block, cross = config["layers_per_block"], config["cross_attention_dim"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise FormatError(f"{path}: not the config of a Stable Diffusion UNet ({error!r}).") from error
    if not isinstance(layers_per_block, int) or not isinstance(cross, int):
        raise FormatError(
            f"{path}: layers_per_block={layers_per_block} and cross_attention_dim={cross} differ between levels; names "
            "are known for UNets where they are one number."
        )
    is_xl = (folder / "text_encoder_2").is_dir() or config.get("addition_embed_type") == "text_time"
    kind = BASES["sdxl" if is_xl else _BY_CROSS_ATTENTION.get(cross, "sd15")]
    return UNetNames(
        style=kind.style,
        version=kind.version,
        architecture=kind.architecture,
        cross_attention_dim=cross,
        linear_projection=bool(config.get("use_linear_projection")),
        up_attention=up_attention,
        two_text_encoders=is_xl,
        layers_per_block=layers_per_block,
    )

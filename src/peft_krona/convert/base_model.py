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
from .weight_files import parts_of

_BY_CROSS_ATTENTION = {names.cross_attention_dim: kind for kind, names in BASES.items()}
_LATER_BLOCK = re.compile(r"\.transformer_blocks\.[1-9]")


def names_need_base(adapter: AdapterFile) -> bool:
    """Whether names in files depend on the base model: for pipelines with a UNet they do, for transformers not."""
    return all(component == "unet" or component.startswith("text_encoder") for component in adapter.components)


def guess_base(adapter: AdapterFile) -> UNetNames:
    """The kind of Stable Diffusion that an adapter is for, from the sizes and names of its layers.

    Raises:
        FormatError: if neither tells it, or a layer is none of that kind's.
    """
    return BASES[guess_base_and_why(adapter, sizes=False)[0]]


def guess_base_and_why(adapter: AdapterFile, sizes: bool = True) -> tuple[str, str]:
    """(key of `BASES`, what tells it in words); see `guess_base`.

    Args:
        sizes: refuse layers whose width is not that of the real model's: a UNet of another size has other names.
    """
    found = _kinds_of_unet(adapter)
    if not found and adapter.components == ("text_encoder",):
        found = {
            _BY_CROSS_ATTENTION[layer.shape[1]]: f"the input size {layer.shape[1]} of {layer.name}"
            for layer in adapter
            if layer.module.endswith(("q_proj", "k_proj", "v_proj", "fc1")) and layer.shape[1] in (768, 1024)
        }
    if len(found) != 1:
        raise FormatError(
            "The adapter's layers do not tell which Stable Diffusion it is for. Say so with base_model: sd15, sd2, "
            "sdxl or the base model's folder."
        )
    ((kind, why),) = found.items()
    _check_layers(adapter, kind, f"The base model, guessed from {why}, would be {kind}, but", sizes)
    return kind, why


def describe_base(names: UNetNames | None) -> str:
    """What a folder's UNet counts as, to be put after the folder's name; empty for pipelines without one."""
    if names is None:
        return ""
    kind = next(kind for kind, known in BASES.items() if known.version == names.version)
    if names.cross_attention_dim == BASES[kind].cross_attention_dim:
        return f": {kind}"
    return (
        f": a UNet of another size (cross_attention_dim={names.cross_attention_dim}) than sd15, sd2 and sdxl, named as "
        f"{kind}'s"
    )


def check_base(adapter: AdapterFile, name: str) -> None:
    """Refuse a kind of Stable Diffusion (`names.BASES`) that the adapter's layers are not of.

    A first text encoder alone tells nothing: that of SD 1.x and SDXL is the same.

    Raises:
        FormatError: names both kinds.
    """
    kinds = set(_kinds_of_unet(adapter))
    if kinds and kinds != {name}:
        found = " and ".join(sorted(kinds))
        raise FormatError(
            f"base_model={name}: the adapter's layers have sizes and names of {found}. Give the base model that it was "
            "trained on, or leave base_model out."
        )
    _check_layers(adapter, name, f"base_model={name}:", sizes=False)


_BLOCK = re.compile(r"^(?:(down|up)_blocks\.(\d+)|mid_block)\.(\w+)\.(\d+)(?:\.transformer_blocks\.(\d+))?")
_SQUARE = re.compile(r"\.(?:proj_in|proj_out|attn[12]\.to_(?:q|k|v|out\.0))$")
# {kind: (transformer blocks in an attention, by level of the down path; in the middle's; width of each level)}
_LEVELS = {
    "sd15": ((1, 1, 1, 0), 1, (320, 640, 1280, 1280)),
    "sd2": ((1, 1, 1, 0), 1, (320, 640, 1280, 1280)),
    "sdxl": ((0, 2, 10), 10, (320, 640, 1280)),
}


def _check_layers(adapter: AdapterFile, kind: str, start: str, sizes: bool) -> None:
    """Refuse blocks that the UNet of this kind does not have.

    Args:
        start: of the message. sizes: whether layers of other widths are refused too.

    Raises:
        FormatError: names the layer.
    """
    for layer in adapter:
        match = _BLOCK.match(layer.module) if layer.component == "unet" else None
        if match is None:
            continue
        depths, middle, widths = _LEVELS[kind]
        path, level, kind_of_block, index, depth = match[1], int(match[2] or 0), match[3], int(match[4]), match[5]
        cure = "Give the folder of the base model that it was trained on as base_model."
        if path is None:
            here, width, resnets = middle, widths[-1], 2
        elif level >= len(depths):
            raise FormatError(
                f"{start} {layer.name} is in block {level}, and it has {len(depths)} blocks there. {cure}"
            )
        else:
            at = level if path == "down" else len(depths) - 1 - level
            here, width, resnets = depths[at], widths[at], 2 if path == "down" else 3
        most = {"resnets": resnets, "attentions": (1 if path is None else resnets) if here else 0}.get(kind_of_block, 1)
        if index >= most:
            raise FormatError(f"{start} of {kind_of_block} it has {most} there, and {layer.name} is another. {cure}")
        if depth is not None and int(depth) >= here:
            raise FormatError(
                f"{start} its attentions there have {here} transformer blocks, and {layer.name} is another. {cure}"
            )
        if sizes and kind_of_block == "attentions" and _SQUARE.search(layer.module) and layer.shape[0] != width:
            raise FormatError(f"{start} {layer.name} has {layer.shape[0]} outputs, and {kind}'s has {width}. {cure}")


def _kinds_of_unet(adapter: AdapterFile) -> dict[str, str]:
    """{kind: what tells it} that the UNet's layers, or a second text encoder, stand for; empty if they tell nothing."""
    kinds: dict[str, str] = {}
    for layer in adapter:
        if layer.component == "unet" and layer.module.endswith((".attn2.to_k", ".attn2.to_v")):
            kind = _BY_CROSS_ATTENTION.get(layer.shape[1])
            if kind is not None:
                kinds.setdefault(kind, f"the input size {layer.shape[1]} of {layer.name}")
    if kinds:
        return kinds
    # Only SDXL has more than one transformer block in an attention.
    deep = next((r.name for r in adapter if r.component == "unet" and _LATER_BLOCK.search(r.module)), None)
    if deep is not None:
        return {"sdxl": f"the number of transformer blocks ({deep})"}
    return {"sdxl": "its second text encoder"} if "text_encoder_2" in adapter.components else {}


def base_of_folder(folder: str | os.PathLike) -> UNetNames | None:
    """The kind of the pipeline in a folder, or of the UNet whose own folder it is; None if it has no UNet.

    Raises:
        FormatError: if the folder is no diffusers pipeline, or its config cannot be read.
    """
    folder = Path(folder)
    single = (folder / "config.json").is_file() and not (folder / "model_index.json").is_file()
    if not single and not (folder / "model_index.json").is_file():
        raise FormatError(
            f"{folder}: expected a diffusers pipeline's folder (with model_index.json), or one of {', '.join(BASES)}."
        )
    path = parts_of(folder).get("unet", folder / "unet") / "config.json"
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        up_attention = tuple("Attn" in name for name in config["up_block_types"])
        layers_per_block, cross = config["layers_per_block"], config["cross_attention_dim"]
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        what = f"it has no {error}" if isinstance(error, KeyError) else "expected a JSON object, found something else"
        raise FormatError(f"{path}: not the config of a Stable Diffusion UNet ({what}).") from error
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

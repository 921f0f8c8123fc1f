# SPDX-License-Identifier: Apache-2.0
"""The weights of one part of a pipeline, also out of a single-file checkpoint in the original code's names."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from ..errors import FormatError
from .file_names import resolve
from .fused import swap_halves
from .safetensors_io import read_weights
from .weight_files import weight_files


def read_component(path: str | os.PathLike, component: str) -> dict[str, torch.Tensor]:
    """The weights of one part of a pipeline, under the names that diffusers and transformers give them.

    Args:
        path: the part's folder, its safetensors file, or a single-file checkpoint of the whole model, original names
            and all. component: "unet", "transformer", "text_encoder", ...

    Raises:
        FormatError: if there are no safetensors files, or the checkpoint has no such part.
    """
    path = Path(path)
    files = weight_files(path) if path.is_dir() else [path]
    if not files:
        raise FormatError(f"{path}: there are no safetensors files in this folder.")
    weights: dict[str, torch.Tensor] = {}
    for file in files:
        weights.update(read_weights(file))
    try:
        return component_of_checkpoint(weights, component)
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from error


# What stands before a part's names in a single-file checkpoint.
_PARTS = {
    "denoiser": re.compile(r"^model\.diffusion_model\."),
    "text_encoder": re.compile(
        r"^(?:cond_stage_model\.(?:transformer|model)|conditioner\.embedders\.0\.(?:transformer|model)"
        r"|text_encoders\.clip_l\.transformer)\."
    ),
    "text_encoder_2": re.compile(r"^(?:conditioner\.embedders\.1\.model|text_encoders\.clip_g\.transformer)\."),
    "vae": re.compile(r"^(?:first_stage_model|vae)\."),
}
_ORIGINAL_DENOISER = re.compile(
    r"^(?:input_blocks|middle_block|output_blocks|double_blocks|single_blocks|joint_blocks)\."
)
_OPEN_CLIP = {
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def component_of_checkpoint(weights: Mapping[str, torch.Tensor], component: str) -> dict[str, torch.Tensor]:
    """`{"<module>.weight": tensor}` of one part of a single-file checkpoint, fused projections taken apart.

    Weights of a single part, in diffusers' names, are returned as they are.

    Raises:
        FormatError: if the checkpoint has parts, and this one is not among them, or a layer has no name in diffusers.
    """
    present = {part for part, pattern in _PARTS.items() if any(pattern.match(key) for key in weights)}
    if not present and not any(_ORIGINAL_DENOISER.match(key) for key in weights):
        return dict(weights)
    part = component if component.startswith("text_encoder") or component == "vae" else "denoiser"
    if present and part not in present:
        raise FormatError(
            f"This is a checkpoint of {', '.join(sorted(present))}; component={component!r} is not in it, or not under "
            "names known here."
        )
    pattern = _PARTS[part] if present else re.compile("")
    own = {pattern.sub("", key, count=1): tensor for key, tensor in weights.items() if pattern.match(key)}
    if part == "denoiser":
        return _denoiser(own, component)
    return own if part == "vae" else _text_encoder(own)


def _denoiser(weights: Mapping[str, torch.Tensor], component: str) -> dict[str, torch.Tensor]:
    matrices = {key.removesuffix(".weight"): t for key, t in weights.items() if key.endswith(".weight") and t.dim() > 1}
    targets = resolve({f"{component}.{name}": tuple(t.shape) for name, t in matrices.items()})
    result = {}
    for name, tensor in matrices.items():
        target = targets[f"{component}.{name}"]
        if target.component != component:
            raise FormatError(f"'{name}' is a layer of a {target.component}, not of component={component!r}.")
        rows = swap_halves(tensor) if target.swapped else tensor
        whole = sum(target.shares)
        sizes = [tensor.shape[0] // whole * share for share in target.shares]
        for module, piece in zip(target.modules, rows.split(sizes), strict=True):
            result[f"{module}.weight"] = piece
    return result


def _text_encoder(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """CLIP's in transformers' names; OpenCLIP's fused q, k and v taken apart."""
    result = {}
    for key, tensor in weights.items():
        match = re.match(r"^transformer\.resblocks\.(\d+)\.(.+)$", key)
        if match is None:
            if key.startswith("text_model."):
                result[key] = tensor
            continue
        stem = f"text_model.encoder.layers.{match[1]}"
        if match[2] == "attn.in_proj_weight":
            for name, piece in zip("qkv", tensor.chunk(3), strict=True):
                result[f"{stem}.self_attn.{name}_proj.weight"] = piece
        elif match[2].removesuffix(".weight") in _OPEN_CLIP:
            result[f"{stem}.{_OPEN_CLIP[match[2].removesuffix('.weight')]}.weight"] = tensor
    return result

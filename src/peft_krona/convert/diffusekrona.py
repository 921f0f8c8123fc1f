# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of the released DiffuseKronA code (`pytorch_lora_weights.safetensors` of its training scripts).

The code stores a layer's two factors as `down`, shape (a_in, a_out), and `up`, shape (b_out, b_in), and computes for a
token x:  X = x.view(a_in, b_in),  Y = up (X^T down),  output Y.view(-1).  In the terms used here that is A = down^T,
B = up, layout "diffusekrona", scale 1. The keys are those of diffusers' first LoRA format.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from ..errors import FormatError
from .adapter import Adapter, KronaLayer
from .names import to_file_name
from .pairs import group_by_layer

# Where a layer's name ends in a key, and what it is called in the model.
_ENDS = (
    (re.compile(r"^(?P<layer>.*\.attn[12]?)\.processor\.(?P<which>to_[qkv])_lora$"), "{layer}.{which}"),
    (re.compile(r"^(?P<layer>.*\.attn[12]?)\.processor\.to_out_lora$"), "{layer}.to_out.0"),
    (re.compile(r"^(?P<layer>.*)\.lora_linear_layer$"), "{layer}"),
    (re.compile(r"^(?P<layer>.*)\.lora_layer$"), "{layer}"),
)
_COMPONENT = re.compile(r"^(?P<component>unet|text_encoder|text_encoder_2)\.(?P<module>.+)$")


def old_diffusers_name(stem: str) -> tuple[str, str] | None:
    """(component, module) of a key's stem in diffusers' first LoRA format, or None if it is not of that format.

    >>> old_diffusers_name("unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora")
    ('unet', 'mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0')
    """
    match = _COMPONENT.match(stem)
    for pattern, name in _ENDS:
        end = pattern.match(match["module"]) if match else None
        if end:
            return match["component"], to_file_name(match["component"], name.format(**end.groupdict()))
    return None


def from_diffusekrona(tensors: Mapping[str, torch.Tensor]) -> Adapter:
    """Read a released DiffuseKronA checkpoint: exact, factors as they are.

    Args:
        tensors: `unet.<path>.attn{1,2}.processor.to_{q,k,v,out}_lora.{down,up}.weight`,
            `text_encoder[_2].text_model....{q,k,v,out}_proj.lora_linear_layer.{down,up}.weight`, and
            `unet....ff.net.{0.proj,2}.lora_layer.{down,up}.weight`; down (a_in, a_out), up (b_out, b_in).

    Returns:
        An adapter of layout "diffusekrona", scale 1, r = 1.

    Raises:
        FormatError: names the key: of another format, one half missing, not a matrix, an attention's q, k, v and out
            that do not fit each other, or LoRA in place of KronA.

    Source: github.com/IBM/DiffuseKronA (Apache-2.0), `KronALinearLayer`.
    """
    layers = []
    for stem, parts in group_by_layer(tensors, ("down.weight", "up.weight")).items():
        name = old_diffusers_name(stem)
        if name is None:
            raise FormatError(f"'{stem}.down.weight' is not a key of a released DiffuseKronA checkpoint.")
        down, up = parts["down.weight"], parts["up.weight"]
        if down.dim() != 2 or up.dim() != 2:
            raise FormatError(f"'{stem}': expected matrices, got down {tuple(down.shape)} and up {tuple(up.shape)}.")
        layers.append(KronaLayer(*name, down.T.contiguous()[None], up[None], layout="diffusekrona"))
    adapter = Adapter(tuple(layers), source="diffusekrona")
    if looks_like_lora(tensors):
        raise FormatError(
            "Every down and up of this file share a rank, down (rank, in) and up (out, rank): this is LoRA, not KronA. "
            "Read it with from_lora."
        )
    _check_attention_sizes(adapter)
    return adapter


def looks_like_lora(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether each down (rank, in) of a file in diffusers' first format shares its rank with its up (out, rank).

    For KronA down is (a_in, a_out) and up (b_out, b_in), so that a_in = b_in would have to hold for every layer: the
    layers' inputs would all be squares, as in no UNet.
    """
    groups = group_by_layer(tensors, ("down.weight", "up.weight")).values()
    return all(parts["down.weight"].shape[:1] == parts["up.weight"].shape[1:2] for parts in groups)


def _check_attention_sizes(adapter: Adapter) -> None:
    """q, k, v and out of one attention have sizes that belong together; a damaged file's mostly have not."""
    blocks: dict[str, dict[str, KronaLayer]] = {}
    for layer in adapter:
        block, _, last = layer.name.removesuffix(".0").rpartition(".")
        blocks.setdefault(block, {})[last.removeprefix("to_").removesuffix("_proj")] = layer
    for block, layers in blocks.items():
        sides = {"inner": {}, "outer": {}, "context": {}}
        for which, layer in layers.items():
            if which in ("q", "k", "v"):
                sides["inner"][which] = layer.shape[0]
                sides["outer" if which == "q" else "context"][which] = layer.shape[1]
            elif which == "out":
                sides["outer"][which], sides["inner"][which] = layer.shape
        for side, sizes in sides.items():
            if len(set(sizes.values())) > 1:
                raise FormatError(
                    f"{block}: the {side} sizes of one attention differ, {sizes}. The file is damaged, or not a "
                    "DiffuseKronA checkpoint."
                )

# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion's UNets: which there are, their layers' names in the original code, and in files for them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import FormatError
from .names import flatten, to_file_name


@dataclass(frozen=True)
class UNetNames:
    """What of a UNet's architecture its LDM names depend on.

    Attributes:
        style: "diffusers" or "ldm": the names that other tools expect in files for this model.
        version: `ss_base_model_version`. architecture: `modelspec.architecture`.
        cross_attention_dim: input size of attn2.to_k, by which a model is recognised.
        linear_projection: proj_in and proj_out of the attention blocks are Linear, not 1 x 1 convolutions.
        up_attention: whether each level of the up path has attention (its upsampler comes after it).
        two_text_encoders: the first one's layers are `lora_te1_...` then, else `lora_te_...`.
        layers_per_block: resnets in a level of the down path (one more in the up path).
    """

    style: str
    version: str
    architecture: str
    cross_attention_dim: int
    linear_projection: bool
    up_attention: tuple[bool, ...]
    two_text_encoders: bool = False
    layers_per_block: int = 2


_SD_UP_ATTENTION = (False, True, True, True)
BASES = {
    "sd15": UNetNames("diffusers", "sd_v1", "stable-diffusion-v1", 768, False, _SD_UP_ATTENTION),
    "sd2": UNetNames("diffusers", "sd_v2", "stable-diffusion-v2-512", 1024, True, _SD_UP_ATTENTION),
    "sdxl": UNetNames(
        "ldm", "sdxl_base_v1-0", "stable-diffusion-xl-v1-base", 2048, True, (True, True, False), two_text_encoders=True
    ),
}

_RESNET_LDM = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_TOP_LDM = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_RESNET_DIFFUSERS = {ldm: name for name, ldm in _RESNET_LDM.items()}
_TOP_DIFFUSERS = {ldm: name for name, ldm in _TOP_LDM.items()}
# Layers outside the blocks: {name in diffusers or in the original code: diffusers' name}
TOP_NAMES = {
    **_TOP_DIFFUSERS,
    **{name: name for name in (*_TOP_LDM, "class_embedding.linear_1", "class_embedding.linear_2", "encoder_hid_proj")},
}
_BLOCK = re.compile(
    r"^(?:(?P<path>down|up)_blocks\.(?P<level>\d+)|mid_block)"
    r"\.(?P<kind>resnets|attentions|downsamplers|upsamplers)\.(?P<index>\d+)\.(?P<rest>.+)$"
)
_LDM_BLOCK = re.compile(
    r"^(?:(?P<path>input|output)_blocks\.(?P<block>\d+)|middle_block)\.(?P<slot>\d+)\.(?P<rest>.+)$"
)


# What diffusers' UNets (of images and of videos, with the parts that adapters add to them) have outside of their
# blocks, and in them; in an attention, its transformer blocks come at once.
_TOPS = re.compile(
    r"^(?:conv_in|conv_out|conv_norm_out|time_proj|time_embedding|class_embedding|add_time_proj|add_embedding"
    r"|encoder_hid_proj|position_net|transformer_in)(?:\.|$)"
)
_IN_BLOCKS = re.compile(
    r"^(?:(?:down|up)_blocks\.\d+|mid_block)"
    r"\.(?:resnets|attentions|downsamplers|upsamplers|motion_modules|temp_attentions|temp_convs)\.\d+"
    r"\.(?:transformer_blocks\.\d+\.|(?!.*transformer_blocks\.)).+$"
)


def is_unet_layer(module: str) -> bool:
    """Whether a dotted name is built as those of diffusers' UNets are.

    >>> [is_unet_layer(f"{start}mid_block.attentions.0.proj_in") for start in ("", "foo.")]
    [True, False]
    """
    return bool(_TOPS.match(module) or _IN_BLOCKS.match(module))


def diffusers_to_ldm(module: str, base: UNetNames) -> str:
    """A UNet layer's name in the original (LDM, for SDXL: SGM) code.

    Raises:
        FormatError: if the layer is none of a Stable Diffusion UNet.

    >>> diffusers_to_ldm("up_blocks.0.upsamplers.0.conv", BASES["sdxl"])
    'output_blocks.2.2.conv'
    """
    if module in _TOP_LDM:
        return _TOP_LDM[module]
    match = _BLOCK.match(module)
    if match is None:
        raise FormatError(f"unet.{module}: this layer has no name in the original Stable Diffusion UNet.")
    kind, index, rest = match["kind"], int(match["index"]), match["rest"]
    if kind == "resnets":
        if rest not in _RESNET_LDM:
            raise FormatError(f"unet.{module}: this layer has no name in the original Stable Diffusion UNet.")
        rest = _RESNET_LDM[rest]
    if match["path"] is None:
        return f"middle_block.{2 * index if kind == 'resnets' else 1}.{rest}"
    level, per_level = int(match["level"]), base.layers_per_block + 1
    slot = {"resnets": 0, "attentions": 1, "downsamplers": 0, "upsamplers": 1}[kind]
    if match["path"] == "down":
        if kind == "downsamplers":
            return f"input_blocks.{per_level * (level + 1)}.0.op"
        return f"input_blocks.{1 + per_level * level + index}.{slot}.{rest}"
    if kind == "upsamplers":
        return f"output_blocks.{per_level * (level + 1) - 1}.{2 if base.up_attention[level] else 1}.{rest}"
    return f"output_blocks.{per_level * level + index}.{slot}.{rest}"


def ldm_to_diffusers(module: str, layers_per_block: int = 2) -> str:
    """The inverse of `diffusers_to_ldm`; needs no architecture but the number of resnets in a level.

    Raises:
        FormatError: if the name is not one of a Stable Diffusion UNet.

    >>> ldm_to_diffusers("input_blocks.4.1.transformer_blocks.0.attn1.to_q")
    'down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q'
    """
    if module in _TOP_DIFFUSERS:
        return _TOP_DIFFUSERS[module]
    match = _LDM_BLOCK.match(module)
    unknown = FormatError(f"{module}: not a layer of the original Stable Diffusion UNet.")
    if match is None:
        raise unknown
    slot, rest, per_level = int(match["slot"]), match["rest"], layers_per_block + 1
    if match["path"] is None:
        block, is_attention = "mid_block", slot == 1
        index = 0 if is_attention else slot // 2
        if slot > 2:
            raise unknown
    elif match["path"] == "input":
        level, index = divmod(int(match["block"]) - 1, per_level)
        if level < 0:
            raise unknown
        block, is_attention = f"down_blocks.{level}", slot == 1
        if index == layers_per_block:
            if (slot, rest) != (0, "op"):
                raise unknown
            return f"{block}.downsamplers.0.conv"
        if slot > 1:
            raise unknown
    else:
        level, index = divmod(int(match["block"]), per_level)
        block, is_attention = f"up_blocks.{level}", slot == 1
        if slot in (1, 2) and rest == "conv" and index == layers_per_block:
            return f"{block}.upsamplers.0.conv"
        if slot > 1:
            raise unknown
    if is_attention:
        return f"{block}.attentions.{index}.{rest}"
    if rest not in _RESNET_DIFFUSERS:
        raise unknown
    return f"{block}.resnets.{index}.{_RESNET_DIFFUSERS[rest]}"


_KERNEL_3X3 = re.compile(r"(^|\.)(conv_in|conv_out|resnets\.\d+\.conv[12]|(down|up)samplers\.0\.conv)$")
_KERNEL_1X1 = re.compile(r"(^|\.)resnets\.\d+\.conv_shortcut$")


def kernel_of(component: str, module: str, base: UNetNames | None) -> tuple[int, ...]:
    """Kernel of a UNet layer, told from its name, for files that store a convolution's factor as a matrix.

    >>> kernel_of("unet", "down_blocks.0.resnets.0.conv1", None), kernel_of("unet", "mid_block.attentions.0.to_q", None)
    ((3, 3), ())
    """
    if component != "unet":
        return ()
    if _KERNEL_3X3.search(module):
        return (3, 3)
    is_projection = re.search(r"attentions\.\d+\.proj_(in|out)$", module)
    if _KERNEL_1X1.search(module) or (is_projection and base is not None and not base.linear_projection):
        return (1, 1)
    return ()


def to_kohya_name(component: str, module: str, base: UNetNames) -> str:
    """The flat name that ComfyUI, A1111 and kohya's tools expect in a file for this model.

    Raises:
        FormatError: if the component has no such name.

    >>> to_kohya_name("unet", "mid_block.attentions.0.proj_in", BASES["sdxl"])
    'lora_unet_middle_block_1_proj_in'
    """
    prefixes = {
        "unet": "lora_unet_",
        "text_encoder": "lora_te1_" if base.two_text_encoders else "lora_te_",
        "text_encoder_2": "lora_te2_",
    }
    if component not in prefixes:
        raise FormatError(
            f"{component}.{module}: files of this kind hold a UNet and its text encoders. For a transformer "
            "use to='lora' or to='peft'."
        )
    if component == "unet" and base.style == "ldm":
        module = diffusers_to_ldm(module, base)
    elif component == "unet" and not is_unet_layer(module):
        raise FormatError(
            f"unet.{module}: this is no layer of a UNet, as far as its name tells, so no tool would find it."
        )
    return prefixes[component] + flatten(to_file_name(component, module))

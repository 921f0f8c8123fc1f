# SPDX-License-Identifier: Apache-2.0
"""Names of layers: in PEFT, in files of kohya's kind (flattened, diffusers or LDM style), and of text encoders.

The names that this package uses inside are diffusers' dotted ones, and for CLIP text encoders `text_model.encoder...`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import lru_cache

import transformers

from ..errors import FormatError

# -- text encoders -----------------------------------------------------------------------------------------------------

_CLIP_LAYER = re.compile(r"^(text_model\.)?(encoder\.layers\..*|embeddings\..*|final_layer_norm)$")
_CLIP_DROPS_TEXT_MODEL = int(transformers.__version__.split(".")[0]) >= 5


def to_file_name(component: str, module: str) -> str:
    """Put back the `text_model.` that transformers 5 dropped from the module names of CLIPTextModel.

    >>> to_file_name("text_encoder", "encoder.layers.0.mlp.fc1"), to_file_name("unet", "conv_in")
    ('text_model.encoder.layers.0.mlp.fc1', 'conv_in')
    """
    match = _CLIP_LAYER.match(module) if component.startswith("text_encoder") else None
    return f"text_model.{match[2]}" if match else module


def to_module_name(component: str, module: str, known: Collection[str] | None = None) -> str:
    """The module name that the model itself uses; the inverse of `to_file_name`.

    Args:
        known: the model's module names. Without them: transformers >= 5 drops `text_model.` in the first text encoder
            (CLIPTextModel) and keeps it in the second (CLIPTextModelWithProjection).
    """
    match = _CLIP_LAYER.match(module) if component.startswith("text_encoder") else None
    if match is None:
        return module
    if known is not None:
        return match[2] if match[2] in known else f"text_model.{match[2]}"
    return match[2] if _CLIP_DROPS_TEXT_MODEL and component == "text_encoder" else f"text_model.{match[2]}"


def is_embedding(module: str) -> bool:
    """Whether a layer's name is that of a text encoder's embedding table, which no exchange format holds."""
    return module.endswith(("token_embedding", "position_embedding", "embed_tokens"))


# -- diffusers' first LoRA format, which the released DiffuseKronA code has too --------------------------------------

# Where a layer's name ends in a key, and what it is called in the model.
_OLD_ENDS = (
    (re.compile(r"^(?P<layer>.*\.attn[12]?)\.processor\.(?P<which>to_[qkv])_lora$"), "{layer}.{which}"),
    (re.compile(r"^(?P<layer>.*\.attn[12]?)\.processor\.to_out_lora$"), "{layer}.to_out.0"),
    (re.compile(r"^(?P<layer>.*)\.lora_linear_layer$"), "{layer}"),
    (re.compile(r"^(?P<layer>.*)\.lora_layer$"), "{layer}"),
)
_OLD_COMPONENT = re.compile(r"^(?P<component>unet|text_encoder|text_encoder_2)\.(?P<module>.+)$")


def old_diffusers_name(stem: str) -> tuple[str, str] | None:
    """(component, module) of a key's stem in diffusers' first LoRA format, or None if it is not of that format.

    >>> old_diffusers_name("unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora")
    ('unet', 'mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0')
    """
    match = _OLD_COMPONENT.match(stem)
    for pattern, name in _OLD_ENDS:
        end = pattern.match(match["module"]) if match else None
        if end:
            return match["component"], to_file_name(match["component"], name.format(**end.groupdict()))
    return None


# -- kohya's names: one flat word -------------------------------------------------------------------------------------

# Prefix -> component. The longer ones are tried first. `lora_te1_` also occurs in files for SD 1.x.
KOHYA_PREFIXES = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
    "lora_transformer_": "transformer",
    "lycoris_": "unet",
}

# Words with an underscore inside, or a dot before them: everything that a flat name is cut into, with the integers.
_WORDS = """
down_blocks mid_block up_blocks attentions resnets downsamplers upsamplers transformer_blocks attn1 attn2 attn ff net
to_q to_k to_v to_out proj_in proj_out proj conv conv1 conv2 conv_in conv_out conv_norm_out conv_shortcut norm norm1
norm2 norm3 group_norm time_emb_proj time_embedding add_embedding class_embedding linear linear_1 linear_2 time_proj
cond_proj motion_modules
text_model text_projection encoder layers self_attn q_proj k_proj v_proj out_proj mlp fc1 fc2 layer_norm1 layer_norm2
embeddings token_embedding position_embedding final_layer_norm
block layer SelfAttention DenseReluDense q k v o wi wi_0 wi_1 wo
single_transformer_blocks ff_context norm1_context norm2_context norm_out x_embedder context_embedder time_text_embed
timestep_embedder guidance_embedder text_embedder add_q_proj add_k_proj add_v_proj to_add_out to_qkv proj_mlp pos_embed
linear_in linear_out caption_projection adaln_single emb img_mod txt_mod img_mlp txt_mlp img_in txt_in
in_layers out_layers emb_layers skip_connection op input_blocks middle_block output_blocks time_embed label_emb out
""".split()
_WORD = re.compile(rf"(?:{'|'.join(sorted(set(_WORDS), key=len, reverse=True))}|\d+)(?=_|$)")


def flatten(module: str) -> str:
    """`down_blocks.0.attn` -> `down_blocks_0_attn`."""
    return module.replace(".", "_")


@lru_cache(maxsize=65536)
def unflatten(flat: str) -> str | None:
    """The dotted name of a flat one, or None if it is not made of the words known here.

    >>> unflatten("down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0")
    'down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0'
    """
    parts, position = [], 0
    while position < len(flat):
        match = _WORD.match(flat, position)
        if match is None:
            return None
        parts.append(match[0])
        position = match.end() + 1
    return ".".join(parts) if parts and not flat.endswith("_") else None


# -- LDM / SGM names of the UNet ---------------------------------------------------------------------------------------


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
_BLOCK = re.compile(
    r"^(?:(?P<path>down|up)_blocks\.(?P<level>\d+)|mid_block)"
    r"\.(?P<kind>resnets|attentions|downsamplers|upsamplers)\.(?P<index>\d+)\.(?P<rest>.+)$"
)
_LDM_BLOCK = re.compile(
    r"^(?:(?P<path>input|output)_blocks\.(?P<block>\d+)|middle_block)\.(?P<slot>\d+)\.(?P<rest>.+)$"
)


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


# -- both together -----------------------------------------------------------------------------------------------------

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


def from_kohya_name(name: str) -> tuple[str, str]:
    """(component, module) of a file's flat layer name, such as `lora_unet_mid_block_attentions_0_proj_in`.

    Raises:
        FormatError: says which part of the name is not known.
    """
    for prefix in sorted(KOHYA_PREFIXES, key=len, reverse=True):
        if name.startswith(prefix):
            component, flat = KOHYA_PREFIXES[prefix], name[len(prefix) :]
            break
    else:
        raise FormatError(
            f"The layer name '{name}' has none of the known prefixes {', '.join(KOHYA_PREFIXES)} "
            "nor the dotted form 'unet.<module>'."
        )
    if component == "unet" and flat.startswith(("transformer_blocks_", "single_transformer_blocks_")):
        component = "transformer"
    module = unflatten(flat)
    if module is None:
        raise FormatError(f"The layer name '{name}' is not one of a model known here: '{flat}' cannot be read.")
    if component == "unet" and module.startswith(("input_blocks.", "middle_block.", "output_blocks.", *_TOP_DIFFUSERS)):
        module = ldm_to_diffusers(module)
    return component, to_file_name(component, module)


_DOTTED = re.compile(
    r"^(?P<component>unet|transformer|transformer_2|prior|text_encoder(?:_\d)?|text_encoders)\.(?P<module>.+)$"
)


def from_name(name: str) -> tuple[str, str]:
    """(component, module) of a layer name in a file: kohya's flat, `unet.<module>`, or `diffusion_model.<LDM>`.

    Raises:
        FormatError: if it is none of these.

    >>> from_name("lora_te1_text_model_encoder_layers_0_mlp_fc1")
    ('text_encoder', 'text_model.encoder.layers.0.mlp.fc1')
    """
    if name.startswith("diffusion_model."):
        module = name.removeprefix("diffusion_model.")
        if module.startswith(("input_blocks.", "middle_block.", "output_blocks.", *_TOP_DIFFUSERS)):
            return "unet", ldm_to_diffusers(module)
        raise FormatError(
            f"{name}: names of the original code are read for Stable Diffusion UNets only; save with diffusers' names."
        )
    match = _DOTTED.match(name)
    if match:
        return match["component"], to_file_name(match["component"], match["module"])
    if "." not in name:
        return from_kohya_name(name)
    raise FormatError(f"The layer name '{name}' does not begin with a component such as 'unet.' or 'lora_unet_'.")


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
    return prefixes[component] + flatten(to_file_name(component, module))


def guess_component(modules: Iterable[str]) -> str:
    """The pipeline's part that a bare model's layer names belong to ("model" if none is recognised).

    >>> guess_component(["transformer_blocks.0.attn.to_q"])
    'transformer'
    """
    modules = list(modules)
    for component, starts in (
        ("unet", ("down_blocks.", "up_blocks.", "mid_block.", "time_embedding.", "add_embedding.")),
        ("transformer", ("transformer_blocks.", "single_transformer_blocks.", "double_blocks.", "single_blocks.")),
        ("text_encoder", ("text_model.encoder.", "encoder.layers.")),
    ):
        if any(module.startswith(starts) for module in modules):
            return component
    return "model"

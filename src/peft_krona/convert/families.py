# SPDX-License-Identifier: Apache-2.0
"""Transformer families: their layers' names in diffusers and in the original code, as data.

A row is `original -> diffusers`, N a number. Several names on the right are the parts of a fused layer, top to bottom;
`name*4` is a part of four times the others' size; `~name` has its two halves swapped (scale and shift). `[7:1]` limits
a row to layers with out : in = 7 : 1, where families share a name. Rows without an arrow have one name in both.

Sources: diffusers 0.42.1, `loaders/single_file_utils.py` and `loaders/lora_conversion_utils.py` (Apache-2.0); tests
compare both with this table.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache

from ..errors import FormatError
from .names import flatten, to_file_name

_TEXT_AND_TIME = """
    {t}.timestep_embedder.linear_1
    {t}.timestep_embedder.linear_2
"""
_QKV = "{b}.to_q {b}.to_k {b}.to_v"
_ADDED = "{b}.add_q_proj {b}.add_k_proj {b}.add_v_proj"
_JOINT = f"""
    transformer_blocks.N.attn.to_q
    transformer_blocks.N.attn.to_k
    transformer_blocks.N.attn.to_v
    transformer_blocks.N.attn.to_out.0
    transformer_blocks.N.attn.add_q_proj
    transformer_blocks.N.attn.add_k_proj
    transformer_blocks.N.attn.add_v_proj
    transformer_blocks.N.attn.to_add_out
    transformer_blocks.N.attn.to_qkv -> {_QKV.format(b="transformer_blocks.N.attn")}
    transformer_blocks.N.attn.to_added_qkv -> {_ADDED.format(b="transformer_blocks.N.attn")}
"""
_GELU = """
    {b}.net.0.proj
    {b}.net.2
"""
_DOUBLE = f"""
    double_blocks.N.img_attn.qkv -> {_QKV.format(b="transformer_blocks.N.attn")}
    double_blocks.N.txt_attn.qkv -> {_ADDED.format(b="transformer_blocks.N.attn")}
    double_blocks.N.img_attn.proj -> transformer_blocks.N.attn.to_out.0
    double_blocks.N.txt_attn.proj -> transformer_blocks.N.attn.to_add_out
    img_in -> x_embedder
    txt_in -> context_embedder
    final_layer.linear -> proj_out
    final_layer.adaLN_modulation.1 -> ~norm_out.linear
"""

_FLUX = f"""
    x_embedder
    context_embedder
    {_TEXT_AND_TIME.format(t="time_text_embed")}
    time_text_embed.text_embedder.linear_1
    time_text_embed.text_embedder.linear_2
    time_text_embed.guidance_embedder.linear_1
    time_text_embed.guidance_embedder.linear_2
    transformer_blocks.N.norm1.linear
    transformer_blocks.N.norm1_context.linear
    {_JOINT}
    {_GELU.format(b="transformer_blocks.N.ff")}
    {_GELU.format(b="transformer_blocks.N.ff_context")}
    single_transformer_blocks.N.norm.linear
    single_transformer_blocks.N.proj_mlp
    single_transformer_blocks.N.proj_out
    single_transformer_blocks.N.attn.to_q
    single_transformer_blocks.N.attn.to_k
    single_transformer_blocks.N.attn.to_v
    norm_out.linear
    proj_out
    {_DOUBLE}
    time_in.in_layer -> time_text_embed.timestep_embedder.linear_1
    time_in.out_layer -> time_text_embed.timestep_embedder.linear_2
    vector_in.in_layer -> time_text_embed.text_embedder.linear_1
    vector_in.out_layer -> time_text_embed.text_embedder.linear_2
    guidance_in.in_layer -> time_text_embed.guidance_embedder.linear_1
    guidance_in.out_layer -> time_text_embed.guidance_embedder.linear_2
    double_blocks.N.img_mod.lin -> transformer_blocks.N.norm1.linear
    double_blocks.N.txt_mod.lin -> transformer_blocks.N.norm1_context.linear
    double_blocks.N.img_mlp.0 [4:1] -> transformer_blocks.N.ff.net.0.proj
    double_blocks.N.img_mlp.2 [1:4] -> transformer_blocks.N.ff.net.2
    double_blocks.N.txt_mlp.0 [4:1] -> transformer_blocks.N.ff_context.net.0.proj
    double_blocks.N.txt_mlp.2 [1:4] -> transformer_blocks.N.ff_context.net.2
    single_blocks.N.modulation.lin -> single_transformer_blocks.N.norm.linear
    single_blocks.N.linear1 [7:1] -> {_QKV.format(b="single_transformer_blocks.N.attn")} \
single_transformer_blocks.N.proj_mlp*4
    single_blocks.N.linear2 [1:5] -> single_transformer_blocks.N.proj_out
"""
_FLUX2 = f"""
    x_embedder
    context_embedder
    {_TEXT_AND_TIME.format(t="time_guidance_embed")}
    time_guidance_embed.guidance_embedder.linear_1
    time_guidance_embed.guidance_embedder.linear_2
    double_stream_modulation_img.linear
    double_stream_modulation_txt.linear
    single_stream_modulation.linear
    {_JOINT}
    transformer_blocks.N.ff.linear_in
    transformer_blocks.N.ff.linear_out
    transformer_blocks.N.ff_context.linear_in
    transformer_blocks.N.ff_context.linear_out
    single_transformer_blocks.N.attn.to_qkv_mlp_proj
    single_transformer_blocks.N.attn.to_out
    norm_out.linear
    proj_out
    {_DOUBLE}
    time_in.in_layer -> time_guidance_embed.timestep_embedder.linear_1
    time_in.out_layer -> time_guidance_embed.timestep_embedder.linear_2
    guidance_in.in_layer -> time_guidance_embed.guidance_embedder.linear_1
    guidance_in.out_layer -> time_guidance_embed.guidance_embedder.linear_2
    double_stream_modulation_img.lin -> double_stream_modulation_img.linear
    double_stream_modulation_txt.lin -> double_stream_modulation_txt.linear
    single_stream_modulation.lin -> single_stream_modulation.linear
    double_blocks.N.img_mlp.0 [6:1] -> transformer_blocks.N.ff.linear_in
    double_blocks.N.img_mlp.2 [1:3] -> transformer_blocks.N.ff.linear_out
    double_blocks.N.txt_mlp.0 [6:1] -> transformer_blocks.N.ff_context.linear_in
    double_blocks.N.txt_mlp.2 [1:3] -> transformer_blocks.N.ff_context.linear_out
    single_blocks.N.linear1 [9:1] -> single_transformer_blocks.N.attn.to_qkv_mlp_proj
    single_blocks.N.linear2 [1:4] -> single_transformer_blocks.N.attn.to_out
"""
_QWEN = f"""
    img_in
    txt_in
    {_TEXT_AND_TIME.format(t="time_text_embed")}
    transformer_blocks.N.img_mod.1
    transformer_blocks.N.txt_mod.1
    {_JOINT}
    {_GELU.format(b="transformer_blocks.N.img_mlp")}
    {_GELU.format(b="transformer_blocks.N.txt_mlp")}
    norm_out.linear
    proj_out
"""
_SD3 = f"""
    pos_embed.proj
    context_embedder
    {_TEXT_AND_TIME.format(t="time_text_embed")}
    time_text_embed.text_embedder.linear_1
    time_text_embed.text_embedder.linear_2
    transformer_blocks.N.norm1.linear
    transformer_blocks.N.norm1_context.linear
    {_JOINT}
    transformer_blocks.N.attn2.to_q
    transformer_blocks.N.attn2.to_k
    transformer_blocks.N.attn2.to_v
    transformer_blocks.N.attn2.to_out.0
    {_GELU.format(b="transformer_blocks.N.ff")}
    {_GELU.format(b="transformer_blocks.N.ff_context")}
    norm_out.linear
    proj_out
    x_embedder.proj -> pos_embed.proj
    t_embedder.mlp.0 -> time_text_embed.timestep_embedder.linear_1
    t_embedder.mlp.2 -> time_text_embed.timestep_embedder.linear_2
    y_embedder.mlp.0 -> time_text_embed.text_embedder.linear_1
    y_embedder.mlp.2 -> time_text_embed.text_embedder.linear_2
    final_layer.linear -> proj_out
    final_layer.adaLN_modulation.1 -> ~norm_out.linear
    joint_blocks.N.x_block.adaLN_modulation.1 -> transformer_blocks.N.norm1.linear
    joint_blocks.N.context_block.adaLN_modulation.1 [6:1] -> transformer_blocks.N.norm1_context.linear
    joint_blocks.N.context_block.adaLN_modulation.1 [2:1] -> ~transformer_blocks.N.norm1_context.linear
    joint_blocks.N.x_block.attn.qkv -> {_QKV.format(b="transformer_blocks.N.attn")}
    joint_blocks.N.context_block.attn.qkv -> {_ADDED.format(b="transformer_blocks.N.attn")}
    joint_blocks.N.x_block.attn2.qkv -> {_QKV.format(b="transformer_blocks.N.attn2")}
    joint_blocks.N.x_block.attn.proj -> transformer_blocks.N.attn.to_out.0
    joint_blocks.N.context_block.attn.proj -> transformer_blocks.N.attn.to_add_out
    joint_blocks.N.x_block.attn2.proj -> transformer_blocks.N.attn2.to_out.0
    joint_blocks.N.x_block.mlp.fc1 -> transformer_blocks.N.ff.net.0.proj
    joint_blocks.N.x_block.mlp.fc2 -> transformer_blocks.N.ff.net.2
    joint_blocks.N.context_block.mlp.fc1 -> transformer_blocks.N.ff_context.net.0.proj
    joint_blocks.N.context_block.mlp.fc2 -> transformer_blocks.N.ff_context.net.2
"""
_Z_BLOCK = """
    {b}.N.attention.to_q
    {b}.N.attention.to_k
    {b}.N.attention.to_v
    {b}.N.attention.to_out.0
    {b}.N.feed_forward.w1
    {b}.N.feed_forward.w2
    {b}.N.feed_forward.w3
    {b}.N.adaLN_modulation.0
    {b}.N.attention.qkv -> {b}.N.attention.to_q {b}.N.attention.to_k {b}.N.attention.to_v
    {b}.N.attention.to_qkv -> {b}.N.attention.to_q {b}.N.attention.to_k {b}.N.attention.to_v
    {b}.N.attention.out -> {b}.N.attention.to_out.0
"""
_Z_IMAGE = f"""
    all_x_embedder.2-1
    all_final_layer.2-1.linear
    all_final_layer.2-1.adaLN_modulation.1
    t_embedder.mlp.0
    t_embedder.mlp.2
    cap_embedder.1
    x_embedder -> all_x_embedder.2-1
    final_layer.linear -> all_final_layer.2-1.linear
    final_layer.adaLN_modulation.1 -> all_final_layer.2-1.adaLN_modulation.1
    {_Z_BLOCK.format(b="layers")}
    {_Z_BLOCK.format(b="noise_refiner")}
    {_Z_BLOCK.format(b="context_refiner")}
"""
_K_BLOCK = """
    {d}.N.attn.to_q
    {d}.N.attn.to_k
    {d}.N.attn.to_v
    {d}.N.attn.to_gate
    {d}.N.attn.to_out.0
    {d}.N.ff.gate
    {d}.N.ff.up
    {d}.N.ff.down
    {o}.N.attn.wq -> {d}.N.attn.to_q
    {o}.N.attn.wk -> {d}.N.attn.to_k
    {o}.N.attn.wv -> {d}.N.attn.to_v
    {o}.N.attn.gate -> {d}.N.attn.to_gate
    {o}.N.attn.wo -> {d}.N.attn.to_out.0
    {o}.N.mlp.gate -> {d}.N.ff.gate
    {o}.N.mlp.up -> {d}.N.ff.up
    {o}.N.mlp.down -> {d}.N.ff.down
"""
_KREA2 = f"""
    img_in
    time_embed.linear_1
    time_embed.linear_2
    time_mod_proj
    txt_in.linear_1
    txt_in.linear_2
    text_fusion.projector
    final_layer.linear
    first -> img_in
    last.linear -> final_layer.linear
    tmlp.0 -> time_embed.linear_1
    tmlp.2 -> time_embed.linear_2
    tproj.1 -> time_mod_proj
    txtmlp.1 -> txt_in.linear_1
    txtmlp.3 -> txt_in.linear_2
    txtfusion.projector -> text_fusion.projector
    {_K_BLOCK.format(d="transformer_blocks", o="blocks")}
    {_K_BLOCK.format(d="text_fusion.layerwise_blocks", o="txtfusion.layerwise_blocks")}
    {_K_BLOCK.format(d="text_fusion.refiner_blocks", o="txtfusion.refiner_blocks")}
"""

# Name -> (diffusers' class, the table)
_TABLES = {
    "flux": ("FluxTransformer2DModel", _FLUX),
    "flux2": ("Flux2Transformer2DModel", _FLUX2),
    "qwen-image": ("QwenImageTransformer2DModel", _QWEN),
    "sd3": ("SD3Transformer2DModel", _SD3),
    "z-image": ("ZImageTransformer2DModel", _Z_IMAGE),
    "krea2": ("Krea2Transformer2DModel", _KREA2),
}


@dataclass(frozen=True)
class Target:
    """What a layer of a file is in the model: one layer, or the parts of a fused one.

    Attributes:
        component, modules: the parts from top to bottom. shares: their sizes relative to each other.
        swapped: whether the two halves of its rows stand the other way round.
    """

    component: str
    modules: tuple[str, ...]
    shares: tuple[int, ...] = (1,)
    swapped: bool = False


@dataclass(frozen=True)
class Row:
    """One line of a family's table."""

    pattern: re.Pattern[str]
    flat_pattern: re.Pattern[str]
    modules: tuple[str, ...]
    shares: tuple[int, ...]
    swapped: bool
    ratio: tuple[int, int] | None
    is_own: bool  # the name on the left is diffusers' own

    def target(self, name: str, shape: tuple[int, ...] | None) -> Target | None:
        """The target of a dotted or flat name with this row's pattern; None if it has another, or another shape."""
        match = self.pattern.match(name) or self.flat_pattern.match(name)
        if match is None:
            return None
        if self.ratio is not None and shape is not None and shape[0] * self.ratio[1] != shape[1] * self.ratio[0]:
            return None
        modules = tuple(re.sub(r"(?<=\.)N(?=\.)", match[1] if match.re.groups else "", m) for m in self.modules)
        return Target("transformer", modules, self.shares, self.swapped)


@dataclass(frozen=True)
class Family:
    """A family's name, diffusers' class of its transformer, and its rows."""

    name: str
    model_class: str
    rows: tuple[Row, ...]

    def target(self, name: str, shape: tuple[int, ...] | None = None) -> Target | None:
        """What the layer called `name` (dotted or flat, diffusers' or the original code's) is, None if it has none."""
        found = (row.target(name, shape) for row in self.rows)
        return next((target for target in found if target is not None), None)

    def has(self, name: str) -> bool:
        """Whether diffusers' class has a layer of this dotted or flat name."""
        return any(row.is_own and row.target(name, None) is not None for row in self.rows)


def _row(line: str) -> Row:
    left, _, right = line.partition("->")
    match = re.match(r"(\S+)\s*(?:\[(\d+):(\d+)\])?\s*$", left.strip())
    assert match is not None, line
    parts = (right or match[1]).split()
    names = [part.removeprefix("~").partition("*") for part in parts]
    pattern = re.escape(match[1]).replace(r"\.N\.", r"\.(\d+)\.")
    return Row(
        pattern=re.compile(f"^{pattern}$"),
        flat_pattern=re.compile(f"^{pattern.replace(chr(92) + '.', '_')}$"),
        modules=tuple(name for name, _, _ in names),
        shares=tuple(int(size or 1) for _, _, size in names),
        swapped=parts[0].startswith("~"),
        ratio=(int(match[2]), int(match[3])) if match[2] else None,
        is_own=not right,
    )


def family_of(modules: Collection[str]) -> Family | None:
    """The first family whose transformer has layers of all these names; several share their attention's.

    >>> family_of(["transformer_blocks.0.attn.to_q", "transformer_blocks.0.ff.linear_in"]).name
    'flux2'
    """
    return next((family for family in families().values() if all(map(family.has, modules))), None)


def to_lycoris_name(component: str, module: str) -> str:
    """The flat name under which ComfyUI reads LoKr, LoHa and the like for a layer of a pipeline with a transformer.

    It has rows `lycoris_<diffusers' name>` for the families here, and puts split q, k and v into its fused weight.

    Raises:
        FormatError: if the component has no such name.

    >>> to_lycoris_name("transformer", "transformer_blocks.0.attn.to_out.0")
    'lycoris_transformer_blocks_0_attn_to_out_0'
    """
    prefixes = {
        "transformer": "lycoris_",
        "text_encoder": "lora_te1_",
        "text_encoder_2": "lora_te2_",
        "text_encoder_3": "lora_te3_",
    }
    if component not in prefixes:
        raise FormatError(
            f"{component}.{module}: files of this kind hold a transformer and its text encoders. Use to='lora' or "
            "to='peft'."
        )
    return prefixes[component] + flatten(to_file_name(component, module))


@cache
def families() -> Mapping[str, Family]:
    """The families by name."""
    return {
        name: Family(name, model, tuple(_row(line) for line in table.splitlines() if line.strip()))
        for name, (model, table) in _TABLES.items()
    }

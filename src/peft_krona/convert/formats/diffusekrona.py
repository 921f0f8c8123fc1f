# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of the released DiffuseKronA code (`pytorch_lora_weights.safetensors` of its training scripts).

The code stores a layer's two factors as `down`, shape (a_in, a_out), and `up`, shape (b_out, b_in), and computes for a
token x:  X = x.view(a_in, b_in),  Y = up (X^T down),  output Y.view(-1).  In the terms used here that is A = down^T,
B = up, layout "diffusekrona", scale 1. The keys are those of diffusers' first LoRA format.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...errors import FormatError
from ..file_names import is_old_diffusers_name
from ..groups import complete
from ..record import LayerUpdate
from .format import Factors, Format, Parts

_ENDINGS = ("down.weight", "up.weight")


def _read(name: str, parts: Parts, metadata: Mapping[str, str]) -> Factors:
    """Exact, factors as they are: layout "diffusekrona", scale 1, r = 1.

    Raises:
        FormatError: names the key: of another format, one half missing, not a matrix.

    Source: github.com/IBM/DiffuseKronA (Apache-2.0), `KronALinearLayer`.
    """
    if not is_old_diffusers_name(name):
        raise FormatError(f"'{name}.down.weight' is not a key of a released DiffuseKronA checkpoint.")
    down, up = complete(name, parts, _ENDINGS)
    if down.dim() != 2 or up.dim() != 2:
        raise FormatError(f"'{name}': expected matrices, got down {tuple(down.shape)} and up {tuple(up.shape)}.")
    return Factors(down.T.contiguous()[None], up[None], layout="diffusekrona")


def _claims(groups: Mapping[str, Parts]) -> bool:
    """LoRA in diffusers' first format has the same keys. It may have alphas or layers of another kind beside it."""
    return all(parts.keys() <= set(_ENDINGS) for parts in groups.values()) and not looks_like_lora(groups)


def looks_like_lora(groups: Mapping[str, Parts]) -> bool:
    """Whether each down (rank, in) of a file in diffusers' first format shares its rank with its up (out, rank).

    For KronA down is (a_in, a_out) and up (b_out, b_in), so that a_in = b_in would have to hold for every layer: the
    layers' inputs would all be squares, as in no UNet.
    """
    pairs = [complete(name, parts, _ENDINGS) for name, parts in groups.items()]
    return all(down.shape[:1] == up.shape[1:2] for down, up in pairs)


def _check_attention_sizes(layers: Sequence[LayerUpdate]) -> None:
    """q, k, v and out of one attention have sizes that belong together; a damaged file's mostly have not."""
    blocks: dict[str, dict[str, LayerUpdate]] = {}
    for layer in layers:
        block, _, last = layer.name.removesuffix(".0").rpartition(".")
        blocks.setdefault(block, {})[last.removeprefix("to_").removesuffix("_proj")] = layer
    for block, members in blocks.items():
        sides: dict[str, dict[str, int]] = {"inner": {}, "outer": {}, "context": {}}
        for which, layer in members.items():
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


DIFFUSEKRONA = Format(
    name="diffusekrona",
    endings=_ENDINGS,
    read=_read,
    claims=_claims,
    check=_check_attention_sizes,
)

# SPDX-License-Identifier: Apache-2.0
"""LoRA files: kohya's (`lora_unet_....lora_down.weight`), diffusers' and PEFT's (`lora_A`, `lora.down`, `_lora.down`).

Out: a Kronecker product of rank-a and rank-b factors is a LoRA of rank a * b, in closed form from the SVDs of the two
small factors: A = U_A V_A, B = U_B V_B, so kron(A, B) = kron(U_A, U_B) kron(V_A, V_B).
In: a LoRA of rank r is KronA with r terms, a_in = 1 and b_out = 1.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import torch

from ..errors import FormatError
from ..ops import kron_delta_weight
from .adapter import Adapter, KronaLayer, balance
from .diffusekrona import old_diffusers_name
from .lokr import scalar_alpha
from .names import UNetNames, from_name, to_file_name, to_kohya_name
from .pairs import group_by_layer

# (down, up) endings: kohya's, PEFT's, and those of diffusers' older formats (`.lora.down`, `_lora.down`, ...).
_DIALECTS = (
    ("lora_down.weight", "lora_up.weight"),
    ("lora_A.weight", "lora_B.weight"),
    ("down.weight", "up.weight"),
)


def from_lora(tensors: Mapping[str, torch.Tensor]) -> Adapter:
    """Read a LoRA file as KronA: exact, with a_out = out, a_in = 1, b_out = 1, b_in = in and r = rank.

    Args:
        tensors: keys of kohya's, diffusers' or PEFT's kind; convolutions with their kernel in the down half.
            Without an alpha a layer's scale is 1.

    Raises:
        FormatError: names the layer: a half missing, shapes that do not fit, DoRA, a Tucker core, alpha not positive.
    """
    layers = []
    for stem, down, up, alpha in _pairs(tensors):
        component, module = _name(stem)
        if down.dim() < 2 or down.shape[0] == 0:
            raise FormatError(f"'{stem}': expected down (rank, in, *kernel), got {tuple(down.shape)}.")
        rank = down.shape[0]
        scale = scalar_alpha(stem, alpha, rank) / rank
        layers.append(KronaLayer(component, module, *as_krona_terms(stem, down, up), scale))
    return Adapter(tuple(layers), source="lora")


def _pairs(
    tensors: Mapping[str, torch.Tensor],
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    """(layer, down (rank, in, *kernel), up (out, rank, 1...), alpha) of each layer."""
    for endings in _DIALECTS:
        if any(key.endswith(f".{endings[0]}") for key in tensors):
            break
    else:
        endings = _DIALECTS[0]
    for stem, parts in group_by_layer(tensors, endings, ("alpha", "dora_scale", "lora_mid.weight")).items():
        for extra in ("dora_scale", "lora_mid.weight"):
            if extra in parts:
                raise FormatError(f"'{stem}.{extra}': LoRA with this extra part is no plain low-rank update.")
        yield stem, parts[endings[0]], parts[endings[1]], parts.get("alpha")


def as_krona_terms(name: str, down: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A (rank, out, 1) and B (rank, 1, in, *kernel) of a LoRA pair, down (rank, in, *kernel) and up (out, rank).

    Raises:
        FormatError: names the layer if the pair's shapes do not fit.
    """
    fits = down.dim() >= 2 and up.dim() in (2, down.dim()) and up.shape[1] == down.shape[0] > 0
    if not fits or any(k != 1 for k in up.shape[2:]):
        raise FormatError(
            f"'{name}': expected down (rank, in, *kernel) and up (out, rank), got down {tuple(down.shape)} and up "
            f"{tuple(up.shape)}."
        )
    rank = down.shape[0]
    return up.reshape(-1, rank).T.reshape(rank, -1, 1).contiguous(), down[:, None].contiguous()


def _name(stem: str) -> tuple[str, str]:
    return old_diffusers_name(stem) or from_name(stem.removesuffix(".lora").replace(".processor.", "."))


def low_rank(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """U (m, rank) and V (rank, n) in float64 with U V = matrix to half a unit of fp32 rounding, rank as small as that
    allows (but at least 1); the singular values are shared out evenly.

    >>> U, V = low_rank(torch.ones(4, 3))
    >>> U.shape, V.shape
    (torch.Size([4, 1]), torch.Size([1, 3]))
    """
    U, S, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    tail = S.square().flip(0).cumsum(0).flip(0)  # tail[k]: what is lost with rank k
    rank = max(1, int((tail > (0.5 * torch.finfo(torch.float32).eps) ** 2 * tail[0]).sum()))
    root = S[:rank].sqrt()
    return U[:, :rank] * root, root[:, None] * Vh[:rank]


def lora_rank(layer: KronaLayer) -> int:
    """Rank of the exact LoRA of a layer: the sum over its terms of rank(A_n) * rank(B_n), at most min(out, in)."""
    out, n_in = layer.shape[0], prod(layer.shape[1:])
    ranks = (low_rank(layer.A[n])[0].shape[1] * low_rank(layer.B[n].flatten(1))[0].shape[1] for n in range(layer.r))
    return min(sum(ranks), out, n_in)


def lora_factors(layer: KronaLayer) -> tuple[torch.Tensor, torch.Tensor]:
    """up (out, rank) and down (rank, in * prod(kernel)) in float64, with up @ down = dW flattened.

    Rank is the sum over the terms of rank(A_n) * rank(B_n). Where that is more than min(out, in * prod(kernel)), one of
    the two is dW itself and the other the identity.
    """
    out, n_in = layer.shape[0], prod(layer.shape[1:])
    ups, downs = [], []
    for A, B in zip(layer.A, layer.B, strict=True):
        (left_A, right_A), (left_B, right_B) = low_rank(A), low_rank(B.flatten(1))
        ups.append(kron_delta_weight(left_A[None], left_B[None], layout=layer.layout))  # the layout shuffles rows
        downs.append(kron_delta_weight(right_A[None], right_B[None]))
    up, down = torch.cat(ups, dim=1), torch.cat(downs)
    if up.shape[1] > min(out, n_in):
        dW = layer.delta_weight().reshape(out, n_in)
        identity = torch.eye(min(out, n_in), dtype=torch.float64)
        return balance(*((identity, dW) if out <= n_in else (dW, identity)))
    return balance(up * layer.scale, down)


def to_lora(adapter: Adapter, base: UNetNames, dtype: torch.dtype = torch.float16) -> dict[str, torch.Tensor]:
    """Write as a LoRA file with kohya's names, which every tool reads: exact, closed form.

    All layers have one alpha, the largest rank, and rank / alpha is folded into the factors: diffusers misreads files
    with an alpha per layer.

    Raises:
        FormatError: if a component has no name in such files.
    """
    pairs = [lora_factors(layer) for layer in adapter]
    alpha = max(up.shape[1] for up, _ in pairs)
    tensors = {}
    for layer, (up, down) in zip(adapter, pairs, strict=True):
        name = to_kohya_name(layer.component, layer.module, base)
        share = (up.shape[1] / alpha) ** 0.5
        up, down = _in_layer_shape(layer, up * share, down * share)
        tensors[f"{name}.lora_down.weight"] = down.to(dtype)
        tensors[f"{name}.lora_up.weight"] = up.to(dtype)
        tensors[f"{name}.alpha"] = torch.tensor(float(alpha))
    return tensors


def to_lora_peft(
    adapter: Adapter, dtype: torch.dtype = torch.float16
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Write as a LoRA file with diffusers' names (`transformer.<module>.lora_A.weight`), for Flux, SD3 and the like.

    Returns:
        Tensors, and the metadata in which diffusers looks for ranks and alphas (alpha = rank in every layer).
    """
    tensors: dict[str, torch.Tensor] = {}
    config: dict[str, dict[str, int]] = {}
    for layer in adapter:
        up, down = _in_layer_shape(layer, *lora_factors(layer))
        module = to_file_name(layer.component, layer.module)
        tensors[f"{layer.component}.{module}.lora_A.weight"] = down.to(dtype)
        tensors[f"{layer.component}.{module}.lora_B.weight"] = up.to(dtype)
        config.setdefault(layer.component, {})[module] = down.shape[0]
    flat: dict[str, Any] = {}
    for component, ranks in config.items():
        flat |= {f"{component}.{key}": value for key, value in _lora_config(component, ranks).items()}
    return tensors, {"lora_adapter_metadata": json.dumps(flat, sort_keys=True)}


def _lora_config(component: str, ranks: Mapping[str, int]) -> dict[str, Any]:
    """The LoRA config of a component whose layers have these ranks, alpha = rank in each.

    PEFT takes names and pattern keys for the ends of names too. In a text encoder that lets one name stand for a layer
    with and without `text_model.`. Elsewhere it must not: Flux has both "proj_out" and
    "single_transformer_blocks.0.proj_out".
    """
    if component.startswith("text_encoder"):
        ranks = {module.removeprefix("text_model."): rank for module, rank in ranks.items()}
        anchor = ""
    else:
        anchor = "^"
    r = max(ranks.values())
    pattern = {f"{anchor}{re.escape(module)}": rank for module, rank in ranks.items() if rank != r}
    return {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": r,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": sorted(ranks),
    }


def _in_layer_shape(layer: KronaLayer, up: torch.Tensor, down: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A convolution's down gets the kernel, its up a kernel of ones."""
    rank, n_in, kernel = down.shape[0], layer.shape[1], layer.kernel
    return up.reshape(-1, rank, *[1] * len(kernel)), down.reshape(rank, n_in, *kernel)


def lora_deltas(
    tensors: Mapping[str, torch.Tensor], dtype: torch.dtype = torch.float64
) -> Iterator[tuple[str, torch.Tensor]]:
    """(layer name, dW (out, in, *kernel) in `dtype`) for each layer, straight from the file's definition."""
    for stem, down, up, alpha in _pairs(tensors):
        rank = down.shape[0]
        scale = scalar_alpha(stem, alpha, rank) / rank
        dW = up.to(dtype).reshape(up.shape[0], rank) @ down.to(dtype).reshape(rank, -1) * scale
        yield stem, dW.reshape(up.shape[0], *down.shape[1:])

# SPDX-License-Identifier: Apache-2.0
"""LoKr files of LyCORIS, kohya's sd-scripts (its KronA and CDKA modules too), ComfyUI and A1111.

A layer is `<name>.lokr_w1` or `.lokr_w1_a` and `.lokr_w1_b`; the same for `w2`, with `.lokr_t2` for Tucker; `.alpha`.
dW = s * kron(w1, w2). s is 1 when both are full, whatever alpha is; otherwise alpha / rank.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from math import prod

import torch

from ..errors import FormatError
from ..ops import kron_delta_weight
from .adapter import Adapter, KronaLayer
from .names import UNetNames, from_name, kernel_of, to_kohya_name
from .pairs import group_by_layer

_ENDINGS = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2", "alpha", "dora_scale")


def from_lokr(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None, base: UNetNames | None = None
) -> Adapter:
    """Read a LoKr file as KronA of layout "kron": exact (low-rank sides are multiplied out).

    A convolution's w2 that is stored as a matrix (kohya) gets its kernel from the layer's name; where the flattened
    input is not split at a multiple of the kernel (sd-scripts' KronA) that takes several terms and is still exact.

    Args:
        tensors: LoKr keys under flat (`lora_unet_...`) or dotted (`unet....`) names.
        metadata: the file's; needed for scales that some trainers put nowhere else.
        base: the model's kind; needed for `proj_in` and `proj_out` stored as matrices (1 x 1 convolutions in SD 1.x).

    Raises:
        FormatError: names the layer: sides missing or doubled, shapes that do not fit, DoRA, alpha not positive.
    """
    factor = _unfolded_scale(metadata or {})
    layers = []
    for name, parts in group_by_layer(tensors, (), _ENDINGS).items():
        component, module = from_name(name)
        w1, w2, scale = _sides(name, parts)
        if factor is not None:
            scale *= factor / w1.shape[1] ** 0.5
        layer = KronaLayer(component, module, w1[None], w2[None], scale)
        layers.append(layer if layer.kernel else layer.with_kernel(kernel_of(component, module, base)))
    return Adapter(tuple(layers), source="lokr")


def as_krona_factors(name: str, parts: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """w1 (a_out, a_in) and w2 (b_out, b_in, *kernel) of one layer, low-rank sides multiplied out, unscaled.

    Raises:
        FormatError: names the layer and what is wrong with its parts.
    """
    w1, w2, _ = _sides_and_ranks(name, parts)
    return w1, w2


def _sides(name: str, parts: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, float]:
    """w1, w2 and s of one layer, with LyCORIS' meaning of alpha."""
    w1, w2, ranks = _sides_and_ranks(name, parts)
    if not ranks:
        return w1, w2, 1.0
    if len(set(ranks.values())) > 1:
        raise FormatError(f"'{name}': w1 and w2 have different ranks {ranks}, so that alpha's meaning is not defined.")
    rank = next(iter(ranks.values()))
    return w1, w2, scalar_alpha(name, parts.get("alpha"), rank) / rank


def _sides_and_ranks(name: str, parts: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, dict[str, int]]:
    """w1, w2 and the ranks of the sides that are low-rank."""
    if "dora_scale" in parts:
        raise FormatError(
            f"'{name}' is DoRA ('dora_scale'): it rescales the base weights and is no fixed update. Merge it with the "
            "tool that made it, then extract the difference of the two checkpoints."
        )
    ranks = {}
    sides = []
    for side in ("lokr_w1", "lokr_w2"):
        full, a, b = (parts.get(side + end) for end in ("", "_a", "_b"))
        t = parts.get("lokr_t2") if side == "lokr_w2" else None
        if (
            (full is None) == (a is None and b is None)
            or (a is None) != (b is None)
            or (full is not None and t is not None)
        ):
            has = ", ".join(sorted(parts))
            raise FormatError(f"'{name}' has {has}: expected {side}, or {side}_a and {side}_b, and not both.")
        if full is None:
            full, ranks[side] = _multiply_out(name, side, a, b, t)
        sides.append(full)
    w1, w2 = sides
    if w1.dim() != 2 or not 2 <= w2.dim() <= 5 or 0 in (*w1.shape, *w2.shape):
        raise FormatError(f"'{name}': expected w1 a matrix and w2 one with a kernel at most, got {_shapes(parts)}.")
    return w1, w2, ranks


def _multiply_out(
    name: str, side: str, a: torch.Tensor, b: torch.Tensor, t: torch.Tensor | None
) -> tuple[torch.Tensor, int]:
    """The full factor of a low-rank side, in fp32 at least, and its rank."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    shapes = f"{side}_a {tuple(a.shape)}, {side}_b {tuple(b.shape)}"
    if a.dim() != 2 or b.dim() != 2:
        raise FormatError(f"'{name}': expected matrices, got {shapes}.")
    if t is None:
        if a.shape[1] != b.shape[0]:
            raise FormatError(f"'{name}': the ranks of {shapes} differ.")
        return a.to(dtype) @ b.to(dtype), a.shape[1]
    if not 3 <= t.dim() <= 5 or tuple(t.shape[:2]) != (a.shape[0], b.shape[0]):
        raise FormatError(f"'{name}': lokr_t2 {tuple(t.shape)} does not fit {shapes}.")
    return torch.einsum("ij...,ip,jr->pr...", t.to(dtype), a.to(dtype), b.to(dtype)), a.shape[0]


def scalar_alpha(name: str, alpha: torch.Tensor | None, rank: int) -> float:
    """The value of an `.alpha` tensor; the rank where there is none, as every reader has it.

    Raises:
        FormatError: if it is not one positive number.
    """
    if alpha is None:
        return float(rank)
    if alpha.numel() != 1 or not float(alpha) > 0:
        raise FormatError(f"'{name}.alpha' should be one positive number, got {alpha.tolist()}.")
    return float(alpha)


def _unfolded_scale(metadata: Mapping[str, str]) -> float | None:
    """alpha of sd-scripts' first KronA module with use_cdka_scale: the file lacks its scale alpha / sqrt(a_in)."""
    if not metadata.get("ss_network_module", "").endswith("krona"):
        return None
    try:
        arguments = json.loads(metadata.get("ss_network_args", "{}"))
        if not isinstance(arguments, dict) or str(arguments.get("use_cdka_scale", "false")).lower() != "true":
            return None
        alpha = arguments.get("krona_alpha")
        return None if alpha is None else float(alpha)
    except (TypeError, ValueError) as error:
        raise FormatError(f"The metadata's ss_network_args cannot be read, and with it the scale: {error}.") from error


def _shapes(parts: Mapping[str, torch.Tensor]) -> str:
    return ", ".join(f"{key} {tuple(tensor.shape)}" for key, tensor in sorted(parts.items()))


def as_plain_kron(layer: KronaLayer) -> KronaLayer | None:
    """The layer with layout "kron" and one term, if it can be written so without loss, else None.

    A "diffusekrona" layer is a plain Kronecker product when a dimension is 1: A (x) B if that is a_out or b_out,
    B (x) A if it is a_in or b_in.
    """
    if layer.r != 1:
        return None
    _, a_out, a_in = layer.A.shape
    _, b_out, b_in, *kernel = layer.B.shape
    if layer.layout == "kron" or a_out == 1 or b_out == 1:
        return KronaLayer(layer.component, layer.module, layer.A, layer.B, layer.scale)
    if (a_in == 1 or b_in == 1) and prod(kernel) == 1:
        A, B = layer.B.reshape(1, b_out, b_in), layer.A.reshape(1, a_out, a_in, *kernel)
        return KronaLayer(layer.component, layer.module, A, B, layer.scale)
    return None


def to_lokr(adapter: Adapter, base: UNetNames, dtype: torch.dtype = torch.float16) -> dict[str, torch.Tensor]:
    """Write as a LoKr file with two full factors per layer: w1 = A, w2 = B, scale folded in, alpha 1.

    Args:
        adapter: one term a layer, layout "kron" (or a shuffled layer in which a dimension is 1).
        base: decides the names; see `names.BASES`. dtype: of the factors.

    Raises:
        FormatError: names the layer that LoKr cannot hold, and the formats that can.
    """
    tensors = {}
    for layer in adapter:
        plain = as_plain_kron(layer)
        if plain is None:
            raise FormatError(_refusal(layer))
        w1, w2 = plain.balanced()
        name = to_kohya_name(layer.component, layer.module, base)
        tensors[f"{name}.lokr_w1"] = w1[0].to(dtype)
        tensors[f"{name}.lokr_w2"] = w2[0].to(dtype)
        tensors[f"{name}.alpha"] = torch.tensor(1.0)
    return tensors


def _refusal(layer: KronaLayer) -> str:
    if layer.r > 1:
        return (
            f"{layer.name} has r={layer.r} terms and a LoKr file holds one a layer. Use --split-terms (one file a "
            "term, loaded together), --to lora or --to diff."
        )
    return (
        f"{layer.name} has layout 'diffusekrona', which is no plain Kronecker product, so LoKr cannot hold it. "
        "Use --to loha (exact, the same rank), --to lora or --to diff."
    )


def lokr_deltas(
    tensors: Mapping[str, torch.Tensor], dtype: torch.dtype = torch.float64
) -> Iterator[tuple[str, torch.Tensor]]:
    """(layer name, dW in `dtype`) for each layer, straight from the file's definition."""
    for name, parts in group_by_layer(tensors, (), _ENDINGS).items():
        w1, w2, scale = _sides(name, {key: tensor.to(dtype) for key, tensor in parts.items()})
        yield name, kron_delta_weight(w1[None], w2[None], scale=scale)

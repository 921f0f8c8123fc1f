# SPDX-License-Identifier: Apache-2.0
"""LoKr files of LyCORIS, kohya's sd-scripts (its KronA and CDKA modules too), ComfyUI and A1111.

A layer is `<name>.lokr_w1` or `.lokr_w1_a` and `.lokr_w1_b`; the same for `w2`, with `.lokr_t2` for Tucker; `.alpha`.
dW = s * kron(w1, w2). s is 1 when both are full, whatever alpha is; otherwise alpha / rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isqrt, prod
from typing import Any

import torch

from ...errors import FormatError
from ...factors import largest_divisor
from ...ops import kron_delta_weight
from ..record import LayerUpdate
from .format import Factors, Format, Parts, check_rank, network_arguments, peft_setting, scalar_alpha

_ENDINGS = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")


def _read(name: str, parts: Parts, metadata: Mapping[str, str]) -> Factors:
    """Exact, layout "kron"; low-rank sides are multiplied out.

    Raises:
        FormatError: names the layer: sides missing or doubled, shapes that do not fit, alpha not positive.
    """
    w1, w2, scale = _sides(name, parts, metadata)
    factor = _unfolded_scale(metadata)
    return Factors(w1[None], w2[None], scale if factor is None else scale * factor / w1.shape[1] ** 0.5)


def _read_peft(config: Mapping[str, Any], groups: Mapping[str, Parts]) -> dict[str, Factors]:
    """PEFT applies alpha / r always, also with two full factors (LyCORIS does not)."""
    factors = {}
    for module, parts in groups.items():
        w1, w2, ranks = _sides_and_ranks(module, parts)
        check_rank(config, module, *ranks.values())
        alpha, r = (peft_setting(config, *names, module) for names in _PEFT_SETTINGS)
        factors[module] = Factors(w1[None], w2[None], alpha / r)
    return factors


_PEFT_SETTINGS = (("alpha", "alpha_pattern"), ("r", "rank_pattern"))


def _sides(
    name: str, parts: Parts, metadata: Mapping[str, str] | None = None
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """w1, w2 and s of one layer, with LyCORIS' meaning of alpha."""
    w1, w2, ranks = _sides_and_ranks(name, parts)
    if not ranks:
        return w1, w2, 1.0
    if len(set(ranks.values())) > 1:
        raise FormatError(f"'{name}': w1 and w2 have different ranks {ranks}, so that alpha's meaning is not defined.")
    rank = next(iter(ranks.values()))
    return w1, w2, scalar_alpha(name, parts.get("alpha"), rank, metadata) / rank


def _sides_and_ranks(name: str, parts: Parts) -> tuple[torch.Tensor, torch.Tensor, dict[str, int]]:
    """w1, w2 and the ranks of the sides that are low-rank."""
    ranks = {}
    sides = []
    for side in ("lokr_w1", "lokr_w2"):
        full, a, b = (parts.get(side + end) for end in ("", "_a", "_b"))
        t = parts.get("lokr_t2") if side == "lokr_w2" else None
        if full is not None and a is None and b is None and t is None:
            sides.append(full)
        elif full is None and a is not None and b is not None:
            product, ranks[side] = _multiply_out(name, side, a, b, t)
            sides.append(product)
        else:
            has = ", ".join(sorted(parts))
            raise FormatError(f"'{name}' has {has}: expected {side}, or {side}_a and {side}_b, and not both.")
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


def _unfolded_scale(metadata: Mapping[str, str]) -> float | None:
    """alpha of sd-scripts' first KronA module with use_cdka_scale: the file lacks its scale alpha / sqrt(a_in)."""
    if not metadata.get("ss_network_module", "").endswith("krona"):
        return None
    arguments = network_arguments(metadata)
    if str(arguments.get("use_cdka_scale", "false")).lower() != "true":
        return None
    alpha = arguments.get("krona_alpha")
    try:
        return None if alpha is None else float(alpha)
    except (TypeError, ValueError) as error:
        raise FormatError(f"The metadata's ss_network_args cannot be read, and with it the scale: {error}.") from error


def _shapes(parts: Parts) -> str:
    return ", ".join(f"{key} {tuple(tensor.shape)}" for key, tensor in sorted(parts.items()))


def as_plain_kron(layer: LayerUpdate) -> LayerUpdate | None:
    """The layer with layout "kron" and one term, if it can be written so without loss, else None.

    A "diffusekrona" layer is a plain Kronecker product when a dimension is 1: A (x) B if that is a_out or b_out,
    B (x) A if it is a_in or b_in.
    """
    if layer.r != 1:
        return None
    _, a_out, a_in = layer.A.shape
    _, b_out, b_in, *kernel = layer.B.shape
    if layer.layout == "kron" or a_out == 1 or b_out == 1:
        return LayerUpdate(layer.component, layer.module, layer.A, layer.B, layer.scale)
    if (a_in == 1 or b_in == 1) and prod(kernel) == 1:
        A, B = layer.B.reshape(1, b_out, b_in), layer.A.reshape(1, a_out, a_in, *kernel)
        return LayerUpdate(layer.component, layer.module, A, B, layer.scale)
    return None


def _write(layers: Sequence[LayerUpdate], dtype: torch.dtype) -> list[dict[str, torch.Tensor]]:
    """Two full factors a layer: w1 = A, w2 = B, scale folded in, alpha 1.

    Raises:
        FormatError: names the layer that LoKr cannot hold, and the formats that can.
    """
    written = []
    for layer in layers:
        plain = as_plain_kron(layer)
        if plain is None:
            raise FormatError(_refusal(layer))
        w1, w2 = plain.balanced()
        written.append({"lokr_w1": w1[0].to(dtype), "lokr_w2": w2[0].to(dtype), "alpha": torch.tensor(1.0)})
    return written


def _refusal(layer: LayerUpdate) -> str:
    if layer.r > 1:
        return (
            f"{layer.name} has r={layer.r} terms and a LoKr file holds one a layer. Use split_terms=True (one "
            "file a term, loaded together), to='lora' or to='diff'."
        )
    return (
        f"{layer.name} has layout 'diffusekrona', which is no plain Kronecker product, so LoKr cannot hold it. "
        "Use to='loha' (exact, the same rank), to='lora' or to='diff'."
    )


def _delta(name: str, parts: Parts, dtype: torch.dtype) -> torch.Tensor:
    w1, w2, scale = _sides(name, {key: t if key == "alpha" else t.to(dtype) for key, t in parts.items()})
    return kron_delta_weight(w1[None], w2[None], scale=scale)


def lycoris_loads(layer: LayerUpdate) -> bool:
    """Whether LyCORIS 4.1.3 loads the layer as LoKr with two full factors.

    Its loader derives both splits from one number, which it guesses from the factors, and takes the smaller part of
    each side as w1. That admits square left factors, near-square splits, and some others by luck.

    >>> lycoris_loads(LayerUpdate("unet", "x", torch.ones(1, 4, 4), torch.ones(1, 8, 80)))
    True
    """
    _, a_out, a_in = layer.A.shape
    _, b_out, b_in, *kernel = layer.B.shape
    n_out, n_in = layer.shape[:2]

    def splits_right(number: int | None) -> bool:
        return _lycoris_split(n_out, number) == a_out and _lycoris_split(n_in, number) == a_in

    if splits_right(None):
        return True
    candidates = max(a_out, a_in), max(b_out, b_in, *kernel)
    fitting = (c for c in candidates if c in (a_out, b_out) and c in (a_in, b_in))
    return splits_right(next(fitting, min(candidates)))


def _lycoris_split(size: int, number: int | None) -> int:
    """The smaller part of LyCORIS' split of a side: by `number` if that divides it, else the nearest to a square."""
    if number is not None and size % number == 0:
        return min(number, size // number)
    return largest_divisor(size, min(number or size, isqrt(size)))


def _notes(layers: Sequence[LayerUpdate]) -> tuple[str, ...]:
    plain = [kron for layer in layers if (kron := as_plain_kron(layer)) is not None]
    refused = [layer for layer in plain if not lycoris_loads(layer)]
    if not refused:
        return ()
    a_out, a_in = refused[0].factors
    return (
        f"LyCORIS itself does not load the factors of {len(refused)} of {len(layers)} layers (a_out={a_out}, "
        f"a_in={a_in} in {refused[0].name}); ComfyUI and A1111 do. For LyCORIS and diffusers use to='lora'.",
    )


LOKR = Format(
    name="lokr",
    endings=_ENDINGS,
    read=_read,
    write=_write,
    delta=_delta,
    kohya_network=("lycoris.kohya", {"algo": "lokr", "full_matrix": "True"}),
    notes=_notes,
    peft_type="LOKR",
    peft_endings=((), _ENDINGS),
    read_peft=_read_peft,
)

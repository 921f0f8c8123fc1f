# SPDX-License-Identifier: Apache-2.0
"""LoHa files (LyCORIS, ComfyUI, A1111): dW = alpha / rank * (w1_a w1_b) * (w2_a w2_b), an elementwise product.

A Kronecker product of one term is such a product, in either layout: every entry of dW is an entry of A times an entry
of B, so A and B are each spread to the size of dW. Spreading repeats rows and columns, which leaves the rank as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch

from ...errors import FormatError
from ..groups import complete
from ..low_rank import low_rank
from ..record import LayerUpdate
from .format import Factors, Format, Parts, check_rank, peft_setting, scalar_alpha

_FACTORS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


def loha_factors(layer: LayerUpdate) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """w1_a (out, R), w1_b (R, in * prod(kernel)), w2_a and w2_b likewise, in float64; R = max(rank A, rank B).

    Raises:
        FormatError: if the layer has more than one term.
    """
    if layer.r > 1:
        raise FormatError(
            f"{layer.name} has r={layer.r} terms, whose sum is no elementwise product of two low-rank matrices. "
            "Use to='lora', to='diff', or split_terms=True (one file a term, loaded together)."
        )
    A, B = (factor[0] for factor in layer.balanced())
    (a_out, _), (b_out, b_in) = A.shape, B.shape[:2]
    rows, columns = torch.arange(layer.shape[0]), torch.arange(layer.shape[1])
    i, u = (rows // b_out, rows % b_out) if layer.layout == "kron" else (rows % a_out, rows // a_out)
    k, v = columns // b_in, columns % b_in
    K = prod(layer.kernel)
    (left_A, right_A), (left_B, right_B) = low_rank(A), low_rank(B.flatten(1))
    w1_b = right_A[:, k].repeat_interleave(K, dim=1)
    w2_b = right_B.reshape(-1, b_in, K)[:, v].flatten(1)
    rank = max(left_A.shape[1], left_B.shape[1])
    return (
        _padded(left_A[i], 1, rank),
        _padded(w1_b, 0, rank),
        _padded(left_B[u], 1, rank),
        _padded(w2_b, 0, rank),
    )


def _padded(matrix: torch.Tensor, dim: int, rank: int) -> torch.Tensor:
    """The matrix with zero rows (dim 0) or columns (dim 1) up to `rank`."""
    missing = rank - matrix.shape[dim]
    return torch.nn.functional.pad(matrix, (0, missing, 0, 0) if dim == 1 else (0, 0, 0, missing))


def _read(name: str, parts: Parts, metadata: Mapping[str, str]) -> Factors:
    """Exact: the elementwise product of matrices of ranks p and q is a LoRA of rank p q, one for each pair of terms.

    Raises:
        FormatError: names the layer: parts missing or with shapes that do not fit, alpha not positive.
    """
    w1_a, w1_b, w2_a, w2_b = (
        factor.to(torch.promote_types(factor.dtype, torch.float32)) for factor in complete(name, parts, _FACTORS)
    )
    fits = all(factor.dim() == 2 and 0 not in factor.shape for factor in (w1_a, w1_b, w2_a, w2_b)) and (
        (w1_a.shape[1], w2_a.shape[1], w1_a.shape[0], w1_b.shape[1])
        == (w1_b.shape[0], w2_b.shape[0], w2_a.shape[0], w2_b.shape[1])
    )
    if not fits:
        shapes = ", ".join(f"{ending} {tuple(parts[ending].shape)}" for ending in _FACTORS)
        raise FormatError(f"'{name}': expected w1_a (out, p), w1_b (p, in), w2_a (out, q), w2_b (q, in), got {shapes}.")
    up = torch.einsum("op,oq->pqo", w1_a, w2_a).reshape(-1, w1_a.shape[0], 1)
    down = torch.einsum("pi,qi->pqi", w1_b, w2_b).reshape(-1, 1, w1_b.shape[1])
    rank = w1_b.shape[0]
    return Factors(up, down, scalar_alpha(name, parts.get("alpha"), rank, metadata) / rank)


def _read_peft(config: Mapping[str, Any], groups: Mapping[str, Parts]) -> dict[str, Factors]:
    factors = {}
    for module, parts in groups.items():
        alpha, r = (
            peft_setting(config, *names, module) for names in (("alpha", "alpha_pattern"), ("r", "rank_pattern"))
        )
        check_rank(config, module, parts["hada_w1_b"].shape[0], parts["hada_w2_b"].shape[0])
        factors[module] = _read(module, parts, {})._replace(scale=alpha / r)
    return factors


def _write(layers: Sequence[LayerUpdate], dtype: torch.dtype) -> list[dict[str, torch.Tensor]]:
    """Exact for one term a layer in either layout, rank max(rank A, rank B), alpha = rank."""
    written = []
    for layer in layers:
        factors = loha_factors(layer)
        parts = {ending: factor.to(dtype) for ending, factor in zip(_FACTORS, factors, strict=True)}
        written.append({**parts, "alpha": torch.tensor(float(factors[0].shape[1]))})
    return written


def _delta(name: str, parts: Parts, dtype: torch.dtype) -> torch.Tensor:
    w1_a, w1_b, w2_a, w2_b = (parts[ending].to(dtype) for ending in _FACTORS)
    rank = w1_b.shape[0]
    return (w1_a @ w1_b) * (w2_a @ w2_b) * (scalar_alpha(name, parts.get("alpha"), rank) / rank)


LOHA = Format(
    name="loha",
    endings=_FACTORS,
    read=_read,
    write=_write,
    delta=_delta,
    kohya_network=("lycoris.kohya", {"algo": "loha"}),
    peft_type="LOHA",
    peft_endings=(_FACTORS, ()),
    read_peft=_read_peft,
)

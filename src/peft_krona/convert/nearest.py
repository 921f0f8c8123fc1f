# SPDX-License-Identifier: Apache-2.0
"""The nearest sum of Kronecker products to a given matrix (Van Loan and Pitsianis, 1993).

Arranged so that one row holds all entries that share an entry of A, a Kronecker product is an outer product,
vec(A) vec(B)^T. So the best r terms in the Frobenius norm are the r leading singular triples of the rearranged dW.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch

from ..choices import Layout
from ..errors import FactorError, FormatError
from ..factors import choose_factors
from .names import to_file_name
from .record import AdapterFile, LayerUpdate


def nearest_kronecker(
    dW: torch.Tensor, a_out: int, a_in: int, *, r: int = 1, layout: Layout = "kron"
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The r-term Kronecker sum of given factor sizes that is nearest to dW in the Frobenius norm.

    Args:
        dW: (out, in, *kernel). a_out, a_in: must divide out and in. r: number of terms; more than the rearranged
            matrix has rows or columns are not returned. layout: "kron" or "diffusekrona".

    Returns:
        A (r, a_out, a_in) and B (r, b_out, b_in, *kernel) in float32 (float64 for a float64 dW), and the relative error
        ||dW - sum A (x) B||_F / ||dW||_F (0 for dW = 0).

    Raises:
        FactorError: if a factor does not divide its side, or r < 1.

    >>> A, B = torch.randn(1, 4, 2), torch.randn(1, 3, 5)
    >>> nearest_kronecker(torch.kron(A[0], B[0]), 4, 2)[2] < 1e-6
    True
    """
    n_out, n_in, *kernel = dW.shape
    if r < 1 or a_out < 1 or a_in < 1 or n_out % a_out or n_in % a_in:
        raise FactorError(
            f"a_out={a_out}, a_in={a_in}, r={r} do not fit a weight of {tuple(dW.shape)}: a_out has to divide {n_out}, "
            f"a_in {n_in}, and r to be at least 1."
        )
    b_out, b_in, K = n_out // a_out, n_in // a_in, prod(kernel)
    blocks = dW.double().reshape(*((a_out, b_out) if layout == "kron" else (b_out, a_out)), a_in, b_in, K)
    order = (0, 2, 1, 3, 4) if layout == "kron" else (1, 2, 0, 3, 4)
    rearranged = blocks.permute(order).reshape(a_out * a_in, b_out * b_in * K)
    left, right = _leading_terms(rearranged, min(r, *rearranged.shape))
    norm = rearranged.norm().item()
    error = (rearranged - left @ right).norm().item() / norm if norm else 0.0
    dtype = torch.promote_types(dW.dtype, torch.float32)
    A = left.T.reshape(-1, a_out, a_in).to(dtype).contiguous()
    return A, right.reshape(-1, b_out, b_in, *kernel).to(dtype), error


def _leading_terms(matrix: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    """left (m, r) and right (r, n), orthogonal with equal norms, left @ right the best rank-r approximation.

    By the eigenvectors of the smaller Gram matrix: for a 2048 x 2048 layer that is at most 2048 wide, and a full SVD of
    the rearranged matrix would cost many times as much. In float64 that still leaves 8 digits.
    """
    if matrix.shape[0] > matrix.shape[1]:
        right, left = _leading_terms(matrix.T, r)
        return left.T, right.T
    vectors = torch.linalg.eigh(matrix @ matrix.T).eigenvectors[:, -r:].flip(1)
    right = vectors.T @ matrix
    root = right.norm(dim=1, keepdim=True).sqrt()
    return vectors * root.T, right / root.clamp_min(torch.finfo(torch.float64).tiny)


def from_difference(
    base: Mapping[str, torch.Tensor],
    tuned: Mapping[str, torch.Tensor],
    a_out: int,
    a_in: int,
    *,
    r: int = 1,
    layout: Layout = "kron",
    component: str = "unet",
    modules: Mapping[str, tuple[int, int]] | None = None,
) -> tuple[AdapterFile, dict[str, float]]:
    """The KronA adapter nearest to a fine-tuned model, from its weights and the base model's.

    Args:
        base, tuned: state dicts; `<module>.weight` of two or more dimensions that differ are taken. a_out, a_in: wanted
            factors (where they do not divide a layer's size, the largest divisor below is taken). r, layout: as in
            `nearest_kronecker`. component: the pipeline's part. modules: take these layers only, with these factors.

    Returns:
        The adapter and the relative error of each layer, ||dW - approximation||_F / ||dW||_F.

    Raises:
        FormatError: if the models have different layers or sizes, or do not differ.
    """
    layers, errors = [], {}
    names = [
        key.removesuffix(".weight") for key, weight in base.items() if key.endswith(".weight") and weight.dim() > 1
    ]
    for module in names if modules is None else modules:
        key = f"{module}.weight"
        if key not in base or key not in tuned or base[key].shape != tuned[key].shape:
            sizes = [tuple(model[key].shape) if key in model else None for model in (base, tuned)]
            raise FormatError(
                f"{key}: base and fine-tuned model differ in this weight's shape: {sizes[0]}, {sizes[1]}."
            )
        dW = tuned[key].double() - base[key].double()
        if not dW.any():
            continue
        wanted_out, wanted_in = (a_out, a_in) if modules is None else modules[module]
        factors = choose_factors(dW.shape[0], dW.shape[1], wanted_out, wanted_in)
        A, B, error = nearest_kronecker(dW.float(), *factors, r=r, layout=layout)
        layer = LayerUpdate(component, to_file_name(component, module), A, B, 1.0, layout)
        layers.append(layer)
        errors[layer.name] = error
    if not layers:
        raise FormatError(
            "The two models do not differ in any matrix or convolution weight: there is nothing to extract."
        )
    return AdapterFile(tuple(layers), source="difference"), errors

# SPDX-License-Identifier: Apache-2.0
"""Measures of pictures and of their features, in float64."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601


def laplacian_variance(images: Sequence[Image.Image]) -> np.ndarray:
    """Sharpness of each picture, N: the variance of the Laplacian (4-neighbour, borders left out) of its luma, 0..255.

    After Pech-Pacheco et al., "Diatom autofocusing in brightfield microscopy", ICPR 2000.
    """
    result = []
    for image in images:
        y = np.asarray(image.convert("RGB"), float) @ LUMA
        laplacian = y[1:-1, :-2] + y[1:-1, 2:] + y[:-2, 1:-1] + y[2:, 1:-1] - 4 * y[1:-1, 1:-1]
        result.append(laplacian.var())
    return np.array(result)


def psnr(images: Sequence[Image.Image], others: Sequence[Image.Image]) -> np.ndarray:
    """Peak signal-to-noise ratio of each pair in dB, N; infinite where two pictures are equal.

    Raises:
        ValueError: if the numbers or the sizes of the pictures differ.
    """
    same_number(images, others)
    result = []
    for number, (one, other) in enumerate(zip(images, others, strict=True)):
        if one.size != other.size:
            raise ValueError(f"picture {number}: sizes {one.size} and {other.size} differ")
        difference = np.asarray(one.convert("RGB"), float) - np.asarray(other.convert("RGB"), float)
        error = (difference**2).mean()
        result.append(10 * np.log10(255**2 / error) if error else np.inf)
    return np.array(result)


def frechet_distance(one: Tensor, other: Tensor) -> float:
    """Squared 2-Wasserstein distance of Gaussians fitted to two sets of features, N x D and M x D.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^1/2), Heusel et al., arXiv 1706.08500.  With few pictures it is biased upwards:
    print the value of two sets of real pictures of the same numbers beside it.

    Raises:
        ValueError: if a set has fewer than two rows, or the widths differ.
    """
    for rows in (one, other):
        if rows.ndim != 2 or len(rows) < 2:
            raise ValueError(f"expected N x D features of at least 2 pictures, got {tuple(rows.shape)}")
    if one.shape[1] != other.shape[1]:
        raise ValueError(f"features of width {one.shape[1]} and {other.shape[1]} can't be compared")
    a, b = ((x.double() - x.double().mean(0)) / (len(x) - 1) ** 0.5 for x in (one, other))
    # C1 = a'a and C2 = b'b, so the trace of (C1 C2)^1/2 is the sum of the singular values of a b'
    trace = a.square().sum() + b.square().sum() - 2 * torch.linalg.svdvals(a @ b.T).sum()
    mean = (one.double().mean(0) - other.double().mean(0)).square().sum()
    return float(mean + trace)


def drift(before: Tensor, after: Tensor) -> Tensor:
    """How far an adapter changed pictures that it should not: 1 - cosine of the features of each pair, N.

    Row i of both (N x D) is a picture of the same prompt and seed, without and with the adapter.
    """
    same_number(before, after)
    return 1 - (normalize(before.double(), dim=1) * normalize(after.double(), dim=1)).sum(1)


def same_number(one, other) -> None:
    if len(one) != len(other):
        raise ValueError(f"{len(one)} pictures against {len(other)}: expected pairs")

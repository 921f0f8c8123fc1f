# SPDX-License-Identifier: Apache-2.0
"""Draw the pictures of concepts.md: `python docs/pictures.py`."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot as plt

from peft_krona.convert import nearest_kronecker
from peft_krona.ops.delta import kron_delta_weight

HERE = Path(__file__).parent
STYLE = {"cmap": "RdBu_r", "interpolation": "nearest"}


def panel(axis, matrix, title, limit=None):
    limit = limit or matrix.abs().max().item()
    axis.imshow(matrix, vmin=-limit, vmax=limit, **STYLE)
    axis.set_title(title, fontsize=11)
    axis.set_xticks([])
    axis.set_yticks([])


def factors():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(1, 4, 2, generator=generator), torch.randn(1, 3, 4, generator=generator)


def product():
    A, B = factors()
    figure, axes = plt.subplots(1, 3, figsize=(8, 3.6), width_ratios=[1, 1.6, 2.6], layout="constrained")
    panel(axes[0], A[0], "A   4 x 2")
    panel(axes[1], B[0], "B   3 x 4")
    panel(axes[2], kron_delta_weight(A, B), "A (x) B   12 x 8")
    for row in range(3, 12, 3):
        axes[2].axhline(row - 0.5, color="black", linewidth=0.8)
    axes[2].axvline(3.5, color="black", linewidth=0.8)
    return figure


def layouts():
    A, B = factors()
    figure, axes = plt.subplots(1, 2, figsize=(6.4, 4), layout="constrained")
    panel(axes[0], kron_delta_weight(A, B), 'layout="kron"')
    panel(axes[1], kron_delta_weight(A, B, layout="diffusekrona"), 'layout="diffusekrona"')
    return figure


def terms():
    """A smooth matrix of 32 x 32 and the nearest sums of terms of 4 x 4 factors."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, 32), torch.linspace(-1, 1, 32), indexing="ij")
    target = torch.sin(3 * (x + y)) * torch.exp(-((x - 0.3) ** 2) * 2) + (x**2 + y**2 < 0.35).float()
    figure, axes = plt.subplots(1, 5, figsize=(11, 2.7), layout="constrained")
    limit = target.abs().max().item()
    panel(axes[0], target, "a matrix, 32 x 32", limit)
    for axis, r in zip(axes[1:], (1, 2, 4, 8), strict=True):
        A, B, _ = nearest_kronecker(target, 4, 4, r=r)
        near = kron_delta_weight(A, B)
        error = ((near - target).norm() / target.norm()).item()
        panel(axis, near, f"{r} term{'s' * (r > 1)}, {r * 80} numbers\n{error:.0%} away", limit)
    return figure


if __name__ == "__main__":
    for draw in (product, terms, layouts):
        draw().savefig(HERE / f"concepts_{draw.__name__}.png", dpi=110)

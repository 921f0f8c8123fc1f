# SPDX-License-Identifier: Apache-2.0
"""A matrix as a product of two thin ones."""

from __future__ import annotations

import torch


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

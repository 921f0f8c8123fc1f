# SPDX-License-Identifier: Apache-2.0
"""The Kronecker product as an embedding: look up a column of A and a column of B, multiply them."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..choices import Layout
from .plan import check_factors, check_layout, check_values


def kron_embedding(
    ids: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    *,
    scale: float | torch.Tensor = 1.0,
    layout: Layout = "kron",
) -> torch.Tensor:
    """Rows of dW^T for dW = s * layout(sum_n A_n (x) B_n) of shape (embedding_dim, num_embeddings).

    Args:
        ids: (...,) integer, in [0, a_in * b_in).
        A: (r, a_out, a_in). B: (r, b_out, b_in).

    Returns:
        (..., a_out * b_out) in the promoted dtype of A and B.

    Raises:
        ShapeError: if A and B do not belong together, or layout is unknown. BackendError: if A or B has no values.

    >>> A, B = torch.randn(1, 2, 3), torch.randn(1, 4, 5)
    >>> kron_embedding(torch.tensor([0, 14]), A, B).shape
    torch.Size([2, 8])
    """
    check_layout(layout)
    check_factors(A.shape, B.shape)
    check_values(ids, A, B)
    r, a_out, a_in = A.shape
    _, b_out, b_in = B.shape
    a = F.embedding(ids.div(b_in, rounding_mode="floor"), A.permute(2, 0, 1).reshape(a_in, r * a_out) * scale)
    b = F.embedding(ids.remainder(b_in), B.permute(2, 0, 1).reshape(b_in, r * b_out))
    a, b = a.view(*ids.shape, r, a_out), b.view(*ids.shape, r, b_out)
    subscripts = "...ni,...nu->...iu" if layout == "kron" else "...ni,...nu->...ui"
    return torch.einsum(subscripts, a, b).reshape(*ids.shape, a_out * b_out)

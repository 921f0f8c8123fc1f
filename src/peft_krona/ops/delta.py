# SPDX-License-Identifier: Apache-2.0
"""dW as a full matrix, for merging and exporting only."""

from __future__ import annotations

import torch

from ..choices import Layout
from .plan import check_factors, check_layout


def kron_delta_weight(
    A: torch.Tensor, B: torch.Tensor, *, scale: float | torch.Tensor = 1.0, layout: Layout = "kron"
) -> torch.Tensor:
    """dW = s * layout(sum_n A_n (x) B_n), computed in fp32 (fp64 for fp64 factors).

    Args:
        A: (r, a_out, a_in). B: (r, b_out, b_in, *kernel). scale: s. layout: "kron" or "diffusekrona".

    Returns:
        (a_out*b_out, a_in*b_in, *kernel), contiguous, float32 or float64.

    Raises:
        ShapeError: if A and B do not belong together or the layout is unknown.

    >>> kron_delta_weight(torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[3.0], [4.0]]])).tolist()
    [[3.0, 6.0], [4.0, 8.0]]
    """
    check_factors(A.shape, B.shape, kernel=True)
    check_layout(layout)
    subscripts = "nik,nuv...->iukv..." if layout == "kron" else "nik,nuv...->uikv..."
    dtype = torch.promote_types(torch.promote_types(A.dtype, B.dtype), torch.float32)
    A, B = A.to(dtype) * scale, B.to(dtype)
    # One term is an outer product: spelled as a product it costs one rounding an entry and one pass over memory.
    dW = torch.einsum(subscripts, A, B)
    return dW.reshape(A.shape[1] * B.shape[1], A.shape[2] * B.shape[2], *B.shape[3:]).contiguous()

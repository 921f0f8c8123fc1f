# SPDX-License-Identifier: Apache-2.0
"""The judge: dW by the index formula of the definition, in a plain loop. Slow, exact, and independent of the op."""

from __future__ import annotations

import torch

from ..choices import Layout


def delta_weight_loop(A: torch.Tensor, B: torch.Tensor, scale: float = 1.0, layout: Layout = "kron") -> torch.Tensor:
    """dW in float64 from the definition, entry block by entry block.

    kron:          dW[i*b_out + u, k*b_in + v] = s * sum_n A[n,i,k] B[n,u,v]     (DiffuseKronA, eq. 3)
    diffusekrona:  dW[u*a_out + i, k*b_in + v] = s * sum_n A[n,i,k] B[n,u,v]     (the released code)

    Args:
        A: (r, a_out, a_in). B: (r, b_out, b_in, *kernel). scale: s. layout: "kron" or "diffusekrona".

    Returns:
        (a_out*b_out, a_in*b_in, *kernel), float64, on the CPU.
    """
    A, B = A.detach().to("cpu", torch.float64), B.detach().to("cpu", torch.float64)
    r, a_out, a_in = A.shape
    _, b_out, b_in, *kernel = B.shape
    dW = torch.zeros(a_out * b_out, a_in * b_in, *kernel, dtype=torch.float64)
    for n in range(r):
        for i in range(a_out):
            for k in range(a_in):
                for u in range(b_out):
                    row = i * b_out + u if layout == "kron" else u * a_out + i
                    dW[row, k * b_in : (k + 1) * b_in] += scale * A[n, i, k] * B[n, u]
    return dW


def kron_linear_reference(
    x: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    *,
    scale: float = 1.0,
    base: torch.Tensor | None = None,
    layout: Layout = "kron",
) -> torch.Tensor:
    """base + x dW^T in float64 on the CPU, with dW from `delta_weight_loop`.

    x: (..., in). A: (r, a_out, a_in). B: (r, b_out, b_in). base: (..., out) or None.
    """
    y = x.detach().to("cpu", torch.float64) @ delta_weight_loop(A, B, scale, layout).T
    return y if base is None else base.detach().to("cpu", torch.float64) + y

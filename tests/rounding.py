# SPDX-License-Identifier: Apache-2.0
"""How far a result may lie from the same in float64, on any machine.

A sum of n products is off by at most n u / (1 - n u) times the sum of the products' absolute values, u = eps / 2, in
whatever order a BLAS, a thread or a fused multiply-add takes them (N. J. Higham, Accuracy and Stability of Numerical
Algorithms, 2nd edition, section 3.1). Two implementations are therefore never compared with each other, but each with
float64, and that sum is the same function of the inputs' absolute values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


def judge(function: Callable, *inputs: torch.Tensor | None) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
    """(results, sizes): `function` in float64 on the CPU of the inputs, and of their absolute values.

    It returns one tensor or several, and may ask for gradients of its inputs. The sizes are bounds where it adds and
    multiplies only (relu is no harm): a gradient of a square is, a norm is not.
    """

    def called(change: Callable) -> list[torch.Tensor]:
        doubles = [
            t if t is None or not t.is_floating_point() else change(t.detach().cpu().double()).requires_grad_()
            for t in inputs
        ]
        result = function(*doubles)
        return [t.detach() for t in ([result] if isinstance(result, torch.Tensor) else result)]

    return called(lambda t: t), called(torch.abs)


def assert_rounded(got, want, size, terms: int, what: str = "", dtype: torch.dtype | None = None) -> None:
    """|got - want| <= terms * eps / 2 * size, entry by entry; tensors, or as many of each.

    Args:
        terms: roundings on the longest way from an input to a result: the lengths of the sums on it, and one for
            every product with a scale, every bias and every cast.
        dtype: what is computed in, where it is not the results' own.
    """
    if not isinstance(got, torch.Tensor):
        for i, one in enumerate(zip(got, want, size, strict=True)):
            assert_rounded(*one, terms, f"{what}[{i}]", dtype)
        return
    assert got.shape == want.shape, what
    unit = torch.finfo(dtype or got.dtype).eps / 2
    error = (got.detach().cpu().double() - want).abs()
    allowed = terms * unit / (1 - terms * unit) * size
    worst = (error - allowed).argmax().item() if error.numel() else None
    assert worst is None or (error <= allowed).all(), (
        f"{what} is off by {error.flatten()[worst]:.2e} from {want.flatten()[worst]:.6g}; "
        f"{terms} roundings explain {allowed.flatten()[worst]:.2e}"
    )

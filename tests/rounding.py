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

EPS = torch.finfo(torch.float32).eps
STORED = 8 * EPS
"""Relative error of an update whose factors were written in fp32 and read again, both sides in float64: two to four
factors, a scale and their balancing, 16 roundings of eps / 2 at most."""
STORED_IN_A_MODEL = 64 * EPS
"""The same in the output of a whole model, computed in float64: layers may magnify it, in the same way everywhere."""
HALF = torch.finfo(torch.float16).eps


def assert_same_training(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], moved: str) -> None:
    """Two fp32 trainings with the same updates but for the order of their sums.

    Rounding changes an update by a small multiple of eps of itself, another picture, noise or divisor by about as
    much as itself. The bound lies half way, at sqrt(eps), of how far the weights named `moved` went from their start at
    zero. Adam divides small gradients by themselves: train with an epsilon that is large beside them.
    """
    assert one.keys() == other.keys()
    far = sum(t.double().square().sum() for k, t in one.items() if k.endswith(moved)).sqrt()
    apart = sum((t.double() - other[k].double()).square().sum() for k, t in one.items()).sqrt()
    assert 0 < far and apart <= EPS**0.5 * far, f"{apart:.2e} apart after a way of {far:.2e}"


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

# SPDX-License-Identifier: Apache-2.0
"""Divisors, the choice of factor sizes, parameter counts, the cost of the two orders. Needs no torch."""

from __future__ import annotations

from functools import cache
from math import isqrt, prod

from .choices import Order
from .errors import FactorError


@cache
def divisors(n: int) -> tuple[int, ...]:
    """All divisors of n >= 1, ascending.

    >>> divisors(12)
    (1, 2, 3, 4, 6, 12)
    """
    if n < 1:
        raise FactorError(f"divisors(n) needs n >= 1, got {n}.")
    small = [d for d in range(1, isqrt(n) + 1) if n % d == 0]
    return tuple(small + [n // d for d in reversed(small) if d * d != n])


def largest_divisor(n: int, at_most: int) -> int:
    """The largest divisor of n that is <= at_most.

    >>> largest_divisor(320, 64), largest_divisor(768, 100), largest_divisor(7, 6)
    (64, 96, 1)
    """
    if at_most < 1:
        raise FactorError(f"A Kronecker factor must be at least 1, got {at_most}.")
    return max(d for d in divisors(n) if d <= at_most)


def choose_factors(
    out_features: int, in_features: int, a_out: int, a_in: int, *, strict: bool = False, layer: str = "layer"
) -> tuple[int, int]:
    """The (a_out, a_in) that a layer of shape (out_features, in_features) gets when (a_out, a_in) is asked for.

    Where a request does not divide the size, the largest divisor below it is taken.

    Args:
        strict: raise instead of taking a smaller divisor.
        layer: the layer's name, for the message.

    Raises:
        FactorError: with `strict`, if a factor does not divide its side of the layer.

    >>> choose_factors(1280, 768, 64, 5)
    (64, 4)
    """
    chosen = []
    for name, size_name, size, wanted in (
        ("a_out", "out_features", out_features, a_out),
        ("a_in", "in_features", in_features, a_in),
    ):
        best = largest_divisor(size, wanted)
        if strict and best != wanted:
            above = next((d for d in divisors(size) if d > wanted), None)
            near = f"{best}" if above is None else f"{best} or {above}"
            raise FactorError(
                f"{layer}: {name}={wanted} does not divide {size_name}={size}. The nearest divisors are {near}; "
                f"set them with factor_pattern={{'{layer}': (a_out, a_in)}}, or take {best} with strict_factors=False."
            )
        chosen.append(best)
    return chosen[0], chosen[1]


def num_parameters(
    out_features: int, in_features: int, a_out: int, a_in: int, r: int = 1, kernel: tuple[int, ...] = ()
) -> int:
    """Trainable parameters of one adapted layer: r * (a_out*a_in + b_out*b_in*prod(kernel)).

    >>> num_parameters(1280, 1280, 64, 4)
    6656
    """
    return r * (a_out * a_in + (out_features // a_out) * (in_features // a_in) * prod(kernel))


def contraction_cost(a_out: int, a_in: int, b_out: int, b_in: int) -> tuple[int, int]:
    """Multiply-adds per token and term of the two orders: (B first, A first).

    B first: U = X B^T, then Y = A U:  in*b_out + out*a_in.   A first: V = A X, then Y = V B^T:  in*a_out + out*b_in.

    >>> contraction_cost(64, 4, 20, 320)  # 1280 x 1280
    (30720, 491520)
    """
    n_out, n_in = a_out * b_out, a_in * b_in
    return n_in * b_out + n_out * a_in, n_in * a_out + n_out * b_in


def cheaper_order(a_out: int, a_in: int, b_out: int, b_in: int) -> Order:
    """`"b_first"` or `"a_first"`, whichever needs fewer multiply-adds (ties go to B first).

    >>> cheaper_order(64, 4, 20, 320), cheaper_order(4, 64, 320, 20)
    ('b_first', 'a_first')
    """
    b_first, a_first = contraction_cost(a_out, a_in, b_out, b_in)
    return "b_first" if b_first <= a_first else "a_first"

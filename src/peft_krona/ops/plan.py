# SPDX-License-Identifier: Apache-2.0
"""`Plan`: the sizes of a Kronecker product, and how it is computed. Every check of shapes is here."""

from __future__ import annotations

import functools
import math
from typing import Literal, NamedTuple, TypeAlias

import torch

from ..choices import LAYOUTS, ORDERS, Layout, Order
from ..errors import BackendError, ShapeError
from ..factors import cheaper_order

Variant: TypeAlias = Literal["batched", "paired", "gathered", "expanded"]
VARIANTS: tuple[Variant, ...] = ("batched", "paired", "gathered", "expanded")  # of the product with A: see apply_A.py
# Tokens from which building the matrix of "expanded", and copying for "paired", pay; "gathered" does in between.
FEW, MANY = 64, 256


class Target(NamedTuple):
    """Where and on how much a product is computed: device type, dtype, at least so many tokens (0, FEW or MANY)."""

    device: str
    dtype: torch.dtype
    tokens: int


class Plan(NamedTuple):
    """Sizes, layout, contraction order (torch_impl.py) and variant (apply_A.py; b_first only) of a product.

    wide: 16-bit tensors are multiplied in fp32, by the torch backend in eager mode (see `multiplies_wide`).
    turned: the torch backend computes U as the transpose of B X^T, for b_first in batches (see `turns`).
    """

    r: int
    a_out: int
    a_in: int
    b_out: int
    b_in: int
    layout: Layout
    order: Order
    variant: Variant = "batched"
    wide: bool = False
    turned: bool = False

    @classmethod
    def of(
        cls, A: torch.Tensor, B: torch.Tensor, layout: Layout, order: Order | None = None, tokens: int = MANY
    ) -> Plan:
        """The plan for A (r, a_out, a_in) and B (r, b_out, b_in), where and as they are, for so many tokens."""
        return make_plan(A.shape, B.shape, layout, order, Target(A.device.type, A.dtype, at_least(tokens)))

    @property
    def n_in(self) -> int:
        """in = a_in * b_in."""
        return self.a_in * self.b_in

    @property
    def n_out(self) -> int:
        """out = a_out * b_out."""
        return self.a_out * self.b_out

    @property
    def intermediate(self) -> int:
        """Values a token between the two contractions."""
        return self.r * (self.a_in * self.b_out if self.order == "b_first" else self.a_out * self.b_in)


def make_plan(
    A: tuple[int, ...], B: tuple[int, ...], layout: Layout, order: Order | None, target: tuple[str, torch.dtype, int]
) -> Plan:
    """The plan for factors of the shapes A = (r, a_out, a_in), B = (r, b_out, b_in); order None takes the cheaper one.

    target: a `Target`, or the tuple that is one.

    Raises:
        ShapeError: if layout or order is unknown, or the shapes do not fit each other.
    """
    check_layout(layout)
    if order is not None and order not in ORDERS:
        raise ShapeError(f"order={order!r} is unknown; expected 'b_first', 'a_first' or None.")
    check_factors(A, B)
    sizes = (A[0], A[1], A[2], B[1], B[2], layout, order or cheaper_order(A[1], A[2], B[1], B[2]))
    return Plan(*sizes, default_variant(Plan(*sizes), Target(*target)))  # torch 2.6 does not compile `_replace`


def plan_for(
    x: tuple[int, ...],
    A: tuple[int, ...],
    B: tuple[int, ...],
    wanted: tuple[Layout, Order | None],
    target: tuple[torch.device, torch.dtype, bool],
) -> Plan:
    """The plan for tensors of the shapes x = (..., in), A = (r, a_out, a_in) and B = (r, b_out, b_in).

    wanted: layout and order. target: device, dtype, and whether
    x is of that dtype already and the factors are in fp32.

    Raises:
        ShapeError: see `make_plan`; or x is not as wide as the factors say.
    """
    device, dtype, may_widen = target
    goal = Target(device.type, dtype, at_least(math.prod(x[:-1])))
    plan = make_plan(A, B, *wanted, goal)
    if may_widen and multiplies_wide(goal):
        plan = plan._replace(wide=True)
    if turns(goal):
        plan = plan._replace(turned=True)
    check_width(x, plan)
    return plan


# Asked for in every call. A step has few shapes, and an entry is small.
cached_plan = functools.lru_cache(maxsize=16384)(plan_for)


def at_least(tokens: int) -> int:
    """Which of 0, FEW and MANY tokens there are at least."""
    return MANY if tokens >= MANY else FEW if tokens >= FEW else 0


def check_layout(layout: str) -> None:
    """Raises ShapeError if there is no such layout."""
    if layout not in LAYOUTS:
        raise ShapeError(f"layout={layout!r} is unknown; expected one of {LAYOUTS}.")


def check_factors(A: tuple[int, ...], B: tuple[int, ...], kernel: bool = False) -> None:
    """Check the shapes A = (r, a_out, a_in) and B = (r, b_out, b_in), with `kernel` (r, b_out, b_in, *kernel).

    Raises:
        ShapeError: with the shapes in the message.
    """
    if len(A) != 3 or (len(B) < 3 if kernel else len(B) != 3) or A[0] != B[0] or min(*A, *B) < 1:
        raise ShapeError(
            f"Expected A (r, a_out, a_in) and B (r, b_out, b_in{', *kernel' if kernel else ''}) with one r and all "
            f"sizes >= 1, got A {tuple(A)} and B {tuple(B)}."
        )


def check_values(x: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> None:
    """Refuse what torch would compute with whatever is in memory, or not at all: x (any shape) and A and B (any shape).

    Raises:
        ShapeError: if x is no strided tensor. BackendError: if A or B has no values.
    """
    if (A.is_meta or B.is_meta) and not x.is_meta:
        raise BackendError(
            f"Expected A and B on x's device, {x.device}, got them on {A.device} and {B.device}, where they have no "
            "values. Add and load adapters before the model is offloaded."
        )
    if x.is_nested or x.layout != torch.strided:
        kind = "nested" if x.is_nested else str(x.layout).removeprefix("torch.")
        raise ShapeError(f"Expected x as an ordinary (strided) tensor, got a {kind} one. Pad it, or make it dense.")


def check_width(x: tuple[int, ...], plan: Plan) -> None:
    """Raises ShapeError if x (..., in) is not as wide as the plan."""
    if not x or x[-1] != plan.n_in:
        raise ShapeError(
            f"Expected x with a last dimension of a_in * b_in = {plan.a_in} * {plan.b_in} = {plan.n_in}, "
            f"got x of shape {tuple(x)}."
        )


def default_variant(plan: Plan, target: Target) -> Variant:
    """The variant of the product with A that suits this plan's sizes. docs/performance.md has the measurements."""
    Q, u, n_in = plan.r * plan.a_in, plan.b_out, plan.n_in
    if u == 1:
        return "expanded"  # A (x) I_1 is A: one GEMM, nothing to build
    if target.device != "cpu":  # launches and tensor cores: one GEMM, while it stays small beside the frozen layer's
        return "expanded" if 4 * Q * u <= n_in else "batched"
    narrow = u < 12 and target.dtype == torch.float32
    if narrow and FEW <= target.tokens < MANY and plan.layout == "kron" and (u <= 5 or Q >= 8):
        return "gathered"  # of wider y with thinner A, copying y takes as long as the quicker GEMM saves
    if u <= 5 and 2 * Q * u <= n_in and target.tokens >= FEW:  # a matrix of at most half of dW's size
        return "expanded"
    # With few tokens, copying h takes longer than the quicker GEMM saves.
    pairs = narrow and target.tokens >= MANY and can_pair(plan) and plan.a_out >= 4 * Q
    return "paired" if pairs else "batched"


def multiplies_wide(target: Target) -> bool:
    """Whether 16-bit tensors are multiplied in fp32: with few tokens on a CPU, where oneDNN takes 9 us to set up a
    16-bit product that adds, and two casts take 3."""
    return target.device == "cpu" and target.dtype.itemsize == 2 and target.tokens < FEW


def turns(target: Target) -> bool:
    """Whether U = X B^T is computed as the transpose of B X^T. A product with few rows takes MKL 0.7 to 0.8 of the time
    that one with few columns takes, in fp32, the copy of U included; with many tokens the copy costs more than that."""
    return target.device == "cpu" and target.dtype == torch.float32 and FEW <= target.tokens < MANY


def can_pair(plan: Plan) -> bool:
    """Whether the variant "paired" exists."""
    return plan.layout == "kron" and plan.a_out % 2 == 0

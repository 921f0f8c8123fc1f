# SPDX-License-Identifier: Apache-2.0
"""The variants of the product with A: each against float64, and which one is taken."""

import itertools

import pytest
import torch
from rounding import assert_rounded, judge

from peft_krona.ops import kron_linear
from peft_krona.ops.linear import plan_of
from peft_krona.ops.node import run
from peft_krona.ops.operands import Frozen, Update
from peft_krona.ops.plan import MANY, VARIANTS, Plan, Target, default_variant
from peft_krona.ops.reference import delta_weight_loop
from peft_krona.ops.torch_impl import KronAdd, plain_op

LAYOUTS = ("kron", "diffusekrona")
CASES = [
    case for case in itertools.product(VARIANTS, LAYOUTS) if case[1] == "kron" or case[0] in ("batched", "expanded")
]
SHAPES = [(5, 1, 4, 3, 2, 6), (7, 3, 2, 5, 6, 3), (3, 2, 8, 1, 1, 9), (4, 2, 6, 4, 7, 1), (0, 2, 4, 2, 3, 5)]


def make(shape, layout, variant, dtype=torch.float64):
    """x, A, B as leaves, base, dy and the plan in that variant, always b_first."""
    tokens, r, a_out, a_in, b_out, b_in = shape
    x, A, B = torch.randn(tokens, a_in * b_in), torch.randn(r, a_out, a_in), torch.randn(r, b_out, b_in)
    base, dy = torch.randn(tokens, a_out * b_out), torch.randn(tokens, a_out * b_out)
    x, A, B, base, dy = (t.to(dtype) for t in (x, A, B, base, dy))
    return [t.requires_grad_() for t in (x, A, B)], base, dy, Plan.of(A, B, layout, "b_first")._replace(variant=variant)


def node(x, A, B, base, plan):
    return run(KronAdd, x, Update(A, B), base, plan)


def dense(leaves, base, dy, layout):
    """Output and gradients through dW in float64."""
    x, A, B = (t.detach().double().requires_grad_() for t in leaves)
    subscripts = "nik,nuv->iukv" if layout == "kron" else "nik,nuv->uikv"
    dW = torch.einsum(subscripts, A, B).reshape(base.shape[1], x.shape[1])
    torch.testing.assert_close(dW.detach(), delta_weight_loop(A.detach(), B.detach(), 1.0, layout))
    y = base.double() + x @ dW.T
    return [y.detach(), *torch.autograd.grad(y, (x, A, B), dy.double())]


@pytest.mark.parametrize("variant,layout", CASES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_variant_is_the_product(shape, variant, layout):
    leaves, base, dy, plan = make(shape, layout, variant)
    expected = dense(leaves, base, dy, layout)
    weight, bias = (
        torch.randn(base.shape[1], leaves[0].shape[1], dtype=torch.float64),
        torch.randn(base.shape[1]).double(),
    )
    frozen = leaves[0].detach() @ weight.T + bias
    for y, offset in (
        (node(*leaves, base, plan), 0),
        (node(*leaves, None, plan), -base),
        (plain_op(leaves[0], Update(*leaves[1:]), base, plan), 0),
        (node(*leaves, Frozen(weight, bias), plan), frozen - base),
    ):
        torch.testing.assert_close(y.detach(), expected[0] + offset)
        dx, dA, dB = torch.autograd.grad(y, leaves, dy)
        torch.testing.assert_close(dA, expected[2])
        torch.testing.assert_close(dB, expected[3])
    torch.testing.assert_close(dx, expected[1] + dy @ weight)


@pytest.mark.parametrize("variant,layout", CASES)
def test_every_variant_has_second_derivatives(variant, layout):
    leaves, base, _, plan = make((2, 2, 4, 2, 3, 2), layout, variant)
    weight = torch.randn(base.shape[1], leaves[0].shape[1], dtype=torch.float64)
    assert torch.autograd.gradgradcheck(lambda *leaves: node(*leaves, base, plan), leaves)
    assert torch.autograd.gradgradcheck(lambda *leaves: node(*leaves, Frozen(weight), plan), leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("variant,layout", CASES)
def test_every_variant_rounds_like_the_batched_one(variant, layout, dtype):
    shape = (33, 2, 16, 4, 6, 20)
    results = {}
    for name in (variant, "batched"):
        torch.manual_seed(0)
        leaves, base, dy, plan = make(shape, layout, name, dtype)
        y = node(*leaves, base, plan)
        results[name] = [y.detach(), *torch.autograd.grad(y, leaves, dy)]
    for got, batched, want in zip(results[variant], results["batched"], dense(leaves, base, dy, layout), strict=True):
        assert got.dtype == dtype
        error, plain = ((t.double() - want).abs().max() / want.abs().max() for t in (got, batched))
        assert error <= 2 * plain + torch.finfo(dtype).eps


@pytest.mark.parametrize("variant,layout", CASES)
def test_a_zero_factor_changes_nothing_bitwise(variant, layout):
    (x, A, B), base, _, plan = make((50, 2, 8, 4, 6, 8), layout, variant, torch.float32)
    assert torch.equal(node(x, A, torch.zeros_like(B), base, plan), base)


@pytest.mark.parametrize(
    "Q,b_out,a_out,n_in,layout,device,dtype,variant",
    [
        (4, 5, 64, 320, "kron", "cpu", torch.float32, "expanded"),
        (4, 5, 64, 320, "diffusekrona", "cpu", torch.bfloat16, "expanded"),
        (64, 5, 20, 320, "kron", "cpu", torch.float32, "batched"),  # expanded it would be as large as dW
        (8, 10, 64, 640, "kron", "cpu", torch.float32, "paired"),
        (8, 10, 64, 640, "kron", "cpu", torch.bfloat16, "batched"),
        (8, 10, 64, 640, "diffusekrona", "cpu", torch.float32, "batched"),
        (16, 8, 15, 240, "kron", "cpu", torch.float32, "batched"),  # 15 rows have no pairs
        (32, 10, 64, 640, "kron", "cpu", torch.float32, "batched"),  # too few rows for so many columns
        (4, 20, 64, 1280, "kron", "cpu", torch.float32, "batched"),
        (4, 1, 64, 64, "kron", "cpu", torch.float32, "expanded"),  # A (x) I is A
        (4, 20, 64, 1280, "kron", "cuda", torch.bfloat16, "expanded"),
        (32, 40, 32, 1280, "kron", "cuda", torch.bfloat16, "batched"),  # as large as the frozen layer
    ],
)
def test_default_variant(Q, b_out, a_out, n_in, layout, device, dtype, variant):
    plan = Plan(1, a_out, Q, b_out, n_in // Q, layout, "b_first")
    assert default_variant(plan, Target(device, dtype, MANY)) == variant


def test_the_variant_depends_on_the_tokens():
    x, A, B = torch.randn(300, 640), torch.randn(1, 64, 8), torch.randn(1, 10, 80)
    variants = {n: Plan.of(A, B, "kron", tokens=n).variant for n in (77, 255, 256, 4096)}
    assert variants == {77: "gathered", 255: "gathered", 256: "paired", 4096: "paired"}
    x, A, B = x.double(), A.double(), B.double()
    torch.testing.assert_close(kron_linear(x, A, B)[:77], kron_linear(x[:77], A, B))
    A, B = torch.randn(1, 64, 4), torch.randn(1, 5, 80)
    variants = {n: Plan.of(A, B, "kron", tokens=n).variant for n in (8, 63, 64, 4096)}
    assert variants == {8: "batched", 63: "batched", 64: "gathered", 4096: "expanded"}
    variants = {n: Plan.of(A.bfloat16(), B.bfloat16(), "kron", tokens=n).variant for n in (8, 64, 4096)}
    assert variants == {8: "batched", 64: "expanded", 4096: "expanded"}
    assert Plan.of(A, B, "diffusekrona", tokens=77).variant == "expanded"
    assert Plan.of(A.float(), torch.randn(1, 10, 80), "kron", tokens=77).variant == "batched"
    assert Plan.of(A.float(), torch.randn(1, 12, 80), "kron", tokens=77).variant == "batched"


@pytest.mark.parametrize("r", [1, 3])
@pytest.mark.parametrize("tokens,turned", [(63, False), (64, True), (255, True), (256, False)])
def test_products_with_some_tokens_are_turned(tokens, turned, r):
    x, A, B = torch.randn(tokens, 40), torch.randn(r, 16, 4), torch.randn(r, 7, 10)
    plan = plan_of(x, A, B, ("kron", "b_first"), torch.float32)
    assert plan.turned is turned and plan.variant != "expanded"
    leaves = [t.requires_grad_() for t in (x, A, B)]
    y = kron_linear(*leaves, order="b_first")

    def dense(x, A, B, dy):
        y = x @ torch.einsum("nik,nuv->iukv", A, B).reshape(112, 40).T
        return y, *torch.autograd.grad(y, (x, A, B), dy)

    dy = torch.randn_like(y)
    got = [y, *torch.autograd.grad(y, leaves, dy)]
    assert_rounded(got, *judge(dense, *leaves, dy), terms=tokens + 112 + 40 + 3, what="y, dX, dA, dB")

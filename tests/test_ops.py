# SPDX-License-Identifier: Apache-2.0
"""Every op against dW built from the definition in float64, outputs and all gradients."""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding import assert_rounded, judge

from peft_krona.errors import BackendError, ShapeError
from peft_krona.ops import Frozen, kron_conv, kron_delta_weight, kron_embedding, kron_linear
from peft_krona.ops.linear import plan_of
from peft_krona.ops.operands import Update
from peft_krona.ops.plan import Plan
from peft_krona.ops.reference import delta_weight_loop, kron_linear_reference
from peft_krona.ops.torch_impl import plain_op

LAYOUTS = ("kron", "diffusekrona")
ORDERS = ("b_first", "a_first")
# (leading shape of x, r, a_out, a_in, b_out, b_in): ragged, rectangular, degenerate, empty
SHAPES = [
    ((5,), 1, 4, 3, 2, 6),
    ((2, 7), 1, 2, 5, 6, 3),
    ((3,), 3, 4, 2, 3, 5),
    ((2, 1, 4), 2, 1, 4, 7, 2),
    ((6,), 2, 8, 1, 1, 9),
    ((4,), 4, 3, 4, 5, 1),
    ((0,), 2, 3, 2, 4, 5),
    ((2, 0), 1, 2, 2, 2, 2),
    ((), 1, 4, 3, 2, 6),
]


def make(lead, r, a_out, a_in, b_out, b_in, dtype=torch.float64, base=True):
    x = torch.randn(*lead, a_in * b_in, dtype=dtype)
    A = torch.randn(r, a_out, a_in, dtype=dtype)
    B = torch.randn(r, b_out, b_in, dtype=dtype)
    return x, A, B, torch.randn(*lead, a_out * b_out, dtype=dtype) if base else None


def reference_grads(x, A, B, base, dy, scale, layout):
    """Gradients through the dense product with dW, in float64."""
    x, A, B = (t.detach().double().requires_grad_() for t in (x, A, B))
    subscripts = "nik,nuv->iukv" if layout == "kron" else "nik,nuv->uikv"
    dW = scale * torch.einsum(subscripts, A, B).reshape(A.shape[1] * B.shape[1], -1)
    y = x @ dW.T
    return torch.autograd.grad(y, (x, A, B), dy.double())


def assert_close_to_rounding(actual, expected, plain, what):
    """Error against float64 at most twice that of plain torch in the same dtype (plus one rounding of the result)."""
    assert actual.shape == expected.shape
    if not actual.numel():
        return
    scale = expected.abs().max().clamp(min=1e-30)
    error = (actual.double() - expected).abs().max() / scale
    plain_error = (plain.double() - expected).abs().max() / scale
    allowed = 2 * plain_error + torch.finfo(actual.dtype).eps
    assert error <= allowed, f"{what}: relative error {error:.2e} > {allowed:.2e} (plain torch: {plain_error:.2e})"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_delta_weight_is_the_definition(shape, layout):
    _, A, B, _ = make(*shape)
    torch.testing.assert_close(kron_delta_weight(A, B, scale=0.7, layout=layout), delta_weight_loop(A, B, 0.7, layout))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_differ_by_the_perfect_shuffle_of_the_rows(layout):
    A, B = torch.randn(2, 3, 2), torch.randn(2, 4, 5)
    rows = torch.arange(12).view(3, 4).T.reshape(-1)  # row u*a_out + i of the shuffled is row i*b_out + u of the plain
    plain = kron_delta_weight(A, B)
    assert torch.equal(kron_delta_weight(A, B, layout="diffusekrona"), plain[rows])


@pytest.mark.parametrize("layout,order", itertools.product(LAYOUTS, ORDERS))
@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kron_linear_and_gradients(shape, layout, order, with_base):
    x, A, B, base = make(*shape, base=with_base)
    leaves = [t.requires_grad_() for t in (x, A, B, base) if t is not None]
    y = kron_linear(x, A, B, scale=0.3, base=base, layout=layout, order=order)
    torch.testing.assert_close(y.detach(), kron_linear_reference(x, A, B, scale=0.3, base=base, layout=layout))
    dy = torch.randn_like(y)
    grads = torch.autograd.grad(y, leaves, dy)
    for got, want in zip(grads, reference_grads(x, A, B, base, dy, 0.3, layout), strict=False):
        torch.testing.assert_close(got, want)
    if with_base:
        assert torch.equal(grads[3], dy)


@pytest.mark.parametrize("layout,order", itertools.product(LAYOUTS, ORDERS))
def test_gradcheck_and_double_backward(layout, order):
    x, A, B, base = (t.requires_grad_() for t in make((2, 2), 2, 2, 3, 2, 2))

    def op(x, A, B, base):
        return kron_linear(x, A, B, scale=0.5, base=base, layout=layout, order=order)

    assert torch.autograd.gradcheck(op, (x, A, B, base))
    assert torch.autograd.gradgradcheck(op, (x, A, B, base))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("factors", [(4, 2), (2, 6)], ids=["b_first", "a_first"])
def test_gradcheck_over_a_frozen_layer(layout, factors):
    a_out, a_in = factors
    x, A, B, _ = (t.requires_grad_() for t in make((2, 2), 2, a_out, a_in, 8 // a_out, 6 // a_in))
    W, b = torch.randn(8, 6, dtype=torch.float64), torch.randn(8, dtype=torch.float64)

    def op(x, A, B):
        return kron_linear(x, A, B, base=Frozen(W, b), scale=0.5, layout=layout)

    torch.testing.assert_close(op(x, A, B), kron_linear(x, A, B, scale=0.5, base=F.linear(x, W, b), layout=layout))
    assert torch.autograd.gradcheck(op, (x, A, B))
    assert torch.autograd.gradgradcheck(op, (x, A, B))


def test_factors_without_values_are_refused():
    """torch multiplies a CPU's and a meta tensor to whatever is in memory."""
    x, A, B, _ = make((5,), 1, 4, 3, 2, 6)
    with pytest.raises(BackendError, match="Expected A and B on x's device, cpu, got them on meta and cpu, where they"):
        kron_linear(x, A.to("meta"), B)
    with pytest.raises(BackendError, match="Add and load adapters before the model is offloaded"):
        kron_linear(x, A, B.to("meta"), base=Frozen(torch.randn(8, 18, dtype=x.dtype)))


@pytest.mark.parametrize("into", ["none", "base", "linear"])
@pytest.mark.parametrize("order", [None, "a_first"])
@pytest.mark.parametrize("strided", [False, True])
def test_without_gradients_the_same_bits(strided, order, into):
    x, A, B, base = (t.float().requires_grad_() for t in make((2, 5), 2, 4, 3, 2, 6))
    x = torch.cat([x, x], 2)[..., :18] if strided else x
    W, b, before = torch.randn(8, 18), torch.randn(8), base.detach().clone()

    def op():
        if into == "linear":
            return kron_linear(x, A, B, base=Frozen(W, b), scale=0.3)
        return kron_linear(x, A, B, scale=0.3, base=base if into == "base" else None, order=order)

    want = op()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            got = op()
        assert torch.equal(got, want) and not got.requires_grad
    assert want.requires_grad and torch.equal(base, before)


@pytest.mark.parametrize("into", ["none", "base", "linear", "linear with bias"])
@pytest.mark.parametrize("lead", [(5,), (2, 5), (2, 1, 5), ()], ids=str)
def test_the_output_may_be_changed_in_place(lead, into):
    """As nn.ReLU(inplace=True) does after a layer: autograd forbids it for a view that was made inside a node."""
    x, A, B, base = (t.requires_grad_() for t in make(lead, 1, 4, 3, 2, 6))
    W, b = torch.randn(8, 18, dtype=torch.float64), torch.randn(8, dtype=torch.float64)

    def op():
        if into.startswith("linear"):
            return kron_linear(x, A, B, base=Frozen(W, b if into == "linear with bias" else None))
        return kron_linear(x, A, B, base=base if into == "base" else None)

    leaves = (x, A, B)
    want = torch.autograd.grad(op().relu().square().sum(), leaves)
    got = torch.autograd.grad(op().relu_().square().sum(), leaves)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("factor_dtype", [torch.float32, None], ids=["fp32_factors", "same_dtype_factors"])
@pytest.mark.parametrize("layout,order", itertools.product(LAYOUTS, ORDERS))
@pytest.mark.parametrize("shape", [((33,), 1, 16, 4, 5, 20), ((2, 17), 3, 4, 16, 20, 5)], ids=str)
def test_half_precision_is_no_worse_than_plain_torch(shape, layout, order, factor_dtype, dtype):
    x, A, B, base = make(*shape, dtype=torch.float32)
    x, base = x.to(dtype), base.to(dtype)
    A, B = A.to(factor_dtype or dtype), B.to(factor_dtype or dtype)
    leaves = [t.requires_grad_() for t in (x, A, B)]
    y = kron_linear(x, A, B, scale=0.1, base=base, layout=layout, order=order)
    assert y.dtype == dtype
    dy = torch.randn_like(y)
    grads = torch.autograd.grad(y, leaves, dy)

    plain_A, plain_B = (A * 0.1).to(dtype), B.to(dtype)
    plan = Plan.of(A, B, layout, order)
    plain = plain_op(x.reshape(-1, x.shape[-1]), Update(plain_A, plain_B), base.reshape(-1, base.shape[-1]), plan)
    plain = plain.view_as(y)
    plain_grads = torch.autograd.grad(plain, leaves, dy)
    expected = kron_linear_reference(x, A, B, scale=0.1, base=base, layout=layout)
    assert_close_to_rounding(y, expected, plain, "y")
    for name, got, want, ordinary in zip(
        "xAB", grads, reference_grads(x, A, B, base, dy, 0.1, layout), plain_grads, strict=True
    ):
        assert_close_to_rounding(got, want, ordinary, f"d{name}")


def strided(t, kind):
    """The same values in other strides."""
    if kind == "transposed":
        return t.transpose(0, 1).contiguous().transpose(0, 1)
    if kind == "sliced":
        wide = torch.full((*t.shape[:-1], 2 * t.shape[-1]), float("nan"), dtype=t.dtype)
        wide[..., ::2] = t
        return wide[..., ::2]
    return t[:1].expand_as(t)


@pytest.mark.parametrize("kind", ["transposed", "sliced", "expanded"])
@pytest.mark.parametrize("layout,order", itertools.product(LAYOUTS, ORDERS))
def test_strided_inputs(kind, layout, order):
    x, A, B, base = make((3, 4), 2, 4, 3, 2, 5)
    x, base = strided(x, kind), strided(base, kind)
    A, B = strided(A, "sliced"), strided(B, "sliced")
    y = kron_linear(x, A, B, base=base, layout=layout, order=order)
    torch.testing.assert_close(y, kron_linear_reference(x, A, B, base=base, layout=layout))


@settings(max_examples=150, deadline=None)
@given(
    tokens=st.integers(0, 9),
    sizes=st.tuples(*[st.integers(1, 12)] * 4),
    r=st.integers(1, 4),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    strides=st.sampled_from([None, "transposed", "sliced", "expanded"]),
    with_base=st.booleans(),
    scale=st.sampled_from([0.0, 1.0, -0.37, 16.0]),
    seed=st.integers(0, 99),
)
def test_kron_linear_property(tokens, sizes, r, layout, dtype, strides, with_base, scale, seed):
    """Output and gradients for any shape, layout, dtype and strides are as near to float64 as plain torch's."""
    torch.manual_seed(seed)
    x, A, B, base = make((tokens,), r, *sizes, base=with_base)
    x, A, B, base = (None if t is None else t.to(dtype) for t in (x, A, B, base))
    if strides is not None:
        x, base = strided(x, strides), None if base is None else strided(base, strides)
    leaves = [t.requires_grad_() for t in (x, A, B)]
    y = kron_linear(x, A, B, scale=scale, base=base, layout=layout)
    dy = torch.randn(y.shape, dtype=dtype)
    got = (y, *torch.autograd.grad(y, leaves, dy))
    batched = Plan.of(A, B, layout)._replace(variant="batched")
    plain = plain_op(x.contiguous(), Update(A * scale, B), None if base is None else base.contiguous(), batched)
    plain = (plain, *torch.autograd.grad(plain, leaves, dy))
    expected = (kron_linear_reference(x, A, B, scale=scale, base=base, layout=layout),)
    expected += reference_grads(x, A, B, base, dy, scale, layout)
    for what, *results in zip(("y", "dx", "dA", "dB"), got, expected, plain, strict=True):
        assert_close_to_rounding(*results, what)


def test_two_runs_are_bitwise_equal():
    x, A, B, base = make((65,), 2, 8, 4, 5, 8, dtype=torch.float32)
    runs = []
    for _ in range(2):
        leaves = [t.detach().clone().requires_grad_() for t in (x, A, B)]
        y = kron_linear(*leaves, base=base)
        runs.append((y, *torch.autograd.grad(y.sum(), leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_computes_in_the_autocast_dtype_and_returns_fp32_gradients(dtype):
    x, A, B, _ = make((9,), 1, 4, 2, 3, 5, dtype=torch.float32)
    leaves = [t.requires_grad_() for t in (x, A, B)]
    with torch.autocast("cpu", dtype):
        y = kron_linear(*leaves)
    assert y.dtype == dtype
    expected = kron_linear(*(t.to(dtype) for t in leaves))
    assert torch.equal(y, expected)
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(y.float().sum(), leaves))


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_casts_the_frozen_layer(x_dtype):
    """As F.linear does, also where x comes from another autocast layer and is in its dtype already."""
    x, A, B, _ = make((9,), 1, 4, 2, 3, 5, dtype=torch.float32)
    W, b = torch.randn(12, 10), torch.randn(12)
    with torch.autocast("cpu", torch.bfloat16):
        y = kron_linear(x.to(x_dtype), A, B, base=Frozen(W, b))
        want = kron_linear(x, A, B, base=F.linear(x, W, b))
    assert y.dtype == torch.bfloat16
    x, A, B, W, b = (t.bfloat16().double() for t in (x, A, B, W, b))
    assert_close_to_rounding(y, kron_linear_reference(x, A, B, base=F.linear(x, W, b)), want, "y")


def test_fp32_base_keeps_its_dtype_over_a_bf16_product():
    x, A, B, base = make((9,), 1, 4, 2, 3, 5, dtype=torch.float32)
    y = kron_linear(x.bfloat16(), A, B, base=base)
    assert y.dtype == torch.float32
    expected = kron_linear_reference(x.bfloat16(), A.bfloat16(), B.bfloat16(), base=base)
    assert_close_to_rounding(y, expected, base + kron_linear(x.bfloat16(), A, B).float(), "y")


def test_zero_factor_changes_nothing_bitwise():
    x, A, B, base = make((50,), 2, 8, 4, 5, 8, dtype=torch.float32)
    for layout, order in itertools.product(LAYOUTS, ORDERS):
        assert torch.equal(kron_linear(x, A, torch.zeros_like(B), base=base, layout=layout, order=order), base)


@pytest.mark.parametrize("layout,order", itertools.product(LAYOUTS, ORDERS))
@pytest.mark.parametrize("r", [1, 3])
def test_gradients_have_the_strides_of_their_leaves(r, layout, order):
    """DistributedDataParallel copies a gradient, with a warning, that has others."""
    x, A, B, base = make((7,), r, 8, 4, 6, 5, dtype=torch.float32)
    leaves = [t.requires_grad_() for t in (x, A, B)]
    y = kron_linear(*leaves, base=base, layout=layout, order=order)
    for leaf, gradient in zip(leaves, torch.autograd.grad(y.sum(), leaves), strict=True):
        assert gradient.stride() == leaf.stride()


def test_no_gradient_is_computed_for_what_does_not_need_one():
    x, A, B, _ = make((4,), 1, 2, 3, 2, 2)
    B.requires_grad_()
    (dB,) = torch.autograd.grad(kron_linear(x, A, B).sum(), (B,))
    torch.testing.assert_close(dB, reference_grads(x, A, B, None, torch.ones(4, 4), 1.0, "kron")[2])


def test_meta_tensors_get_shapes():
    x, A, B, base = (t.to("meta") for t in make((2, 3), 1, 4, 2, 6, 5, dtype=torch.float32))
    assert kron_linear(x, A, B, base=base).shape == (2, 3, 24)
    assert kron_linear(x, A, B, base=Frozen(torch.empty(24, 10, device="meta"))).device.type == "meta"


def test_works_under_torch_func():
    x, A, B, _ = make((4,), 1, 2, 3, 2, 2)
    got = torch.func.grad(lambda A: kron_linear(x, A, B).square().sum())(A)
    leaf = A.clone().requires_grad_()
    (want,) = torch.autograd.grad(kron_linear(x, leaf, B).square().sum(), leaf)
    torch.testing.assert_close(got, want)
    per_sample = torch.vmap(lambda x: kron_linear(x, A, B))(x.unsqueeze(1))
    torch.testing.assert_close(per_sample.squeeze(1), kron_linear(x, A, B))


@pytest.mark.parametrize(
    "kwargs,message",
    [
        ({"x": torch.zeros(2, 5)}, r"last dimension of a_in \* b_in = 3 \* 2 = 6, got x of shape \(2, 5\)"),
        ({"A": torch.zeros(4, 3)}, r"Expected A \(r, a_out, a_in\).*got A \(4, 3\) and B \(1, 5, 2\)"),
        ({"B": torch.zeros(2, 5, 2)}, r"with one r and all sizes >= 1, got A \(1, 4, 3\) and B \(2, 5, 2\)"),
        ({"x": torch.zeros(2, 0), "A": torch.zeros(1, 4, 0)}, r"all sizes >= 1, got A \(1, 4, 0\) and B"),
        ({"base": torch.zeros(2, 19)}, r"Expected base of shape \(2, 20\), got \(2, 19\)"),
        ({"base": Frozen(torch.zeros(6, 20))}, r"Expected a frozen weight of shape \(20, 6\), got \(6, 20\)"),
        ({"layout": "shuffled"}, r"layout='shuffled' is unknown; expected one of \('kron', 'diffusekrona'\)"),
        ({"order": "fast"}, r"order='fast' is unknown"),
    ],
)
def test_bad_input_is_named(kwargs, message):
    good = {"x": torch.zeros(2, 6), "A": torch.zeros(1, 4, 3), "B": torch.zeros(1, 5, 2)}
    with pytest.raises(ShapeError, match=message):
        kron_linear(**(good | kwargs))


@pytest.mark.parametrize(
    "kwargs,message",
    [
        ({"layout": "shuffled"}, r"layout='shuffled' is unknown; expected one of \('kron', 'diffusekrona'\)"),
        (
            {"A": torch.zeros(4, 3)},
            r"B \(r, b_out, b_in, \*kernel\) with one r .* got A \(4, 3\) and B \(1, 4, 2, 3, 3\)",
        ),
        ({"B": torch.zeros(2, 4, 2, 3, 3)}, r"with one r .* got A \(1, 3, 2\) and B \(2, 4, 2, 3, 3\)"),
        ({"B": torch.zeros(1, 4, 2)}, r"Expected B .* with a kernel of 1 to 3 sizes, got B \(1, 4, 2\)"),
        ({"B": torch.zeros(1, 4, 2, 1, 1, 1, 1)}, r"with a kernel of 1 to 3 sizes, got B \(1, 4, 2, 1, 1, 1, 1\)"),
        ({"B": torch.zeros(1, 4, 0, 3, 3)}, r"all sizes >= 1, got A"),
        (
            {"x": torch.zeros(1, 5, 7, 7)},
            r"Expected x \(N, in, height, width\) or .* 1 \* 2 \* 2 = 4, got x of shape \(1, 5",
        ),
        ({"x": torch.zeros(4, 7)}, r"or \(in, height, width\) .* got x of shape \(4, 7\)"),
        ({"groups": 2}, r"in = groups \* a_in \* b_in = 2 \* 2 \* 2 = 8, got x of shape \(1, 4, 7, 7\)"),
        ({"groups": 5}, r"Expected groups to divide a_out \* b_out = 3 \* 4 = 12, got groups=5"),
        ({"groups": 0}, r"got groups=0"),
        (
            {"x": torch.zeros(1, 4, 7, 7).to_sparse()},
            "Expected x as an ordinary .strided. tensor, got a sparse_coo one",
        ),
        ({"A": torch.zeros(1, 3, 2, device="meta")}, "got them on meta and cpu, where they have no values"),
    ],
)
def test_bad_input_of_a_convolution_is_named(kwargs, message):
    good = {"x": torch.zeros(1, 4, 7, 7), "A": torch.zeros(1, 3, 2), "B": torch.zeros(1, 4, 2, 3, 3)}
    good |= {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}
    assert kron_conv(**good).shape == (1, 12, 7, 7)
    with pytest.raises((ShapeError, BackendError), match=message):
        kron_conv(**(good | kwargs))


@pytest.mark.parametrize(
    "kwargs,message",
    [
        ({"layout": "shuffled"}, r"layout='shuffled' is unknown; expected one of \('kron', 'diffusekrona'\)"),
        ({"A": torch.zeros(4, 3)}, r"Expected A \(r, a_out, a_in\).*got A \(4, 3\) and B \(1, 5, 2\)"),
        ({"B": torch.zeros(1, 5, 2, 1)}, r"B \(r, b_out, b_in\) with one r .* and B \(1, 5, 2, 1\)"),
        ({"B": torch.zeros(2, 5, 2)}, r"with one r and all sizes >= 1, got A \(1, 4, 3\) and B \(2, 5, 2\)"),
        ({"B": torch.zeros(1, 5, 2, device="meta")}, "got them on cpu and meta, where they have no values"),
    ],
)
def test_bad_input_of_an_embedding_is_named(kwargs, message):
    good = {"ids": torch.tensor([0, 5]), "A": torch.zeros(1, 4, 3), "B": torch.zeros(1, 5, 2)}
    assert kron_embedding(**good).shape == (2, 20)
    with pytest.raises((ShapeError, BackendError), match=message):
        kron_embedding(**(good | kwargs))


@pytest.mark.parametrize(
    "kwargs", [{"layout": "shuffled"}, {"A": torch.zeros(4, 3)}, {"B": torch.zeros(2, 5, 2)}], ids=str
)
def test_bad_input_of_a_delta_weight_is_named(kwargs):
    with pytest.raises(ShapeError, match=r"is unknown; expected one of|with one r and all sizes >= 1, got A"):
        kron_delta_weight(**({"A": torch.zeros(1, 4, 3), "B": torch.zeros(1, 5, 2)} | kwargs))


CONVS = [  # dims, in, out, kernel, stride, padding, dilation, groups, (a_out, a_in), r
    (1, 6, 8, 3, 1, 1, 1, 1, (4, 2), 1),
    (2, 6, 8, 3, 2, 1, 1, 1, (4, 3), 2),
    (2, 12, 4, 1, 1, 0, 1, 1, (2, 6), 1),
    (2, 6, 8, 3, 1, "same", 2, 1, (2, 3), 1),
    (3, 4, 6, 2, 1, 0, 1, 1, (3, 2), 2),
    (2, 8, 12, 3, 1, 1, 1, 4, (4, 2), 2),
    (2, 6, 12, 3, 1, 1, 1, 3, (2, 2), 1),
    (1, 6, 6, 3, 1, 1, 1, 6, (3, 1), 1),
    (2, 32, 4, 1, 1, 0, 1, 1, (2, 16), 3),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "case,channels_last",
    [*((case, False) for case in CONVS), *((case, True) for case in CONVS if case[0] > 1)],
    ids=lambda value: str(value) if isinstance(value, tuple) else "channels last" if value else "contiguous",
)
def test_kron_conv_and_gradients(case, channels_last, layout):
    dims, n_in, n_out, k, stride, padding, dilation, groups, (a_out, a_in), r = case
    conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[dims]
    x = torch.randn(2, n_in, *[7] * dims, dtype=torch.float64)
    if channels_last:
        x = x.to(memory_format=torch.channels_last if dims == 2 else torch.channels_last_3d)
    x.requires_grad_()
    A = torch.randn(r, a_out, a_in, dtype=torch.float64, requires_grad=True)
    B = torch.randn(r, n_out // a_out, n_in // groups // a_in, *[k] * dims, dtype=torch.float64, requires_grad=True)
    args = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    y = kron_conv(x, A, B, scale=0.3, layout=layout, **args)
    want = conv(x, delta_weight_loop(A, B, 0.3, layout), **args)
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(kron_conv(x[0], A, B, scale=0.3, layout=layout, **args), y[0])
    dy = torch.randn_like(y)
    dense = conv(x, kron_delta_weight(A, B, scale=0.3, layout=layout), **args)
    for got, want in zip(torch.autograd.grad(y, (x, A, B), dy), torch.autograd.grad(dense, (x, A, B), dy), strict=True):
        torch.testing.assert_close(got, want)


def test_convolutions_of_channels_last_images_under_vmap():
    x = torch.randn(3, 2, 8, 5, 5, dtype=torch.float64).transpose(2, 4)  # (3, N, 5, 5, 8)
    x = x.movedim(4, 2)  # back to channels first, with channels last in memory
    A, B = torch.randn(1, 4, 2, dtype=torch.float64), torch.randn(1, 2, 4, 3, 3, dtype=torch.float64)
    conv = functools.partial(kron_conv, A=A, B=B, stride=(1, 1), padding=(1, 1), dilation=(1, 1))
    torch.testing.assert_close(torch.func.vmap(conv)(x), torch.stack([conv(image) for image in x]))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_convolution_keeps_no_copy_of_its_input(memory_format):
    x = torch.randn(2, 16, 8, 8).to(memory_format=memory_format).requires_grad_()
    A, B = torch.randn(1, 4, 4, requires_grad=True), torch.randn(1, 2, 4, 3, 3, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        kron_conv(x, A, B, stride=(1, 1), padding=(1, 1), dilation=(1, 1))
    large = [t for t in kept if t.numel() >= x.numel()]
    assert large and all(t.data_ptr() == x.data_ptr() for t in large)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ids_shape", [(7,), (2, 5), (), (0,)])
def test_kron_embedding_and_gradients(ids_shape, layout):
    A = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    B = torch.randn(2, 2, 5, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(0, 20, ids_shape)
    y = kron_embedding(ids, A, B, scale=0.3, layout=layout)
    torch.testing.assert_close(y, F.embedding(ids, delta_weight_loop(A, B, 0.3, layout).T.contiguous()))
    dense = F.embedding(ids, kron_delta_weight(A, B, scale=0.3, layout=layout).T)
    dy = torch.randn_like(y)
    for got, want in zip(torch.autograd.grad(y, (A, B), dy), torch.autograd.grad(dense, (A, B), dy), strict=True):
        torch.testing.assert_close(got, want)


# -- few tokens in 16 bits ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "product alone"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_few_tokens_of_16_bits_are_multiplied_in_fp32(dtype, frozen):
    """On a CPU, with the fp32 factors that PEFT keeps: as near to float64 as rounding the result once or twice."""
    x, A, B = torch.randn(3, 5, 12, dtype=dtype), torch.randn(2, 4, 3), torch.randn(2, 2, 4)
    weight, bias, dy = torch.randn(8, 12, dtype=dtype), torch.randn(8, dtype=dtype), torch.randn(3, 5, 8, dtype=dtype)
    base = Frozen(weight, bias) if frozen else None
    leaves = [t.requires_grad_() for t in (x, A, B)]
    y = kron_linear(*leaves, scale=0.5, base=base)
    gradients = torch.autograd.grad(y, leaves, dy)
    assert (y.dtype, *(g.dtype for g in gradients)) == (dtype, dtype, torch.float32, torch.float32)

    def product_and_gradients(x, A, B, dy):
        y = x @ (0.5 * torch.einsum("nik,nuv->iukv", A, B)).reshape(8, 12).T
        return y, *torch.autograd.grad(y, (A, B), dy)

    (product, *wanted), (_, *sizes) = judge(product_and_gradients, x, A, B, dy)
    layer = F.linear(x, weight, bias).detach().double() if frozen else 0 * product
    # The product is rounded to 16 bits, and its sum with the layer's own output, which F.linear has rounded; 1 % of
    # that is far more than fp32 adds.
    allowed = 1.01 * torch.finfo(dtype).eps / 2 * (product.abs() + y.detach().double().abs())
    assert ((y.detach().double() - product - layer).abs() <= allowed + torch.finfo(dtype).tiny).all()
    assert_rounded(gradients[1:], wanted, sizes, terms=15 + 8 + 12 + 2, what="dA, dB", dtype=torch.float32)


@pytest.mark.parametrize(
    "device,dtype,factors,tokens,wide",
    [
        ("cpu", torch.bfloat16, torch.float32, 63, True),
        ("cpu", torch.float16, torch.float32, 1, True),
        ("cpu", torch.bfloat16, torch.float32, 64, False),
        ("cpu", torch.bfloat16, torch.bfloat16, 8, False),
        ("cpu", torch.float32, torch.float32, 8, False),
        ("meta", torch.bfloat16, torch.float32, 8, False),
    ],
)
def test_which_products_are_in_fp32(device, dtype, factors, tokens, wide):
    x = torch.empty(tokens, 12, dtype=dtype, device=device)
    A, B = (torch.empty(1, *sizes, dtype=factors, device=device) for sizes in ((4, 3), (2, 4)))
    assert plan_of(x, A, B, ("kron", None), dtype).wide is wide
    assert not plan_of(x.float(), A, B, ("kron", None), torch.bfloat16).wide, "autocast rounds the factors as well"

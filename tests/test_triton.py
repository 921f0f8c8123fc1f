# SPDX-License-Identifier: Apache-2.0
"""The fused kernels: numbers on a GPU or in Triton's interpreter, and what they compile to for GPUs that are not here.

The numeric tests run on a CUDA device. Without one, `test_numbers_in_the_interpreter` runs this file once more in a
process with TRITON_INTERPRET=1, on the CPU.
"""

import importlib
import importlib.util
import os
import subprocess
import sys
from functools import partial

import interpreter_bf16
import pytest
import torch
import torch.nn.functional as F
from cross_compile import ARCHITECTURES, SHAPES, NoDevice, compile_for
from rounding import assert_rounded, judge
from test_ops import LAYOUTS, ORDERS, make, reference_grads
from torch import nn

from peft_krona.errors import BackendError
from peft_krona.ops import Frozen, backend, kron_linear
from peft_krona.ops.operands import Update
from peft_krona.ops.plan import Plan
from peft_krona.ops.reference import kron_linear_reference
from peft_krona.ops.triton.library import fused, fused_add, fused_backward

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs triton: pip install 'peft-krona[triton]'")

if INTERPRETED:
    interpreter_bf16.install()


def runs_kernels(test):
    return needs_triton(test if INTERPRETED else pytest.mark.gpu(test))


# (leading shape of x, r, a_out, a_in, b_out, b_in): ragged, rectangular, several tiles a side, degenerate, empty
CASES = [
    ((5,), 1, 4, 3, 2, 6),
    ((3, 5), 3, 9, 5, 6, 3),
    ((3,), 2, 70, 2, 3, 5),
    ((2,), 1, 3, 70, 66, 2),
    ((5,), 1, 2, 2, 5, 70),
    ((2, 1, 4), 2, 1, 4, 7, 2),
    ((6,), 2, 8, 1, 1, 9),
    ((17,), 1, 16, 4, 5, 20),
    ((33,), 1, 64, 8, 10, 80),
    ((0,), 2, 3, 2, 4, 5),
    ((), 1, 4, 3, 2, 6),
]
WIDE = [] if INTERPRETED else [((77,), 1, 64, 8, 20, 256), ((1000,), 1, 64, 4, 20, 320), ((500,), 2, 32, 32, 40, 40)]


def assert_as_close_as_torch(got, want, plain, terms, what):
    """Error against float64 at most twice plain torch's, plus one rounding of the result, plus what the order of an
    fp32 sum of so many terms can make: sqrt(terms) roundings of half an ulp."""
    assert got.shape == want.shape and got.dtype == plain.dtype
    eps = torch.finfo(got.dtype).eps
    if not want.numel():
        return
    got, want, plain = (t.detach().double().cpu() / want.abs().max().clamp(min=1e-30).cpu() for t in (got, want, plain))
    error, plain_error = (got - want).abs().max().item(), (plain - want).abs().max().item()
    allowed = 2 * plain_error + eps + terms**0.5 * torch.finfo(torch.float32).eps / 2
    assert error <= allowed, f"{what}: relative error {error:.2e} > {allowed:.2e} (plain torch: {plain_error:.2e})"


def on_device(tensors, dtype):
    return [None if t is None else t.to(DEVICE, dtype) for t in tensors]


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", CASES + WIDE, ids=str)
def test_output_and_gradients_are_as_close_as_plain_torch(case, order, layout, dtype):
    x, A, B, base = on_device(make(*case, base=sum(case[0]) % 2 == 1), dtype)
    leaves = [t.requires_grad_() for t in (x, A, B)]
    dy = torch.randn(*case[0], case[2] * case[4], device=DEVICE, dtype=dtype)
    results = {}
    for name in ("triton", "torch"):
        y = kron_linear(x, A, B, scale=0.3, base=base, layout=layout, order=order, backend=name)
        results[name] = (y, *torch.autograd.grad(y, leaves, dy))
    expected = kron_linear_reference(x, A, B, scale=0.3, base=base, layout=layout)
    cpu = [None if t is None else t.detach().cpu() for t in (x, A, B, base, dy)]
    expected = (expected, *reference_grads(*cpu, 0.3, layout)[:3])
    r, a_out, a_in, b_out, b_in = case[1:]
    terms = {
        "y": r * (a_in + b_in),
        "dx": r * (a_out + b_out),
        "dA": x.shape[:-1].numel() * b_out + b_in,
        "dB": x.shape[:-1].numel() * a_in + a_out,
    }
    for what, got, plain, want in zip(terms, *results.values(), expected, strict=True):
        assert_as_close_as_torch(got, want, plain, terms[what], what)


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factors", [(4, 2), (2, 6)], ids=["b_first", "a_first"])
def test_one_node_with_a_frozen_layer(factors, dtype):
    """The product is added in place to the layer's own output, and dX to the layer's own dX."""
    a_out, a_in = factors
    x, A, B, _ = on_device(make((2, 9), 2, a_out, a_in, 8 // a_out, 6 // a_in), dtype)
    W, b = (torch.randn(*shape, device=DEVICE, dtype=dtype) for shape in ((8, 6), (8,)))
    leaves = [t.requires_grad_() for t in (x, A, B)]
    dy = torch.randn(2, 9, 8, device=DEVICE, dtype=dtype)
    results = {}
    for name in ("triton", "torch"):
        y = kron_linear(x, A, B, base=Frozen(W, b), scale=0.3, backend=name)
        results[name] = (y, *torch.autograd.grad(y, leaves, dy))
    double = [t.detach().double().requires_grad_() for t in (x, A, B)]
    y = kron_linear(*double, scale=0.3, base=F.linear(double[0], W.double(), b.double()), backend="torch")
    expected = (y, *torch.autograd.grad(y, double, dy.double()))
    for what, got, plain, want in zip(("y", "dx", "dA", "dB"), *results.values(), expected, strict=True):
        assert_as_close_as_torch(got, want, plain, 64, what)


@runs_kernels
@pytest.mark.parametrize("order", ORDERS)
def test_strided_rows_of_x_and_base(order):
    x, A, B, base = on_device(make((6,), 2, 4, 3, 2, 5), torch.float32)
    wide_x, wide_base = torch.cat([x, x], 1), torch.cat([base, base], 1)
    want = kron_linear(x, A, B, base=base, order=order, backend="triton")
    for strided_x, strided_base in (
        (wide_x[:, : x.shape[1]], wide_base[:, : base.shape[1]]),
        (x.t().contiguous().t(), base.t().contiguous().t()),
    ):
        got = kron_linear(strided_x, A, B, base=strided_base, order=order, backend="triton")
        assert torch.equal(got, want)
    expanded = kron_linear(x[:1].expand(6, -1), A, B, order=order, backend="triton")
    row = [sizes.expand(6, -1) for (sizes,) in judge(lambda x, A, B: kron_linear(x, A, B), x[:1], A, B)]
    assert_rounded(expanded, *row, terms=2 * (3 + 5))  # r (a_in + b_in)


@runs_kernels
@pytest.mark.parametrize("order", ORDERS)
def test_offsets_beyond_32_bits(order, tmp_path):
    """Rows 2^30 values apart. On the CPU they lie in a sparse file, of which a few pages exist."""
    _, A, B, _ = on_device(make((3,), 1, 4, 3, 2, 5, base=False), torch.float32)
    apart, n_in = 2**30, 15
    if INTERPRETED:
        storage = torch.from_file(str(tmp_path / "sparse"), shared=True, size=2 * apart + n_in)
    else:
        storage = torch.empty(2 * apart + n_in, device=DEVICE)
    x = storage.as_strided((3, n_in), (apart, 1))
    x.copy_(torch.randn(3, n_in))
    y = kron_linear(x, A, B, order=order, backend="triton")
    assert_rounded([y], *judge(kron_linear, x.contiguous(), A, B), terms=3 + 5)


@runs_kernels
@pytest.mark.parametrize("order", ORDERS)
def test_a_zero_factor_changes_nothing_bitwise(order):
    x, A, B, base = on_device(make((20,), 2, 8, 4, 5, 8), DTYPES[-1])
    y = kron_linear(x, A, torch.zeros_like(B), base=base, order=order, backend="triton")
    assert torch.equal(y, base)


@runs_kernels
@pytest.mark.parametrize("order", ORDERS)
def test_two_runs_are_bitwise_equal(order):
    x, A, B, base = on_device(make((20,), 1, 8, 4, 5, 8), DTYPES[-1])
    runs = []
    for _ in range(2):
        leaves = [t.detach().clone().requires_grad_() for t in (x, A, B)]
        y = kron_linear(*leaves, base=base, order=order, backend="triton")
        runs.append((y, *torch.autograd.grad(y.float().square().sum(), leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("sizes", [(1, 64, 4, 20, 320), (1, 64, 8, 10, 80)], ids=str)
def test_many_programs_repeat_their_bits(sizes, order):
    """A program that read what another thread has not written yet would give another result now and then."""
    r, a_out, a_in, b_out, b_in = sizes
    x, A, B, dy = (
        torch.randn(*shape, device="cuda").to(dtype).requires_grad_()
        for shape, dtype in (
            ((4096, a_in * b_in), torch.bfloat16),
            ((r, a_out, a_in), torch.float32),
            ((r, b_out, b_in), torch.float32),
            ((4096, a_out * b_out), torch.bfloat16),
        )
    )
    W = torch.randn(a_out * b_out, a_in * b_in, device="cuda", dtype=torch.bfloat16)
    first = None
    for _ in range(20):
        y = fused_add(x, Update(A, B, 0.5), Frozen(W), Plan.of(A, B, "kron", order))
        run = (y.detach(), *torch.autograd.grad(y, (x, A, B), dy))
        first = first or run
        assert all(torch.equal(a, b) for a, b in zip(first, run, strict=True))


@runs_kernels
@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (1, 2)], ids=["x", "A", "B", "A and B"])
def test_only_some_gradients(needed):
    tensors = on_device(make((9,), 1, 4, 3, 2, 5)[:3], torch.float32)

    def gradients(*leaves, backend="torch"):
        leaves = [t.detach().clone().requires_grad_(i in needed) for i, t in enumerate(leaves)]
        y = kron_linear(*leaves, backend=backend)
        return torch.autograd.grad(y.square().sum(), [leaves[i] for i in needed])

    forward, backward = 3 + 5, 9 * 5 + 4 * 2 + 1  # dA and dB sum over tokens, dx over the outputs; and 2 y
    assert_rounded(gradients(*tensors, backend="triton"), *judge(gradients, *tensors), terms=forward + backward)


@runs_kernels
@pytest.mark.parametrize("order", ORDERS)
def test_the_eager_node_is_the_op(order):
    """Scaling is part of the node, and dA and dB come in the factors' dtype."""
    x, A, B, base = on_device(make((9,), 2, 4, 3, 2, 5), torch.float32)
    leaves = [x.requires_grad_(), A.double().requires_grad_(), B.double().requires_grad_(), base.requires_grad_()]
    plan, dy = Plan.of(A, B, "kron", order), torch.randn_like(base)

    def outcome(y, *leaves, dy=dy):
        return y, *torch.autograd.grad(y, leaves, dy)

    eager = outcome(fused_add(leaves[0], Update(*leaves[1:3], 0.3), leaves[3], plan), *leaves)
    op = outcome(fused(x, leaves[1] * 0.3, leaves[2], leaves[3], None, None, "kron", order)[0], *leaves)
    judged = judge(lambda *t: outcome(kron_linear(*t[:3], scale=0.3, base=t[3]), *t[:4], dy=t[4]), *leaves, dy)
    terms = 2 * max(3 + 5, 4 + 2, 9 * 5, 9 * 3) + 4  # s A, the casts of both factors, the base
    for results in (eager, op):
        assert [t.dtype for t in results[1:]] == [t.dtype for t in leaves]
        assert_rounded(results, *judged, terms, dtype=torch.float32)


@runs_kernels
@pytest.mark.parametrize("into", ["none", "base", "linear", "linear with bias"])
@pytest.mark.parametrize("strided", [False, True])
def test_more_dimensions_and_changes_in_place(strided, into):
    """Slices of a wider tensor, as of q, k and v in one, are read where they are."""
    x, A, B, base = on_device(make((2, 5), 1, 4, 3, 2, 6), torch.float32)
    if strided:
        x, base = torch.cat([x, x], 2)[..., : x.shape[2]], torch.cat([base, base], 2)[..., : base.shape[2]]
    W, b = torch.randn(8, 18, device=DEVICE), torch.randn(8, device=DEVICE)
    inputs = (*(t.requires_grad_() for t in (x, A, B)), base, W, b)

    def op(x, A, B, base, W, b, name):
        if into.startswith("linear"):
            return kron_linear(x, A, B, base=Frozen(W, b if into == "linear with bias" else None), backend=name)
        return kron_linear(x, A, B, base=base if into == "base" else None, backend=name)

    def gradients(*inputs, name="torch"):
        y = op(*inputs, name)
        assert y.shape == (2, 5, 8)
        with torch.no_grad():
            assert torch.equal(op(*inputs, name), y)
        return torch.autograd.grad(y.relu_().square().sum(), inputs[:3])

    judged = judge(gradients, *inputs)
    for name in ("triton", "torch"):
        assert_rounded(gradients(*inputs, name=name), *judged, terms=18 + 3 + 6 + 2 + 10 * 6 + 8)


@runs_kernels
@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float32), (torch.float64, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_factors_of_other_dtypes_and_strides(order, dtypes):
    """They are rounded to x's dtype, and gradients come in theirs."""
    x, A, B, base = on_device(make((9,), 2, 4, 3, 2, 5), torch.float32)
    A, B = A.to(dtypes[0]).mT.contiguous().mT, B.to(dtypes[1]).mT.contiguous().mT

    def outcome(x, A, B, base, dy, name="torch"):
        leaves = [t.detach().requires_grad_() for t in (x, A, B)]
        y = kron_linear(*leaves, scale=0.3, base=base, order=order, backend=name)
        return y, *torch.autograd.grad(y, leaves, dy)

    inputs = (x, A, B, base, torch.randn_like(base))
    got_dtypes = [t.dtype for t in outcome(*inputs, name="triton")]
    assert got_dtypes == [t.dtype for t in (x, x, A, B)]
    for got, want, size in zip(outcome(*inputs, name="triton"), *judge(outcome, *inputs), strict=True):
        terms, eps = 2 * max(3 + 5, 4 + 2, 9 * 5, 9 * 3) + 5, torch.finfo(got.dtype).eps
        cast = eps / torch.finfo(torch.float32).eps if got.dtype.itemsize == 2 else 0  # of a gradient to its dtype
        assert_rounded(got, want, size, terms + cast, dtype=torch.float32)


@runs_kernels
def test_second_derivatives_are_refused():
    x, A, B, _ = on_device(make((3,), 1, 2, 3, 2, 5), torch.float32)
    (dx,) = torch.autograd.grad(
        kron_linear(x.requires_grad_(), A, B, backend="triton").square().sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dx.sum().backward()


@runs_kernels
@pytest.mark.parametrize("form", ["product", "base", "layer"])
def test_opcheck(form, monkeypatch):
    """Of small whole numbers, whose sums are exact in any order; opcheck compares with a fixed tolerance."""
    monkeypatch.setattr(torch.testing, "assert_close", partial(torch.testing.assert_close, rtol=0, atol=0))
    x, A, B, base = (t.round() for t in on_device(make((9,), 2, 4, 3, 2, 5), torch.float32))
    leaves = [t.requires_grad_() for t in (x, A, B)]
    weight, bias = torch.randn(8, 15, device=DEVICE).round(), torch.randn(8, device=DEVICE).round()
    extra = {"product": (None, None, None), "base": (base, None, None), "layer": (None, weight, bias)}[form]
    torch.library.opcheck(fused, (*leaves, *extra, "kron", "b_first"))
    _, h = fused(*(t.detach() for t in leaves), *extra, "kron", "b_first")
    arguments = (base, x.detach(), h, A.detach(), B.detach(), extra[1], "kron", "b_first")
    for needs in ((True, True), (False, True), (True, False)):
        torch.library.opcheck(fused_backward, (*arguments, *needs))


@runs_kernels
@pytest.mark.parametrize("compiler", ["aot_eager"] if INTERPRETED else ["aot_eager", "inductor"])
def test_torch_compile_keeps_the_kernels_as_single_nodes(compiler, monkeypatch):
    monkeypatch.setattr(backend, "DEFAULT", "triton")
    torch._dynamo.reset()
    x, A, B, _ = on_device(make((9,), 1, 4, 3, 2, 5), torch.float32)
    leaves = [t.requires_grad_() for t in (x, A, B)]
    frozen = nn.Linear(15, 8, device=DEVICE).requires_grad_(False)

    def function(x, A, B, weight=frozen.weight, bias=frozen.bias, **backend):
        y = kron_linear(x, A, B, scale=0.5, base=Frozen(weight, bias), **backend)
        return kron_linear(x, A, B, base=y.relu(), **backend).square().sum()

    def outcome(x, A, B, weight, bias):
        y = function(x, A, B, weight, bias, backend="torch")
        return y, *torch.autograd.grad(y, (x, A, B))

    explained = torch._dynamo.explain(function)(*leaves)
    assert explained.graph_break_count == 0
    calls = [str(node.target) for node in explained.graphs[0].graph.nodes]
    assert sum("peft_krona.fused" in call for call in calls) == 2
    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    judged = judge(outcome, *leaves, frozen.weight, frozen.bias)
    for called in (compiled, function):
        y = called(*leaves)
        terms = 15 + 3 + 5 + 4 + 9 * 8 + 9 * 5 + 9  # forward, the sum of squares, backward
        assert_rounded((y, *torch.autograd.grad(y, leaves)), *judged, terms)


@runs_kernels
def test_a_change_of_scale_does_not_compile_anew():
    """s belongs to the graph as a number that may change, not as a constant."""
    torch._dynamo.reset()
    x, A, B, _ = on_device(make((9,), 1, 4, 3, 2, 5), torch.float32)
    graphs, scale = [], {"s": 1.0}

    def counter(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda x: kron_linear(x, A, B, scale=scale["s"], backend="triton"), backend=counter)
    for scale["s"] in (0.1, 0.3, 0.5, 0.7, 0.9):
        judged = judge(lambda x, A, B: kron_linear(x, A, B, scale=scale["s"], backend="torch"), x, A, B)
        assert_rounded([compiled(x)], *judged, terms=3 + 5 + 1)
    assert len(graphs) <= 2


@pytest.mark.gpu
@needs_triton
def test_a_model_trains_the_same_on_both_backends(monkeypatch):
    from peft import get_peft_model

    from peft_krona import KronAConfig

    losses = {}
    for name in ("float64", "torch", "triton"):
        monkeypatch.setattr(backend, "DEFAULT", "triton" if name == "triton" else "torch")
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(640, 1280), nn.GELU(), nn.Linear(1280, 640)).cuda()
        model = get_peft_model(model, KronAConfig(target_modules=["0", "2"]))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        x, target = torch.randn(256, 640, device="cuda"), torch.randn(256, 640, device="cuda")
        if name == "float64":
            model, x, target = model.double(), x.double(), target.double()
        losses[name] = []
        for _ in range(20):
            with torch.autocast("cuda", torch.bfloat16, enabled=name != "float64"):
                loss = F.mse_loss(model(x).to(target.dtype), target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[name].append(loss.item())
    assert losses["triton"][-1] < 0.99 * losses["triton"][0]
    off = {name: max(abs(a - b) for a, b in zip(losses[name], losses["float64"], strict=True)) for name in losses}
    assert off["triton"] <= 2 * off["torch"] + torch.finfo(torch.bfloat16).eps * losses["float64"][0], off


# -- without a GPU --------------------------------------------------------------------------------------------------


@needs_triton
@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="is what runs this")
def test_numbers_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
    env = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


# Every kernel and order for every architecture; layouts, dtypes, with and without something to add take turns.
# `python tests/cross_compile.py` compiles all combinations.
VARIANTS = [
    ("forward", "1280 (64,4)", "kron", torch.bfloat16, 80, True),
    ("forward", "640 (64,8)", "diffusekrona", torch.float16, 90, False),
    ("forward", "2048 to 1280 (64,8)", "kron", torch.bfloat16, 100, True),
    ("forward", "1280 (4,64)", "diffusekrona", torch.bfloat16, 80, False),
    ("forward", "1280 (4,64)", "kron", torch.float16, 90, True),
    ("forward", "1280 (4,64)", "kron", torch.bfloat16, 100, True),
    ("forward", "1280 (64,4)", "kron", torch.float32, 90, True),
    ("backward", "640 (64,8)", "kron", torch.float16, 80, True),
    ("backward", "1280 (64,4)", "kron", torch.bfloat16, 90, True),
    ("backward", "1280 (64,4)", "diffusekrona", torch.bfloat16, 100, False),
    ("backward", "1280 (4,64)", "diffusekrona", torch.bfloat16, 80, False),
    ("backward", "1280 (4,64)", "diffusekrona", torch.float16, 90, True),
    ("backward", "1280 (4,64)", "kron", torch.float16, 100, True),
    ("backward", "odd r=3", "diffusekrona", torch.float32, 80, True),
]


def _variant_name(variant):
    kernel, shape, layout, dtype, architecture, add = variant
    return f"{kernel} {shape} {layout} {str(dtype)[6:]} sm_{architecture}{' add' if add else ''}"


def _offline_reason():
    if not HAS_TRITON:
        return "needs triton: pip install 'peft-krona[triton]'"
    if INTERPRETED:
        return "the interpreter compiles nothing"
    from importlib.metadata import version

    numbers = tuple(int(part) for part in version("triton").split(".")[:2])
    return None if numbers >= (3, 4) else "compiling for sm_100 needs triton >= 3.4"


@pytest.mark.skipif(_offline_reason() is not None, reason=str(_offline_reason()))
@pytest.mark.parametrize("variant", VARIANTS, ids=_variant_name)
def test_compiles_within_the_limits(variant):
    kernel, shape, layout, dtype, architecture, add = variant
    assert architecture in ARCHITECTURES
    taken = compile_for(kernel, SHAPES[shape], layout, dtype, architecture, add)
    assert taken.shared <= 99 * 1024  # the smallest limit of all supported parts; sm_80 has 163 KiB, sm_90 up 227 KiB
    assert taken.stack <= (128 if architecture == 80 else 64), taken  # spilled; sm_80 holds operands in registers
    if (kernel, layout, dtype.itemsize) == ("forward", "kron", 2):
        assert taken.token_lanes == 1, taken  # lanes along the tokens would touch a line of memory each


@pytest.mark.skipif(_offline_reason() is not None, reason=str(_offline_reason()))
def test_a_step_of_a_layer_is_three_launches(monkeypatch):
    """Scaling and casting the factors and their gradients is part of the kernels."""
    from triton.runtime.driver import driver

    device, state = NoDevice(90), vars(driver)
    for name, value in state.items():
        monkeypatch.setitem(state, name, value)  # to be put back afterwards
    driver.set_active(device)
    x = torch.randn(77, 640, dtype=torch.bfloat16, requires_grad=True)
    W = torch.randn(640, 640, dtype=torch.bfloat16)
    A, B = torch.randn(1, 64, 8, requires_grad=True), torch.randn(1, 10, 80, requires_grad=True)
    y = fused_add(x, Update(A, B, 0.5), Frozen(W), Plan.of(A, B, "kron"))
    assert device.launched == ["forward_kernel"]
    y.sum().backward()
    assert device.launched == ["forward_kernel", "backward_kernel", "sum_kernel"]
    assert (x.grad.dtype, A.grad.dtype, B.grad.dtype) == (torch.bfloat16, torch.float32, torch.float32)


@pytest.mark.skipif(_offline_reason() is not None, reason=str(_offline_reason()))
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", [(1, 64, 4, 20, 320), (1, 1, 1, 1, 1), (2, 1024, 2048, 2048, 4096)], ids=str)
def test_tiles_keep_both_limits(shape, order, itemsize):
    from peft_krona.ops.triton import launch

    z = launch.sizes(Plan(*shape, "kron", order), itemsize)
    assert launch.shared_bytes(z, itemsize) <= launch.SHARED_LIMIT
    assert launch.accumulators(z) <= launch.ACCUMULATOR_LIMIT
    tiles = {name: getattr(z, name) for name in ("BT", "BP", "BQ", "BW", "BM", "BD", "BC")}
    assert all(size & (size - 1) == 0 for size in tiles.values())
    assert all(tiles[name] >= 16 for name in ("BP", "BQ", "BM", "BD", "BC")) and z.BT * z.BW >= 16


# -- choosing a backend ---------------------------------------------------------------------------------------------


def small():
    return torch.zeros(2, 6), torch.zeros(1, 4, 3), torch.zeros(1, 5, 2)


@pytest.mark.parametrize(
    "state,dtype,message",
    [
        ({"_TRITON": None}, torch.float32, r"backend='triton' was asked for, but the package triton is not inst"),
        (
            {"_TRITON": (3, 0)},
            torch.float32,
            r"the kernels need triton 3.4 or newer, and 3.0 is installed",
        ),
        ({"_TRITON": (3, 9)}, torch.float64, r"compute in torch.float32, .*, not in torch.float64"),
        ({"_TRITON": (3, 9), "_INTERPRETED": False}, torch.float32, r"on 'cpu' and the kernels need a CUDA device"),
    ],
)
def test_what_cannot_run_says_why(monkeypatch, state, dtype, message):
    for name, value in state.items():
        monkeypatch.setattr(backend, name, value)
    with pytest.raises(BackendError, match=message):
        kron_linear(*(t.to(dtype) for t in small()), backend="triton")


def test_the_environment_chooses_and_the_argument_overrides(monkeypatch):
    monkeypatch.setattr(backend, "_TRITON", None)
    monkeypatch.setattr(backend, "DEFAULT", "triton")
    with pytest.raises(BackendError, match="PEFT_KRONA_BACKEND=triton was asked for, but"):
        kron_linear(*small())
    assert kron_linear(*small(), backend="torch").shape == (2, 20)
    with pytest.raises(BackendError, match=r"backend='cuda' is unknown; expected one of \('torch', 'triton'\)\.$"):
        kron_linear(*small(), backend="cuda")
    for asked, default, source in (("auto", "torch", "backend='auto'"), (None, "auto", "PEFT_KRONA_BACKEND=auto")):
        monkeypatch.setattr(backend, "DEFAULT", default)
        with pytest.raises(BackendError, match=f'{source} is unknown; .*\\. "auto" was taken out: leave it away'):
            kron_linear(*small(), backend=asked)


@pytest.mark.parametrize("value,expected", [(None, "torch"), ("", "torch"), ("triton", "triton")])
def test_the_default_is_torch_unless_the_environment_says_otherwise(monkeypatch, value, expected):
    with monkeypatch.context() as patch:
        patch.delenv("PEFT_KRONA_BACKEND", raising=False)
        if value is not None:
            patch.setenv("PEFT_KRONA_BACKEND", value)
        importlib.reload(backend)
        chosen = backend.DEFAULT
    importlib.reload(backend)
    assert chosen == expected


def test_one_log_line_a_backend(monkeypatch, caplog):
    monkeypatch.setattr(backend, "_announced", set())
    caplog.set_level("INFO", logger="peft_krona.ops.backend")
    for _ in range(3):
        kron_linear(*small())
    assert [r.message for r in caplog.records] == ["Kronecker products on cpu in torch.float32: backend 'torch'."]

# SPDX-License-Identifier: Apache-2.0
"""torch.compile without graph breaks, and memory: no dense matrix in forward or backward."""

import functools
import itertools

import pytest
import torch
from adapted import LAYERS, adapt, adapted_mlp, config, krona_layers, make_layer
from peft import LoraConfig, get_peft_model
from tiny import unet
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peft_krona import KronAConfig

LAYOUTS = ("kron", "diffusekrona")


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# -- torch.compile -----------------------------------------------------------------------------------------------------


@functools.cache
def why_not_whole() -> str:
    """Why this torch compiles no model of PEFT's in one graph, whatever the adapter; "" if it does."""
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
    try:
        torch.compile(model, fullgraph=True, backend="eager")(torch.ones(1, 4))
    except torch._dynamo.exc.Unsupported as error:
        return f"torch {torch.__version__} does not compile PEFT's own forward: {str(error).splitlines()[0][:120]}"
    return ""


@pytest.fixture
def whole():
    if why_not_whole():
        pytest.skip(why_not_whole())


@pytest.mark.usefixtures("whole")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ["linear b_first", "linear a_first r3", "transformers Conv1D", "conv2d",
                                  "conv2d groups", "embedding"])  # fmt: skip
def test_one_graph_and_equal_numbers(name, training):
    _, model, layer, x = make_layer(name, torch.float64)
    model.train(training)
    x = x.requires_grad_() if x.is_floating_point() else x
    leaves = [layer.krona_A["default"], layer.krona_B["default"], *([x] if x.is_floating_point() else [])]
    want = model(x)
    dy = torch.randn_like(want)
    want_gradients = torch.autograd.grad(want, leaves, dy)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got = compiled(x)
    torch.testing.assert_close(got, want)
    for g, w in zip(torch.autograd.grad(got, leaves, dy), want_gradients, strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.usefixtures("whole")
def test_one_compilation_a_shape():
    counter = CompileCounterWithBackend("aot_eager")
    model = adapted_mlp(krona_dropout=0.1, module_dropout=0.1)
    model.add_adapter("other", config(["lin1"], r=2))
    model.base_model.set_adapter(["default", "other"])
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=counter)
    for count, shape in enumerate([(3, 10), (2, 4, 10), (3, 10), (2, 4, 10), (7, 10), (3, 10)]):
        compiled(torch.randn(*shape)).sum().backward()
        assert counter.frame_count == [1, 2, 2, 2, 3, 3][count]
    model.eval()
    for _ in range(3):
        compiled(torch.randn(3, 10))
    assert counter.frame_count == 4
    assert sum(torch._dynamo.utils.counters["graph_break"].values()) == 0


@pytest.mark.usefixtures("whole")
def test_dynamic_shapes_compile_once():
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(adapted_mlp(), fullgraph=True, dynamic=True, backend=counter)
    for tokens in (2, 3, 5, 8, 13):
        compiled(torch.randn(tokens, 10))
    assert counter.frame_count == 1


@pytest.mark.usefixtures("whole")
def test_module_dropout_draws_anew_in_a_compiled_graph():
    model, layer = adapt(nn.Linear(8, 8), module_dropout=0.5)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 8)
    skipped = [torch.allclose(compiled(x), layer.base_layer(x)) for _ in range(60)]
    assert 10 < sum(skipped) < 50


@pytest.mark.usefixtures("whole")
@pytest.mark.usefixtures("float64")
def test_merged_and_disabled_models_compile():
    model = adapted_mlp()
    x = torch.randn(3, 10)
    model.merge_adapter()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), model(x))
    model.unmerge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), model(x))


@pytest.mark.usefixtures("float64")
def test_a_unet_compiles_whole():
    model = unet()
    model.add_adapter(KronAConfig(a_out=8, a_in=2, init_weights=False))
    inputs = torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 5, 32)
    with torch.no_grad():
        want = model(*inputs, return_dict=False)[0]
        got = torch.compile(model, fullgraph=True, backend="eager")(*inputs, return_dict=False)[0]
    torch.testing.assert_close(got, want)


@pytest.mark.usefixtures("whole")
@pytest.mark.slow
@pytest.mark.usefixtures("float64")
def test_inductor():
    model = adapted_mlp(targets=["lin0"])
    x = torch.randn(3, 10)
    want = model(x)
    (dA,) = torch.autograd.grad(want.sum(), model.base_model.model.lin0.krona_A["default"])
    try:
        got = torch.compile(model, fullgraph=True)(x)
    except torch._inductor.exc.InductorError as error:  # needs a C++ compiler
        if "compiler" in str(error).lower():
            pytest.skip(f"inductor cannot compile here: {str(error).splitlines()[0]}")
        raise
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got.sum(), model.base_model.model.lin0.krona_A["default"])[0], dA)


# -- base and adapter in one autograd node -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name,layout", itertools.product([n for n in LAYERS if n.startswith("linear")], LAYOUTS))
def test_one_node_computes_what_two_do(monkeypatch, name, layout, dtype):
    _, model, layer, x = make_layer(name, dtype, layout)
    x.requires_grad_()
    leaves = (layer.krona_A["default"], layer.krona_B["default"], x)

    def run():
        y = model(x)
        return y, *torch.autograd.grad(y, leaves, torch.ones_like(y))

    assert layer._plain_frozen_base("default") is not None
    one = run()
    monkeypatch.setattr(type(layer), "_plain_frozen_base", lambda *args: None)
    two = run()
    for what, a, b in zip(["y", "dA", "dB"], one, two, strict=False):
        assert torch.equal(a, b), what
    size = sum(t.detach().abs().max() for t in (one[3], two[3]))  # dX: one rounding of a sum against three
    assert (one[3] - two[3]).abs().max() <= 3 * torch.finfo(dtype).eps * size


# -- memory ------------------------------------------------------------------------------------------------------------


class LargestStorage(TorchDispatchMode):
    """Sizes, in elements, of the storages that operations create; views and what existed before do not count."""

    def __init__(self, model):
        super().__init__()
        self.known = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.largest, self.by = 0, None

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                size = tensor.untyped_storage().nbytes() // tensor.element_size()
                if size > self.largest:
                    self.largest, self.by = size, str(function)
        return out


WIDE = {
    "linear b_first": (lambda: nn.Linear(256, 128), lambda: torch.randn(4, 256), {"a_out": 16, "a_in": 4}),
    "linear a_first": (lambda: nn.Linear(256, 128), lambda: torch.randn(4, 256), {"a_out": 4, "a_in": 64, "r": 2}),
    "conv": (lambda: nn.Conv2d(64, 64, 3), lambda: torch.randn(1, 64, 4, 4), {"a_out": 8, "a_in": 4}),
    "conv 1x1": (lambda: nn.Conv2d(128, 64, 1), lambda: torch.randn(1, 128, 2, 2), {"a_out": 4, "a_in": 32}),
    "conv groups": (lambda: nn.Conv2d(64, 64, 3, groups=2), lambda: torch.randn(1, 64, 4, 4), {"a_out": 8, "a_in": 4}),
    "embedding": (lambda: nn.Embedding(512, 64), lambda: torch.arange(9), {"a_out": 8, "a_in": 16}),
}


@pytest.mark.parametrize("node", ["one", "two"])
@pytest.mark.parametrize("name,layout", itertools.product(WIDE, LAYOUTS))
def test_no_dense_matrix_in_forward_or_backward(monkeypatch, name, layout, node):
    make, make_x, kwargs = WIDE[name]
    model, layer = adapt(make(), layout=layout, krona_dropout=0.1 if node == "two" else 0.0, **kwargs)
    x = make_x()
    x = x.requires_grad_() if x.is_floating_point() else x
    dense = layer.get_base_layer().weight.numel()
    with LargestStorage(model) as seen:
        y = model(x)
        y.backward(torch.ones_like(y))
    assert layer.krona_A["default"].grad is not None
    assert seen.largest < dense / 2, f"{seen.by} created {seen.largest} elements, dW has {dense}"


def test_the_meter_sees_a_dense_matrix():
    model, layer = adapt(nn.Linear(256, 128))
    with LargestStorage(model) as seen:
        layer.get_delta_weight("default")
    assert seen.largest == 256 * 128


def test_only_the_small_intermediate_is_kept_for_backward():
    """b_first keeps U = X B^T, in/a_in*... = b_out * a_in a token, beside x itself."""
    model = get_peft_model(nn.Sequential(nn.Linear(256, 128)), config("0", a_out=32, a_in=4))
    (layer,) = krona_layers(model).values()
    x = torch.randn(50, 256)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model(x)
    known = {x.data_ptr(), *(p.data_ptr() for p in model.parameters())}
    extra = sum(t.numel() for t in saved if t.data_ptr() not in known)
    assert extra == 50 * 4 * 4 and layer.factors("default") == (32, 4)

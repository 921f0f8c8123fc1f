# SPDX-License-Identifier: Apache-2.0
"""Every adapted layer type against a float64 reference that builds dW by the index formula in a loop."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from adapted import (
    LAYERS,
    adapt,
    assert_within_rounding,
    config,
    gradients,
    krona_layers,
    make_layer,
    mlp,
    reference,
)
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model, inject_adapter_in_model
from test_ops import strided
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration
from transformers.pytorch_utils import Conv1D

from peft_krona import KronAConfig
from peft_krona.errors import UnsupportedLayerError
from peft_krona.ops.reference import delta_weight_loop

LAYOUTS = ("kron", "diffusekrona")
FEW = ["linear b_first", "linear a_first r3", "transformers Conv1D", "conv1d", "conv2d", "conv2d groups", "conv3d",
       "embedding"]  # fmt: skip


def leaf(x):
    return x.requires_grad_() if x.is_floating_point() else x


# -- outputs and gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name,layout", itertools.product(LAYERS, LAYOUTS))
def test_output_and_gradients(name, layout, training):
    base, model, layer, x = make_layer(name, torch.float64, layout)
    model.train(training)
    y = model(leaf(x))
    dy = torch.randn_like(y)
    expected, expected_gradients = reference(base, layer, x, dy)
    torch.testing.assert_close(y.detach(), expected)
    for what, got in gradients(layer, y, x, dy).items():
        torch.testing.assert_close(got, expected_gradients[what], msg=lambda m, w=what: f"d{w}: {m}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("factors", ["fp32 factors", "same dtype"])
@pytest.mark.parametrize("name,layout", itertools.product(FEW, LAYOUTS))
def test_low_precision(name, layout, factors, dtype):
    base, model, layer, x = make_layer(name, dtype, layout)
    assert layer.krona_A["default"].dtype == torch.float32  # PEFT keeps adapters in fp32
    if factors == "same dtype":
        layer.krona_A.to(dtype), layer.krona_B.to(dtype)
    y = model(leaf(x))
    assert y.dtype == dtype
    dy = torch.randn_like(y)
    assert_within_rounding(base, layer, x, dy, y, gradients(layer, y, x, dy), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FEW)
def test_autocast_on_an_fp32_model(name, dtype):
    base, model, layer, x = make_layer(name, torch.float32)
    with torch.autocast("cpu", dtype):
        y = model(leaf(x))
        assert y.dtype == base(x).dtype
    dy = torch.randn_like(y)
    got = gradients(layer, y, x, dy)
    assert all(g.dtype == torch.float32 for g in got.values())
    assert_within_rounding(base, layer, x, dy, y, got, dtype)


@pytest.mark.parametrize("name", FEW)
def test_autocast_on_a_bf16_model_with_an_fp32_input(name):
    base, model, layer, x = make_layer(name, torch.bfloat16)
    x = x.float() if x.is_floating_point() else x
    with torch.autocast("cpu", torch.bfloat16):
        y = model(leaf(x))
    assert y.dtype == torch.bfloat16
    dy = torch.randn_like(y)
    assert_within_rounding(base, layer, x, dy, y, gradients(layer, y, x, dy), torch.bfloat16)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", FEW)
def test_disabled_is_the_base_layer_bit_for_bit(name, training):
    base, model, _, x = make_layer(name, torch.float32)
    model.train(training)
    assert not torch.equal(model(x), base(x))
    with model.disable_adapter():
        assert torch.equal(model(x), base(x))
    assert not torch.equal(model(x), base(x))


@pytest.mark.parametrize("kind", ["transposed", "sliced", "expanded"])
@pytest.mark.parametrize("name", ["linear b_first", "linear a_first r3", "conv2d", "conv2d groups", "conv3d"])
def test_strided_inputs(name, kind):
    base, model, layer, x = make_layer(name, torch.float64)
    x = strided(x, kind)
    torch.testing.assert_close(model(x).detach(), reference(base, layer, x)[0])


def test_channels_last():
    base, model, layer, x = make_layer("conv2d", torch.float64)
    x = x.to(memory_format=torch.channels_last)
    model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x).detach(), reference(base, layer, x)[0])


@pytest.mark.parametrize("name", ["linear b_first", "transformers Conv1D", "conv2d", "conv2d groups", "embedding"])
def test_empty_batch(name):
    base, model, layer, x = make_layer(name, torch.float32)
    x = x[:0].clone()
    y = model(leaf(x))
    assert y.shape == base(x).shape and y.numel() == 0
    for what, got in gradients(layer, y, x, torch.ones_like(y)).items():
        assert not got.any() and got.shape == (x if what == "x" else getattr(layer, f"krona_{what}")["default"]).shape


def test_no_tokens_in_a_sequence():
    _, model, layer, _ = make_layer("linear b_first", torch.float32)
    y = model(torch.zeros(2, 0, 12))
    y.sum().backward()
    assert y.shape == (2, 0, 8) and not layer.krona_A["default"].grad.any()


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", ["linear b_first", "conv2d"])
def test_gradient_checkpointing_gives_the_same_bits(name, use_reentrant):
    _, model, layer, x = make_layer(name, torch.float32, krona_dropout=0.3, module_dropout=0.3)
    model.train()
    runs = []
    for call in (model, lambda x: checkpoint(model, x, use_reentrant=use_reentrant)):
        torch.manual_seed(5)
        model.zero_grad()
        x.grad = None
        y = call(x.requires_grad_())
        y.square().sum().backward()
        runs.append((y, x.grad, layer.krona_A["default"].grad, layer.krona_B["default"].grad))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("trains", [["weight"], ["bias"], ["weight", "bias"]], ids="+".join)
@pytest.mark.parametrize("name", ["linear b_first", "conv2d"])
def test_a_base_layer_that_trains_gets_its_gradient(name, trains):
    """bias="all", full fine-tuning beside the adapter: nothing of the base may be left out of the graph."""
    base, model, layer, x = make_layer(name, torch.float64)
    for parameter in trains:
        getattr(layer.base_layer, parameter).requires_grad_()
    y = model(x)
    dy = torch.randn_like(y)
    want = torch.autograd.grad(base(x), [getattr(base, t) for t in trains], dy)
    got = torch.autograd.grad(y, [getattr(layer.base_layer, t) for t in trains], dy)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.usefixtures("float64")
def test_hooks_of_the_base_layer_run():
    _, model, layer, x = make_layer("linear b_first", torch.float64)
    before, seen = model(x), []
    handle = layer.base_layer.register_forward_hook(lambda m, args, out: seen.append(out.shape) or out + 1)
    torch.testing.assert_close(model(x), before + 1)
    handle.remove()
    assert seen == [(2, 3, 8)] and torch.equal(model(x), before)


def test_gradient_penalty_through_an_adapted_linear():
    """create_graph=True through the single autograd node of base and adapter."""
    base, model, layer, x = make_layer("linear b_first", torch.float64)
    A, B = layer.krona_A["default"], layer.krona_B["default"]

    def penalty(y):
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), (A, B))

    x.requires_grad_()
    delta = layer.get_delta_weight("default")  # differentiable, dense
    for got, want in zip(penalty(model(x)), penalty(base(x) + F.linear(x, delta)), strict=True):
        torch.testing.assert_close(got, want)


# -- several adapters --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FEW)
def test_several_active_adapters_add_up(name):
    base, model, layer, x = make_layer(name, torch.float64)
    model.add_adapter("other", config(a_out=2, a_in=1, r=2, layout="diffusekrona", alpha=1.3))
    model.to(torch.float64)
    model.base_model.set_adapter(["default", "other"])
    y0 = base(x)
    parts = [reference(base, layer, x, name=n)[0] - y0 for n in ("default", "other")]
    torch.testing.assert_close(model(x), y0 + parts[0] + parts[1])
    model.set_adapter("other")
    torch.testing.assert_close(model(x), y0 + parts[1])


@pytest.mark.parametrize("name", [n for n in FEW if n != "linear a_first r3"])
def test_adapter_names_mix_adapters_in_a_batch(name):
    base, model, layer, x = make_layer(name, torch.float64)
    model.add_adapter("other", config(a_out=2, a_in=1, r=2, layout="diffusekrona"))
    model.to(torch.float64).eval()
    x = torch.cat([x, x])
    names = ["default", "other", "__base__", "default"][: len(x)]
    want = {"__base__": base(x)} | {n: reference(base, layer, x, name=n)[0] for n in ("default", "other")}
    got = model(x, adapter_names=names)
    for row, wanted in enumerate(names):
        torch.testing.assert_close(got[row], want[wanted][row])
    assert torch.equal(got[2], base(x)[2])
    torch.testing.assert_close(model(x), want["default"])  # nothing is left behind


@pytest.mark.usefixtures("float64")
def test_adapter_names_reach_layers_that_only_one_adapter_has():
    model = get_peft_model(mlp(), config(["lin0"]), adapter_name="a")
    model.add_adapter("b", config(["lin1"]))
    model.eval()
    x = torch.randn(3, 10)
    got = model(x, adapter_names=["b", "__base__", "a"])
    for row, active in ((0, "b"), (2, "a")):
        model.set_adapter(active)
        torch.testing.assert_close(got[row], model(x)[row])
    with model.disable_adapter():
        torch.testing.assert_close(got[1], model(x)[1])


@pytest.mark.usefixtures("float64")
def test_adapter_names_with_modules_to_save():
    model = get_peft_model(mlp(), config(["lin0"], modules_to_save=["lin1"]), adapter_name="a")
    model.eval()
    torch.nn.init.normal_(model.base_model.model.lin1.modules_to_save["a"].weight)
    x = torch.randn(2, 10)
    got = model(x, adapter_names=["a", "__base__"])
    torch.testing.assert_close(got[0], model(x)[0])
    with model.disable_adapter():
        torch.testing.assert_close(got[1], model(x)[1])


def test_adapter_names_misuse():
    model, _ = adapt(nn.Linear(8, 8))
    x = torch.zeros(2, 8)
    model.train()
    with pytest.raises(ValueError, match=r"Cannot pass `adapter_names` when the model is in training mode"):
        model(x, adapter_names=["default"] * 2)
    model.eval()
    with pytest.raises(ValueError, match=r"Length of `adapter_names` should be the same .* but got 1 and 2"):
        model(x, adapter_names=["default"])
    with pytest.raises(ValueError, match=r"Trying to infer with non-existing adapter\(s\): nobody"):
        model(x, adapter_names=["default", "nobody"])
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"Cannot pass `adapter_names` when there are merged adapters"):
        model(x, adapter_names=["default"] * 2)


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_adapter_names_in_generate(kind, num_beams):
    if kind == "gpt2":
        base = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=32))
    else:
        base = T5ForConditionalGeneration(
            T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=40, decoder_start_token_id=0)
        )
    settings = {"init_weights": False, "a_out": 4, "a_in": 4, "alpha": 20.0}
    model = get_peft_model(base.eval(), KronAConfig(**settings), adapter_name="a")
    model.add_adapter("b", KronAConfig(**settings))
    model.eval()
    ids = torch.randint(2, 40, (4, 5))
    kwargs = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": num_beams, "do_sample": False, "pad_token_id": 1}
    got = model.generate(input_ids=ids, adapter_names=["a", "b", "__base__", "b"], **kwargs)
    separate = {}
    for name in ("a", "b"):
        model.set_adapter(name)
        separate[name] = model.generate(input_ids=ids, **kwargs)
    with model.disable_adapter():
        separate["__base__"] = model.generate(input_ids=ids, **kwargs)
    for row, name in enumerate(["a", "b", "__base__", "b"]):
        assert torch.equal(got[row], separate[name][row])
    assert not torch.equal(separate["a"], separate["b"]) and not torch.equal(separate["a"], separate["__base__"])


# -- dropout -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("float64")
def test_krona_dropout_drops_and_rescales_the_adapters_input_only():
    p, n = 0.25, 4000
    model, layer = adapt(nn.Linear(8, 8), krona_dropout=p)
    base = layer.base_layer
    x = torch.ones(n, 8)
    part = model(x) - base(x)
    # Each row is one draw of mask / (1 - p): E = dW x, and dropping all of x never changes the base's part
    exact = F.linear(x[:1], layer.get_delta_weight("default"))
    spread = part.std(0) / n**0.5
    assert ((part.mean(0) - exact[0]).abs() < 5 * spread).all()
    model.eval()
    torch.testing.assert_close(model(x) - base(x), exact.expand(n, -1))


@pytest.mark.parametrize("name", FEW)
def test_krona_dropout_is_the_layer_on_dropped_input(name):
    base, model, layer, x = make_layer(name, torch.float64, krona_dropout=0.5)
    torch.manual_seed(3)
    y = model(x)
    torch.manual_seed(3)
    if name == "embedding":  # no input to drop: the looked-up rows are
        want = base(x) + F.dropout(reference(base, layer, x)[0] - base(x), 0.5)
    else:
        dropped = F.dropout(x, 0.5)
        want = base(x) + reference(base, layer, dropped)[0] - base(dropped)
    torch.testing.assert_close(y, want)
    model.eval()
    torch.testing.assert_close(model(x).detach(), reference(base, layer, x)[0])


@pytest.mark.parametrize("name", ["linear b_first", "conv2d", "embedding"])
def test_module_dropout_skips_the_whole_adapter_unscaled(name):
    base, model, _layer, x = make_layer(name, torch.float64, module_dropout=0.3)
    with_adapter, without = model.eval()(x), base(x)
    model.train()
    kinds = []
    for _ in range(200):
        y = model(x)
        kinds.append(torch.equal(y, without))
        assert kinds[-1] or torch.allclose(y, with_adapter, rtol=1e-7, atol=1e-7)
    assert 0.15 < sum(kinds) / 200 < 0.45
    model.eval()
    assert all(torch.equal(model(x), with_adapter) for _ in range(5))


def test_a_skipped_module_gets_zero_gradients():
    _, model, layer, x = make_layer("linear b_first", torch.float32, module_dropout=0.999999)
    model(x).sum().backward()
    assert not layer.krona_A["default"].grad.any() and not layer.krona_B["default"].grad.any()


def test_a_new_adapter_follows_the_training_mode_of_what_it_adapts():
    base = mlp().eval()
    model = get_peft_model(base, config(["lin0"], krona_dropout=0.5))
    model.add_adapter("late", config(["lin0", "lin1"], krona_dropout=0.5))
    assert not any(module.training for layer in krona_layers(model).values() for module in layer.modules())
    model.train()
    assert all(module.training for layer in krona_layers(model).values() for module in layer.modules())


# -- what is replaced by hand ------------------------------------------------------------------------------------------


class Doubled(nn.Module):
    def forward(self, t: torch.Tensor) -> torch.Tensor:
        return 2 * t


def doubled(_module, _args, output):
    return 2 * output


def trained_dropout(layer):
    layer.krona_dropout["default"] = nn.Dropout(0.5).train()


def other_base(layer):
    layer.base_layer = nn.Linear(12, 8).requires_grad_(False)


def assigned(layer):
    state = {key: torch.randn_like(tensor) for key, tensor in layer.state_dict().items()}
    layer.load_state_dict(state, assign=True)
    layer.base_layer.requires_grad_(False)


BY_HAND = {
    "dropout": lambda layer: layer.krona_dropout.update({"default": nn.Dropout(0.5)}),
    "dropout in training mode": trained_dropout,
    "dropout of nothing": lambda layer: layer.krona_dropout.update({"default": nn.Dropout(0.0)}),
    "a module of one's own for dropout": lambda layer: layer.krona_dropout.update({"default": Doubled()}),
    "a hook on dropout": lambda layer: layer.krona_dropout["default"].register_forward_hook(doubled),
    "a hook on the base": lambda layer: layer.base_layer.register_forward_hook(doubled),
    "s": lambda layer: layer.scaling.update(default=-1.7),
    "layout": lambda layer: layer.layout.update(default="diffusekrona"),
    "A": lambda layer: layer.krona_A.update({"default": nn.Parameter(torch.randn(3, 4, 2))}),
    "factors of other sizes": lambda layer: (
        layer.krona_A.update({"default": nn.Parameter(torch.randn(1, 2, 3))}),
        layer.krona_B.update({"default": nn.Parameter(torch.randn(1, 4, 4))}),
    ),
    "A parametrized": lambda layer: parametrize.register_parametrization(layer.krona_A, "default", Doubled()),
    "B parametrized": lambda layer: parametrize.register_parametrization(layer.krona_B, "default", Doubled()),
    "base parametrized": lambda layer: parametrize.register_parametrization(layer.base_layer, "weight", Doubled()),
    "base layer": other_base,
    "base weight": lambda layer: setattr(layer.base_layer, "weight", nn.Parameter(torch.randn(8, 12), False)),
    "values through .data": lambda layer: layer.krona_A["default"].data.mul_(3),
    "tensors through .data": lambda layer: setattr(layer.krona_B["default"], "data", torch.randn(3, 2, 6)),
    "load_state_dict(assign=True)": assigned,
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kept", ["the layer", "a copy", "a pickled copy"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("what", BY_HAND)
def test_what_is_replaced_by_hand_takes_effect(what, training, kept, tmp_path):
    """At any time after an adapter was added, and nothing that a layer has noted about it hides it."""
    model, layer = adapt(nn.Linear(12, 8), r=3, alpha=0.7)
    model.train(training)
    x = torch.randn(5, 12)
    model(x)
    BY_HAND[what](layer)
    if kept == "a copy":
        layer = copy.deepcopy(layer)
    elif kept == "a pickled copy":
        if "parametrized" in what:
            pytest.skip("torch pickles no parametrized module")
        torch.save(layer, tmp_path / "layer.pt")
        layer = torch.load(tmp_path / "layer.pt", weights_only=False)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.manual_seed(1)
            y = layer(x)
            torch.manual_seed(1)
            dW = delta_weight_loop(
                layer.krona_A["default"], layer.krona_B["default"], layer.scaling["default"], layer.layout["default"]
            )
            want = layer.base_layer(x) + F.linear(layer.krona_dropout["default"](x), dW)
        torch.testing.assert_close(y, want)


@pytest.mark.usefixtures("float64")
def test_functional_call_takes_the_tensors_that_it_is_given():
    model, layer = adapt(nn.Linear(12, 8), r=3)
    x = torch.randn(5, 12)
    given = {f"base_model.model.0.{key}": torch.randn_like(t) for key, t in layer.state_dict().items()}
    y = torch.func.functional_call(model, given, (x,))
    A, B, W, b = (given[f"base_model.model.0.{key}"] for key in
                  ("krona_A.default", "krona_B.default", "base_layer.weight", "base_layer.bias"))  # fmt: skip
    torch.testing.assert_close(y, F.linear(x, W + delta_weight_loop(A, B, 1.0, "kron"), b))


@pytest.mark.usefixtures("float64")
def test_one_factor_of_two_layers_gets_both_gradients():
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), config(["0", "1"]))
    first, second = krona_layers(model).values()
    second.krona_B["default"] = first.krona_B["default"]
    x = torch.randn(5, 8)
    model(x).sum().backward()
    B = first.krona_B["default"].detach().clone().requires_grad_()
    y = x
    for layer in (first, second):
        dW = torch.einsum("nik,nuv->iukv", layer.krona_A["default"].detach(), B).reshape(8, 8)
        y = F.linear(y, layer.base_layer.weight + dW, layer.base_layer.bias)
    (want,) = torch.autograd.grad(y.sum(), B)
    torch.testing.assert_close(first.krona_B["default"].grad, want)


def test_a_new_adapter_fits_the_base_layer_that_is_there_now():
    model, layer = adapt(nn.Linear(12, 8))
    layer.base_layer = nn.Linear(20, 6)
    model.add_adapter("late", config(a_out=3, a_in=5))
    assert layer.factors("late") == (3, 5) and layer.get_delta_weight("late").shape == (6, 20)
    assert (layer.in_features, layer.out_features) == (20, 6)


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "init,layout", [(True, "kron"), ("cdka", "kron"), ("kaiming", "diffusekrona"), (False, "kron")]
)
@pytest.mark.parametrize("name", ["linear b_first", "linear a_first r3", "transformers Conv1D", "conv2d"])
def test_training_reaches_a_kronecker_target(name, init, layout):
    """Fit dW* = a Kronecker sum of the same shape by Adam: the loss must fall by a factor of 30."""
    base, teacher, _, x = make_layer(name, torch.float32, layout)
    x = torch.randn(32, *x.shape[1:])
    target = teacher(x).detach()
    _, _, (a_out, a_in), r = LAYERS[name]
    model, _layer = adapt(base, a_out=a_out, a_in=a_in, r=r + 1, layout=layout, init_weights=init)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.03)
    losses = []
    for _ in range(150):
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 30
    assert all(p.grad is None for p in base.parameters())


# -- what can and cannot be adapted ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("float64")
def test_a_layer_of_another_tuner_can_be_wrapped():
    base = nn.Sequential(nn.Linear(8, 8))
    lora = get_peft_model(base, LoraConfig(target_modules=["0"], init_lora_weights=False))
    x = torch.randn(3, 8)
    with_lora = lora(x)
    inner = lora.base_model.model[0]
    model = get_peft_model(nn.Sequential(inner), config("0"))
    layer = model.base_model.model[0]
    assert layer.base_layer is inner and layer.get_base_layer() is inner.base_layer
    want = with_lora + F.linear(x, layer.get_delta_weight("default"))
    torch.testing.assert_close(model(x), want)


@pytest.mark.parametrize("other", [LoraConfig, LoHaConfig, LoKrConfig])
@pytest.mark.parametrize(
    ("make", "x"),
    [
        (lambda: nn.Linear(8, 8), torch.randn(3, 8)),
        (lambda: nn.Embedding(8, 8), torch.tensor([1, 2])),
        (lambda: nn.Conv1d(8, 8, 3, padding=1), torch.randn(2, 8, 5)),
        (lambda: nn.Conv2d(8, 8, 3, stride=2, padding=1), torch.randn(2, 8, 5, 6)),
        (lambda: nn.Conv3d(8, 8, 3, padding=1), torch.randn(2, 8, 5, 6, 7)),
    ],
    ids=["Linear", "Embedding", "Conv1d", "Conv2d", "Conv3d"],
)
def test_another_tuner_wraps_what_is_left_of_a_deleted_adapter(make, x, other):
    """diffusers' delete_adapters leaves empty KronA layers; whoever reads them has to find a layer's attributes."""
    if other is not LoraConfig and isinstance(make(), (nn.Embedding, nn.Conv3d)):
        pytest.skip(f"{other.__name__} is not for it")
    base = nn.Sequential(make())
    want = base(x)
    inject_adapter_in_model(config("0"), base).requires_grad_(False)
    base[0].delete_adapter("default")
    try:
        inject_adapter_in_model(other(target_modules=["0"]), base, "second")
    except ValueError as error:
        assert "not supported" in str(error)  # PEFT's own word: LoHa and LoKr do not go into other tuners' layers
        return
    torch.testing.assert_close(base(x), want, rtol=0, atol=0)  # a fresh adapter adds nothing
    (adapted,) = (m for m in base.modules() if "second" in getattr(m, "active_adapters", ()))
    assert sum(p.requires_grad for p in adapted.parameters())


def test_multihead_attention_is_refused():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.mha = nn.MultiheadAttention(8, 2)

    with pytest.raises(TypeError, match=r"Cannot adapt 'mha.out_proj' \(NonDynamicallyQuantizableLinear\): nn.Multihead"
                                        "Attention reads the weight of its out_proj without calling it"):  # fmt: skip
        get_peft_model(Attention(), config("out_proj"))
    with pytest.raises(
        TypeError, match=r"Cannot adapt 'mha' of type MultiheadAttention: KronA supports Linear, Conv1D"
    ):
        get_peft_model(Attention(), config("mha"))


@pytest.mark.parametrize(
    "module",
    [
        nn.LayerNorm(8),
        nn.ConvTranspose2d(4, 4, 3),
        nn.Bilinear(3, 4, 5),
        nn.LSTM(4, 4),
        nn.EmbeddingBag(8, 4),
        nn.ReLU(),
    ],
    ids=lambda m: type(m).__name__,
)
def test_unsupported_targets_name_module_type_and_what_is_supported(module):
    with pytest.raises(UnsupportedLayerError) as caught:
        get_peft_model(nn.ModuleDict({"part": module}), config("part"))
    assert isinstance(caught.value, TypeError)
    assert str(caught.value) == (
        f"Cannot adapt 'part' of type {type(module).__name__}: KronA supports Linear, Conv1D, Conv1d, Conv2d, Conv3d, "
        "Embedding and quantized linear layers. Choose other `target_modules`, or leave it out with `exclude_modules`."
    )


def test_fan_in_fan_out():
    with pytest.warns(UserWarning, match=r"fan_in_fan_out is set to True but the target module is `torch.nn.Linear`"):
        _, layer = adapt(nn.Linear(12, 8), fan_in_fan_out=True)
    assert layer.get_delta_weight("default").shape == (8, 12)
    _, layer = adapt(Conv1D(8, 12))  # recognised without it
    assert layer.fan_in_fan_out and layer.get_delta_weight("default").shape == (12, 8)


@pytest.mark.parametrize("targets", [["out_proj"], ["conv1d"], "all-linear"], ids=str)
def test_mamba_projections_that_a_fused_kernel_reads_are_refused(targets):
    model = nn.ModuleDict({"out_proj": nn.Linear(8, 8), "conv1d": nn.Linear(8, 8), "in_proj": nn.Linear(8, 8)})
    model.config = type("Config", (), {"model_type": "mamba"})()
    with pytest.raises(ValueError, match=r"read inside a fused kernel"):
        get_peft_model(model, config(targets))


@pytest.mark.usefixtures("float64")
def test_scaled_embeddings():
    class Scaled(nn.Embedding):  # as Gemma's
        def __init__(self, *args):
            super().__init__(*args)
            self.embed_scale = torch.tensor(3.0)

        def forward(self, ids):
            return super().forward(ids) * self.embed_scale

    model, layer = adapt(Scaled(20, 8))
    ids = torch.arange(20)
    got = model(ids)
    model.merge_adapter()
    torch.testing.assert_close(model(ids), got)
    torch.testing.assert_close(got, F.embedding(ids, layer.base_layer.weight) * 3.0)


def test_repr_names_the_layer():
    model, layer = adapt(nn.Linear(8, 8))
    assert repr(layer).startswith("krona.Linear(\n  (base_layer): Linear(in_features=8, out_features=8, bias=True)")
    assert repr(adapt(nn.Conv2d(4, 4, 3))[1]).startswith("krona.Conv2d(")
    assert repr(adapt(nn.Embedding(8, 4))[1]).startswith("krona.Embedding(") and "krona.Linear(" in repr(model)

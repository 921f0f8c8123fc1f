# SPDX-License-Identifier: Apache-2.0
"""KronA over bitsandbytes' 4-bit and 8-bit layers, on the CPU."""

import copy

import pytest
import torch
from adapted import adapt, config, factor_gradients
from peft import PeftModel, get_peft_model
from rounding import assert_rounded
from torch import nn

import peft_krona
from peft_krona.errors import MergeError
from peft_krona.ops.reference import delta_weight_loop

bnb = pytest.importorskip("bitsandbytes")

KINDS = ["nf4", "fp4", "int8"]
SETTINGS = {"a_out": 8, "a_in": 4, "r": 2, "alpha": 0.5}


def quantized(kind, bias=True):
    torch.manual_seed(1)
    plain = nn.Linear(64, 32, bias=bias)
    if kind == "int8":
        layer = bnb.nn.Linear8bitLt(64, 32, bias=bias, has_fp16_weights=False, threshold=6.0)
    else:
        layer = bnb.nn.Linear4bit(64, 32, bias=bias, compute_dtype=torch.float32, quant_type=kind)
    layer.load_state_dict(plain.state_dict())
    return layer.to("cpu").requires_grad_(False)


def make(kind, layout="kron", **kwargs):
    model, layer = adapt(quantized(kind), layout=layout, **SETTINGS, **kwargs)
    x = torch.randn(5, 64)
    base = copy.deepcopy(layer.base_layer).eval()
    return base, model.eval(), layer, x


def state(layer):
    """Everything that makes up the quantized weight."""
    base = layer.get_base_layer()
    quant = getattr(base.weight, "quant_state", None)
    if quant is not None:
        return [t.clone() for t in (base.weight.data, quant.absmax, quant.code)]
    return [base.weight.data.clone(), (base.state.SCB if base.weight.SCB is None else base.weight.SCB).clone()]


def assert_same(before, after):
    for a, b in zip(before, after, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("layout", ["kron", "diffusekrona"])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_backward(kind, layout):
    base, model, layer, x = make(kind, layout)
    assert layer.get_base_layer().weight.dtype in (torch.uint8, torch.int8)
    assert layer.krona_A["default"].shape == (2, 8, 4) and layer.krona_B["default"].shape == (2, 4, 16)
    A, B = layer.krona_A["default"], layer.krona_B["default"]
    x.requires_grad_()
    y = model(x)
    part = x.detach().double() @ delta_weight_loop(A, B, 0.5, layout).T
    x64, terms = x.detach().double(), 4 + 16 + 2 + 1  # a_in, b_in, r and the base
    size = base(x).abs().double() + x64.abs() @ delta_weight_loop(A.abs(), B.abs(), 0.5, layout).T
    assert_rounded(y, base(x).detach().double() + part, size, terms, "y")
    dy = torch.randn_like(y)
    dA, dB = torch.autograd.grad(y, (A, B), dy)
    want = factor_gradients(dy.double().T @ x64, A, B, 0.5, layout)
    sizes = factor_gradients(dy.abs().double().T @ x64.abs(), A.abs(), B.abs(), 0.5, layout)
    assert_rounded((dA, dB), want, sizes, len(x64.flatten(0, -2)) * 8 + 16 + 1, "gradient")


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_changes_nothing(kind):
    base, model, _, x = make(kind, init_weights=True)
    assert torch.equal(model(x), base(x))
    with model.disable_adapter():
        assert torch.equal(model(x), base(x))


@pytest.mark.parametrize("kind", KINDS)
def test_merging_requantizes_and_unmerging_restores_every_byte(kind):
    base, model, layer, x = make(kind)
    want, plain = model(x), base(x)
    before = state(layer)  # after the first forward: bitsandbytes repacks weights there
    weight = layer.get_base_weight().float()
    model.merge_adapter()
    merged = layer.get_base_weight().float()
    # as far from the exact sum as quantizing that sum is
    exact = weight + layer.get_delta_weight("default")
    step = exact.abs().amax() * {"nf4": 0.2, "fp4": 0.3, "int8": 0.02}[kind]
    assert (merged - exact).abs().max() < step
    assert (model(x) - want).abs().mean() < (plain - want).abs().mean()
    model.unmerge_adapter()
    assert_same(before, state(layer))
    assert torch.equal(model(x), want)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_context_and_several_adapters(kind):
    _, model, layer, x = make(kind)
    model.add_adapter("other", config("0", a_out=4, a_in=4))
    want = model(x)
    before = state(layer)
    with peft_krona.merged(model, adapter_names=["default", "other"]):
        joint = layer.get_base_weight().clone()
    assert_same(before, state(layer))
    model.merge_adapter(["default"])
    model.merge_adapter(["other"])  # from the original, so it is quantized once
    torch.testing.assert_close(layer.get_base_weight(), joint, rtol=0, atol=0)
    model.unmerge_adapter()
    assert_same(before, state(layer))
    assert torch.equal(model(x), want)


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_merge_adds_to_what_was_merged(kind):
    _, model, layer, x = make(kind)
    model.add_adapter("other", config("0", a_out=4, a_in=4))
    model(x)
    before = state(layer)
    with peft_krona.merged(model, adapter_names=["default", "other"]):
        joint = layer.get_base_weight().clone()
    layer.merge(adapter_names=["default"])
    layer.set_scale("default", 9.0)
    layer.delete_adapter("default")
    layer.merge(adapter_names=["other"])
    assert torch.equal(layer.get_base_weight(), joint)
    layer.unmerge()
    assert_same(before, state(layer))


@pytest.mark.parametrize("kind", KINDS)
def test_disabling_while_merged(kind):
    base, model, layer, x = make(kind)
    model(x)
    before = state(layer)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(x), base(x))
    assert_same(before, state(layer))


@pytest.mark.parametrize("kind", KINDS)
def test_safe_merge_refuses_before_anything_changes(kind):
    _, model, layer, _ = make(kind)
    before = state(layer)
    with torch.no_grad():
        layer.krona_B["default"][0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"NaNs detected in the merged weights"):
        model.merge_adapter(safe_merge=True)
    assert_same(before, state(layer))


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load(tmp_path, kind):
    _, model, _, x = make(kind)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(nn.Sequential(quantized(kind)), str(tmp_path))
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("kind", KINDS)
def test_training_leaves_the_base_alone(kind):
    _, model, layer, x = make(kind)
    before = state(layer)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        loss = (model(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert_same(before, state(layer))


def test_a_backend_that_cannot_write_back_is_named(monkeypatch):
    _, model, layer, _ = make("nf4")
    monkeypatch.setattr(type(layer.quantization_backend), "supports_merge", False)
    before = state(layer)
    for call in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(MergeError, match=r"Cannot merge into a .* layer: its weight cannot be dequantized"):
            call()
    assert_same(before, state(layer))


def test_unquantized_neighbours_merge_too():
    base = nn.Sequential(quantized("nf4"), nn.Linear(32, 8))
    model = get_peft_model(base, config(["0", "1"])).eval()
    x = torch.randn(3, 64)
    want = model(x)
    with peft_krona.merged(model):
        assert all(layer.merged for layer in base)
    assert torch.equal(model(x), want)


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_that_is_quantized_or_dequantized_under_its_adapter_merges_as_what_it_is_now(kind):
    base, model, layer, x = make(kind)
    plain = nn.Linear(64, 32)
    layer.base_layer = plain  # as transformers' `dequantize` does it
    A, B, s = layer.krona_A["default"], layer.krona_B["default"], layer.scaling["default"]
    dW, size = delta_weight_loop(A, B, s, "kron"), delta_weight_loop(A.abs(), B.abs(), s, "kron")
    before = plain.weight.detach().clone()
    with peft_krona.merged(model):  # a product, s, two terms, W
        assert_rounded(plain.weight.detach(), before.double() + dW, before.double().abs() + size, terms=5)
    assert torch.equal(plain.weight, before)
    layer.base_layer = base  # and quantized again
    base(x)
    before = state(layer)
    exact = layer.get_base_weight().double() + dW
    layer.merge()
    step = exact.abs().amax() * {"nf4": 0.2, "fp4": 0.3, "int8": 0.02}[kind]
    assert (layer.get_base_weight() - exact).abs().max() < step
    layer.unmerge()
    assert_same(before, state(layer))

# SPDX-License-Identifier: Apache-2.0
"""What PEFT offers for a tuner, used with KronA."""

import copy
import json
import logging
import warnings

import peft
import pytest
import torch
from adapted import MLP, adapted_mlp, assert_same_bits, config, krona_layers, mlp, snapshot
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_layer_status,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.lora.conversion import convert_to_lora, save_as_lora
from rounding import EPS, STORED
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from peft_krona import KronAConfig, KronALayer
from peft_krona.errors import ConfigError
from peft_krona.ops import kron_delta_weight
from peft_krona.ops.reference import delta_weight_loop
from peft_krona.share import number_of_parameters

X = torch.randn(5, 10, generator=torch.Generator().manual_seed(1))


def two(**kwargs):
    """An MLP with adapters "default" (both layers) and "other" (lin1 alone, other settings)."""
    model = adapted_mlp()
    model.add_adapter("other", config(["lin1"], a_out=2, a_in=5, r=3, scaling="rank", alpha=2.0, **kwargs))
    return model.eval()


# -- adapters come, act and go -----------------------------------------------------------------------------------------


def test_set_adapter_switches_and_sets_requires_grad():
    model = two()
    outputs = {}
    for name in ("default", "other", "default"):
        model.set_adapter(name)
        outputs.setdefault(name, model(X))
        assert torch.equal(model(X), outputs[name])
        trainable = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trainable and all(n.endswith(f".{name}") for n in trainable)
    assert not torch.equal(outputs["default"], outputs["other"])
    model.set_adapter("other", inference_mode=True)
    assert not any(p.requires_grad for p in model.parameters())


def test_delete_adapter_leaves_nothing():
    model = two()
    with_default = model(X)
    model.delete_adapter("other")
    assert torch.equal(model(X), with_default) and list(model.peft_config) == ["default"]
    for layer in krona_layers(model).values():
        for attribute in (*layer.adapter_layer_names, *layer.other_param_names):
            assert "other" not in getattr(layer, attribute), attribute
        known = {*layer.adapter_layer_names, *layer.other_param_names}
        dicts = {k for k, v in {**layer.__dict__, **layer._modules}.items()
                 if isinstance(v, (dict, nn.ParameterDict, nn.ModuleDict)) and not k.startswith("_")}  # fmt: skip
        assert dicts <= known, f"delete_adapter does not know {dicts - known}"
    assert not any("other" in key for key in model.state_dict())


def test_delete_the_active_adapter():
    model = two()
    model.set_adapter("default")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.delete_adapter("default")
        assert torch.equal(model.base_model.model.lin0(X), mlp().lin0(X))
    assert not any("default" in key for key in model.state_dict())


def test_deleting_a_merged_adapter_is_refused_or_harmless():
    model = two()
    before = snapshot(model)
    model.merge_adapter(["default"])
    try:
        model.delete_adapter("default")
    except ValueError:  # peft >= 0.21 refuses
        model.unmerge_adapter()
        assert_same_bits(model, before)


@pytest.mark.parametrize("name", ["default", "other"])
def test_disable_adapter(name):
    model = two()
    model.set_adapter(name)
    want, base = model(X), mlp()(X)
    with model.disable_adapter():
        assert torch.equal(model(X), base)
        assert get_model_status(model).enabled is False
    assert torch.equal(model(X), want)


def test_add_adapter_keeps_the_others():
    model = adapted_mlp().eval()
    want = model(X)
    for i in range(3):
        model.add_adapter(f"n{i}", config(["lin0"], r=i + 1))
        assert torch.equal(model(X), want)
    with pytest.raises(ValueError, match=r"Cannot combine adapters with different peft types"):
        model.add_adapter("lora", LoraConfig(target_modules=["lin0"]))


def test_two_adapters_with_trained_biases_are_refused():
    model = adapted_mlp(bias="all")
    with pytest.raises(ValueError, match=r"supports only 1 adapter with bias"):
        model.add_adapter("other", config(["lin0"], bias="krona_only"))


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("is_trainable", [False, True])
def test_save_and_load(tmp_path, is_trainable, low_cpu_mem_usage):
    model = adapted_mlp(r=2, layout="diffusekrona", scaling="cdka", alpha=3.0, rank_pattern={"lin1": 1}).eval()
    model.save_pretrained(str(tmp_path))
    state = load_file(tmp_path / "adapter_model.safetensors")
    assert set(state) == {f"base_model.model.lin{i}.krona_{f}" for i in (0, 1) for f in "AB"}
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert json.loads((tmp_path / "adapter_config.json").read_text())["inference_mode"] is True
    loaded = PeftModel.from_pretrained(
        mlp(), str(tmp_path), is_trainable=is_trainable, low_cpu_mem_usage=low_cpu_mem_usage
    )
    assert torch.equal(loaded.eval()(X), model(X))
    trainable = [n for n, p in loaded.named_parameters() if p.requires_grad]
    assert len(trainable) == (4 if is_trainable else 0) and not any(p.is_meta for p in loaded.parameters())
    assert loaded.peft_config["default"].inference_mode is not is_trainable


def test_saving_does_not_change_the_model(tmp_path):
    model = two()
    before, flags = snapshot(model), [p.requires_grad for p in model.parameters()]
    model.save_pretrained(str(tmp_path))
    assert_same_bits(model, before)
    assert flags == [p.requires_grad for p in model.parameters()] and not model.peft_config["default"].inference_mode


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_load_several(tmp_path, low_cpu_mem_usage):
    model = two()
    model.save_pretrained(str(tmp_path))  # "default" at the top, "other" in its subfolder
    assert (tmp_path / "other" / "adapter_model.safetensors").exists()
    loaded = PeftModel.from_pretrained(mlp(), str(tmp_path), low_cpu_mem_usage=low_cpu_mem_usage)
    loaded.load_adapter(str(tmp_path / "other"), "second", low_cpu_mem_usage=low_cpu_mem_usage)
    for saved, name in (("default", "default"), ("other", "second")):
        model.set_adapter(saved)
        loaded.set_adapter(name)
        assert torch.equal(loaded(X), model(X))


def test_training_goes_on_after_loading(tmp_path):
    def step(model, optimizer):
        model(X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    model = adapted_mlp()
    step(model, torch.optim.SGD(model.parameters(), lr=0.1))
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(mlp(), str(tmp_path), is_trainable=True)
    for m in (model, loaded):
        step(m, torch.optim.SGD(m.parameters(), lr=0.1))
    assert torch.equal(model(X), loaded(X))


@pytest.mark.parametrize("bias", ["none", "all", "krona_only"])
def test_bias(tmp_path, bias):
    model = adapted_mlp(targets=["lin0"], bias=bias)
    biases = {n for n, p in model.named_parameters() if p.requires_grad and n.endswith("bias")}
    want = {"none": set(), "krona_only": {"lin0.base_layer"}, "all": {"lin0.base_layer", "lin1", "norm"}}[bias]
    assert biases == {f"base_model.model.{name}.bias" for name in want}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        model(X).square().mean().backward()
        optimizer.step()
    assert (bias == "none") == torch.equal(model.base_model.model.lin0.base_layer.bias, mlp().lin0.bias)
    model.save_pretrained(str(tmp_path))
    saved = load_file(tmp_path / "adapter_model.safetensors")
    if tuple(map(int, peft.__version__.split(".")[:2])) < (0, 21) and bias != "none":
        pytest.skip("peft < 0.21 does not save biases of tuners other than LoRA")
    assert sum(key.endswith("bias") for key in saved) == len(want)
    loaded = PeftModel.from_pretrained(mlp(), str(tmp_path))
    assert torch.equal(loaded(X), model.eval()(X))


def test_modules_to_save(tmp_path):
    model = adapted_mlp(targets=["lin0"], modules_to_save=["lin1"])
    torch.nn.init.normal_(model.base_model.model.lin1.modules_to_save["default"].weight)
    model.save_pretrained(str(tmp_path))
    assert {"base_model.model.lin1.weight", "base_model.model.lin1.bias"} < set(
        load_file(tmp_path / "adapter_model.safetensors")
    )
    assert torch.equal(PeftModel.from_pretrained(mlp(), str(tmp_path))(X), model.eval()(X))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [True, False])
def test_autocast_adapter_dtype(tmp_path, dtype, autocast):
    expected = torch.float32 if autocast else dtype
    model = get_peft_model(mlp(dtype), config(["lin0"]), autocast_adapter_dtype=autocast)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(mlp(dtype), str(tmp_path), autocast_adapter_dtype=autocast)
    loaded.load_adapter(str(tmp_path), "other", autocast_adapter_dtype=autocast)
    for m in (model, loaded):
        for layer in krona_layers(m).values():
            assert {p.dtype for d in (layer.krona_A, layer.krona_B) for p in d.values()} == {expected}
    assert torch.equal(loaded.eval()(X.to(dtype)), model.eval()(X.to(dtype))) and model(X.to(dtype)).dtype == dtype


def test_state_dicts():
    model = two()
    for name in ("default", "other"):
        state = get_peft_model_state_dict(model, adapter_name=name)
        layers = {"default": (0, 1), "other": (1,)}[name]
        assert set(state) == {f"base_model.model.lin{i}.krona_{f}" for i in layers for f in "AB"}
        target = get_peft_model(mlp(), model.peft_config[name])
        result = set_peft_model_state_dict(target, state)
        assert not result.unexpected_keys and not [k for k in result.missing_keys if "krona" in k]
        model.set_adapter(name)
        assert torch.equal(target.eval()(X), model(X))


def test_inject_adapter_in_model():
    model = inject_adapter_in_model(config(["lin0", "lin1"]), mlp())
    assert type(model) is MLP and len(krona_layers(model)) == 2
    other = inject_adapter_in_model(config(["lin0", "lin1"]), mlp(), low_cpu_mem_usage=True)
    assert all(p.is_meta for n, p in other.named_parameters() if "krona" in n)
    set_peft_model_state_dict(other, get_peft_model_state_dict(model), low_cpu_mem_usage=True)
    assert torch.equal(other.eval()(X), model.eval()(X))


def test_injection_from_a_state_dict():
    model = adapted_mlp(targets=["lin1"])
    state = get_peft_model_state_dict(model.base_model.model)
    with pytest.warns(RuntimeWarning, match=r"lin0"):
        other = inject_adapter_in_model(config(["lin0", "lin1"]), mlp(), state_dict=state)
    assert list(krona_layers(other)) == ["lin1"]


def test_meta_device():
    with torch.device("meta"):
        base = MLP()
    model = get_peft_model(base, config(["lin0"]))
    assert all(p.is_meta for p in model.parameters())


# -- scale -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling,alpha,r", [("alpha", 0.5, 2), ("rank", 3.0, 2), ("rslora", 3.0, 4), ("cdka", 3.0, 2)])
@pytest.mark.usefixtures("float64")
def test_set_scale_multiplies_what_the_config_defines(scaling, alpha, r):
    model = adapted_mlp(targets=["lin1"], scaling=scaling, alpha=alpha, r=r)
    layer, base = model.base_model.model.lin1, mlp()(X.double())
    defined = layer.scaling["default"]
    part = (model(X.double()) - base).detach()
    for weight in (0.5, 2.0, -1.0, 0.0, 1.0):
        layer.set_scale("default", weight)
        assert layer.scaling["default"] == weight * defined
        torch.testing.assert_close(model(X.double()) - base, weight * part)
    layer.set_scale("nobody", 2.0)
    assert layer.scaling == {"default": defined}


def test_scale_and_unscale_layer():
    model = two()
    layer = model.base_model.model.lin1
    defined, other = layer.scaling["default"], layer.scaling["other"]
    layer.scale_layer(2.0)
    layer.scale_layer(3.0)
    assert layer.scaling == {"default": 6 * defined, "other": other}
    layer.unscale_layer(2.0)
    assert layer.scaling["default"] == 3 * defined
    layer.unscale_layer()
    assert layer.scaling["default"] == defined
    layer.set_scale("default", 0.25)
    layer.scale_layer(1)
    assert layer.scaling["default"] == 0.25 * defined


# -- status and text ---------------------------------------------------------------------------------------------------


def test_layer_status():
    model = two()
    model.merge_adapter(["default"])
    status = {s.name: s for s in get_layer_status(model)}
    assert list(status) == ["model.lin0", "model.lin1"]
    s = status["model.lin1"]
    assert s.module_type == "krona.Linear" and s.enabled and s.active_adapters == ["default"]
    assert s.merged_adapters == ["default"] and s.available_adapters == ["default", "other"]
    assert s.requires_grad == {"default": True, "other": False} and s.devices == {"default": ["cpu"], "other": ["cpu"]}


def test_model_status():
    model = two()
    s = get_model_status(model)
    assert s.base_model_type == "MLP" and s.adapter_model_type == "KronAModel"
    assert s.peft_types == {"default": "KRONA", "other": "KRONA"}
    assert s.trainable_params == sum(p.numel() for n, p in model.named_parameters() if n.endswith(".default"))
    assert s.num_adapter_layers == 2 and s.enabled and s.active_adapters == ["default"]
    assert model.get_layer_status()[0].module_type == "krona.Linear"


def test_print_trainable_parameters(capsys):
    model = adapted_mlp(targets=["lin0"])  # 20 x 10 with (4, 2): 8 + 25
    model.print_trainable_parameters()
    total = sum(p.numel() for p in mlp().parameters()) + 33
    assert capsys.readouterr().out == (
        f"trainable params: 33 || all params: {total:,d} || trainable%: {100 * 33 / total:.4f}\n"
        f"KronA adapts 1 of 2 Linear layers, {100 * 200 / (total - 33):.1f}% of the weights\n"
    )
    assert model.get_nb_trainable_parameters() == (33, total)


def test_targeted_module_names():
    assert adapted_mlp().targeted_module_names == ["lin0", "lin1"]


# -- conversion to LoRA ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_factors_make_a_16_bit_delta_weight_and_lora(dtype):
    model = get_peft_model(mlp(dtype), config(["lin0"], init_weights=False), autocast_adapter_dtype=False)
    layer = model.base_model.model.lin0
    exact = kron_delta_weight(layer.krona_A["default"], layer.krona_B["default"], scale=layer.scaling["default"])
    assert torch.equal(layer.get_delta_weight("default"), exact.to(dtype))
    _, state = convert_to_lora(model, rank=4)
    assert {weight.dtype for weight in state.values()} == {dtype}


def assert_lora_of(lora, model):
    """The same update up to the rounding of PEFT's singular value decomposition, which is in fp32."""
    delta, want = (m.base_model.model.lin0.get_delta_weight("default").double() for m in (lora, model))
    assert (delta - want).norm() <= max(want.shape) * torch.finfo(torch.float32).eps * want.norm()


@pytest.mark.parametrize("layout", ["kron", "diffusekrona"])
def test_convert_to_lora(layout):
    model = adapted_mlp(targets=["lin0"], layout=layout).eval()
    lora_config, state = convert_to_lora(model, rank=10)
    lora = get_peft_model(mlp(), lora_config)
    set_peft_model_state_dict(lora, state)
    assert_lora_of(lora, model)


def test_save_as_lora(tmp_path):
    model = adapted_mlp(targets=["lin0"]).eval()
    save_as_lora(str(tmp_path), model, rank=10)
    assert PeftConfig.from_pretrained(str(tmp_path)).peft_type == "LORA"
    loaded = PeftModel.from_pretrained(mlp(), str(tmp_path))
    assert_lora_of(loaded, model)


def test_convolutions_say_that_they_do_not_convert():
    model = get_peft_model(nn.Sequential(nn.Conv2d(4, 4, 3)), config("0"))
    assert not model.base_model.model[0].supports_lora_conversion()
    with pytest.raises((ValueError, TypeError)):
        convert_to_lora(model, rank=4)


# -- add_weighted_adapter ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.7, -0.4], [0.0, 2.5], [-1.0, 1.0]], ids=str)
@pytest.mark.usefixtures("float64")
def test_weighted_sum_is_exact(tmp_path, weights):
    """Different r and scaling, one on lin0 and lin1, one on lin1 alone."""
    model = get_peft_model(mlp().double(), config(["lin0", "lin1"], a_out=4, a_in=2, scaling="cdka", alpha=3.0))
    model.add_adapter("other", config(["lin1"], r=3, alpha=0.4, krona_dropout=0.0))
    model = model.double().eval()
    model.add_weighted_adapter(["default", "other"], weights, "sum")
    assert model.active_adapters == ["default"] and [n for n, p in model.named_parameters() if p.requires_grad and
                                                     n.endswith(".sum")] == []  # fmt: skip
    for name, layer in krona_layers(model).items():
        parts = [w * layer.get_delta_weight(a) for a, w in zip(["default", "other"], weights, strict=True)
                 if a in layer.krona_A]  # fmt: skip
        torch.testing.assert_close(layer.get_delta_weight("sum"), sum(parts))
        assert layer.r["sum"] == (4 if name.endswith("lin1") else 1)
    model.set_adapter("sum")
    base = copy.deepcopy(mlp().double())
    with torch.no_grad():
        for name, layer in krona_layers(model).items():
            base.get_submodule(name.removeprefix("base_model.model.")).weight += layer.get_delta_weight("sum")
    torch.testing.assert_close(model(X.double()), base(X.double()))
    model.save_pretrained(str(tmp_path), selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(mlp().double(), str(tmp_path / "sum"), autocast_adapter_dtype=False)
    torch.testing.assert_close(loaded.double()(X.double()), model(X.double()))
    model.delete_adapter("sum")
    assert not any(".sum" in key for key in model.state_dict())


@pytest.mark.usefixtures("float64")
def test_weighted_sum_has_the_terms_that_are_there():
    """Also where somebody has put other factors into a layer since the adapter was added."""
    model = get_peft_model(mlp(), config(["lin1"]))
    model.add_adapter("other", config(["lin1"], r=2))
    (layer,) = krona_layers(model).values()
    layer.krona_A["default"] = nn.Parameter(torch.randn(3, 4, 2))
    layer.krona_B["default"] = nn.Parameter(torch.randn(3, 2, 10))
    assert not model.add_weighted_adapter(["default", "other"], [0.5, 2.0], "sum")
    assert layer.krona_A["sum"].shape == (5, 4, 2)
    want = 0.5 * layer.get_delta_weight("default") + 2 * layer.get_delta_weight("other")
    torch.testing.assert_close(layer.get_delta_weight("sum"), want)
    model.add_weighted_adapter(["default", "other"], [0.5, 2.0], "less", r=4)
    assert layer.krona_A["less"].shape == (4, 4, 2)
    assert number_of_parameters(model, "default") == (3 * 28, 28)


def test_weighted_sum_keeps_float64():
    model = get_peft_model(mlp().double(), config(["lin0"]), autocast_adapter_dtype=False)
    model.add_adapter("other", config(["lin0"]), autocast_adapter_dtype=False)
    model.add_weighted_adapter(["default", "other"], [0.3, 0.6], "sum")
    layer = model.base_model.model.lin0
    want = 0.3 * layer.get_delta_weight("default") + 0.6 * layer.get_delta_weight("other")
    torch.testing.assert_close(layer.get_delta_weight("sum"), want, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("strength", [1e-12, 1e-7, 1e-3, 1.0, 1e4, 1e6], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("a_out", [4, 2], ids=["equal", "unequal"])
def test_weighted_sum_of_16_bit_adapters(dtype, strength, a_out):
    """Weights far from 1 neither make factors infinite nor let them vanish."""
    model = get_peft_model(mlp(), config(["lin0", "lin1"], a_out=4, a_in=2, init_weights=False))
    model.add_adapter("other", config(["lin0"], a_out=a_out, a_in=2, init_weights=False))
    model.to(dtype)
    for weights in ([strength, -2 * strength], [strength, 0.0]):
        model.add_weighted_adapter(["default", "other"], weights, "sum", r=8)
        for layer in krona_layers(model).values():

            def delta(name, layer=layer):
                A, B = (factors[name].detach().double() for factors in (layer.krona_A, layer.krona_B))
                return kron_delta_weight(A, B, scale=float(layer.scaling[name]))

            parts = zip(("default", "other"), weights, strict=True)
            want = sum(w * delta(name) for name, w in parts if name in layer.krona_A)
            error = ((delta("sum") - want).norm() / want.norm()).item()
            assert error <= 2 * torch.finfo(dtype).eps, (weights, error)  # A and B are rounded once each
            assert layer.krona_A["sum"].dtype == dtype
        model.delete_adapter("sum")


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -float("inf"), "1", None], ids=str)
def test_weights_of_adapters_are_finite_numbers(weight):
    model = adapted_mlp()
    layers = krona_layers(model).values()
    before = [dict(layer.scaling) for layer in layers]
    with pytest.raises(ConfigError, match="An adapter's weight should be a finite number, got"):
        for layer in layers:
            layer.set_scale("default", weight)
    assert [layer.scaling for layer in layers] == before


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_a_scale_that_cannot_be_taken_back(scale):
    """A pipeline multiplies s by it before a call, and divides afterwards: s would stay NaN."""
    (layer, *_) = krona_layers(adapted_mlp()).values()
    before = dict(layer.scaling)
    with pytest.raises(ConfigError, match="An adapter's weight should be a finite number, got"):
        layer.scale_layer(scale)
    assert layer.scaling == before


def test_weighted_sum_touches_only_layers_that_have_a_part():
    """A layer whose name ends in an adapted layer's name must not be adapted along."""
    base = nn.ModuleDict({"lin": nn.Linear(8, 8), "sub": nn.ModuleDict({"lin": nn.Linear(8, 8)})})
    model = get_peft_model(base, config("lin", exclude_modules=["sub.lin"]))
    assert list(krona_layers(model.base_model.model)) == ["lin"]
    model.add_adapter("other", config("lin", exclude_modules=["sub.lin"]))
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")
    assert list(krona_layers(model.base_model.model)) == ["lin"]


@pytest.mark.usefixtures("float64")
def test_weighted_sum_of_convolutions_and_embeddings():
    base = nn.ModuleDict({"conv": nn.Conv2d(4, 6, 3, groups=2), "emb": nn.Embedding(12, 8)})
    model = get_peft_model(base, config(["conv", "emb"], a_out=2, a_in=2))
    model.add_adapter("other", config(["conv", "emb"], a_out=2, a_in=2, r=2, alpha=0.3))
    model.add_weighted_adapter(["other", "default"], [2.0, -0.5], "sum")
    for layer in krona_layers(model).values():
        want = 2.0 * layer.get_delta_weight("other") - 0.5 * layer.get_delta_weight("default")
        torch.testing.assert_close(layer.get_delta_weight("sum"), want)


# (settings of "default" and of "other", r of the sum): (terms by layer, is the sum exact up to rounding)
UNEQUAL = {
    "equal": (({}, {}), None, {"lin0": 2, "lin1": 2}, True),
    "factors": (({}, {"a_out": 2}), None, {"lin0": 2, "lin1": 2}, False),
    "factors, terms suffice": (({"a_out": 2, "a_in": 1}, {"a_out": 1, "a_in": 2}), 2, {"lin0": 2, "lin1": 2}, True),
    "one divides the other": (({}, {"a_out": 2}), 8, {"lin0": 3, "lin1": 3}, True),
    "layouts": (({}, {"layout": "diffusekrona"}), None, {"lin0": 2, "lin1": 2}, False),
    "layouts, terms suffice": (({"a_out": 2}, {"a_out": 2, "layout": "diffusekrona"}), 4, {"lin0": 4, "lin1": 4}, True),
    "layouts on layers apart": (({"targets": ["lin0"]}, {"targets": ["lin1"], "layout": "diffusekrona"}), None,
                                {"lin0": 1, "lin1": 1}, False),
    "fewer terms": (({"r": 2}, {"r": 2}), 3, {"lin0": 3, "lin1": 3}, False),
}  # fmt: skip


@pytest.mark.parametrize("name", UNEQUAL)
def test_weighted_sum_of_unequal_adapters(name, caplog):
    (first, second), r, terms, exact = UNEQUAL[name]
    model = get_peft_model(mlp(), config(**{"targets": ["lin0", "lin1"], **first}))
    model.add_adapter("other", config(**{"targets": ["lin0", "lin1"], **second}))
    errors = model.add_weighted_adapter(["default", "other"], [0.7, -1.5], "sum", r=r)
    assert (errors == {}) == (name == "equal") == ("nearest Kronecker sum" not in caplog.text)
    for layer_name, layer in krona_layers(model.base_model.model).items():
        parts = {"default": 0.7, "other": -1.5}
        want = sum(
            delta_weight_loop(layer.krona_A[a], layer.krona_B[a], w, layer.layout[a])
            for a, w in parts.items()
            if a in layer.krona_A
        )
        got = delta_weight_loop(layer.krona_A["sum"], layer.krona_B["sum"], 1.0, layer.layout["sum"])
        error = ((got - want).norm() / want.norm()).item()
        if layer_name in errors:
            assert (
                abs(error - errors[layer_name]) <= EPS and f"  {layer_name}: {errors[layer_name]:.1e} " in caplog.text
            )
        if exact or layer_name not in errors:
            assert error <= 8 * torch.finfo(torch.float32).eps, layer_name
    assert exact or max(errors.values()) > 1e-3  # the table would be wrong
    assert {n: layer.r["sum"] for n, layer in krona_layers(model.base_model.model).items()} == terms
    assert model.peft_config["sum"].layout in ("kron", "diffusekrona")


def test_weighted_sum_is_the_nearest_one():
    """Against the singular values of the rearranged sum, for each of the factors that there are."""
    model = get_peft_model(nn.Sequential(nn.Linear(12, 8)), config(a_out=4, a_in=2))
    model.add_adapter("other", config(a_out=2, a_in=3, r=2))
    errors = model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")
    layer = model.base_model.model[0]
    want = sum(delta_weight_loop(layer.krona_A[a], layer.krona_B[a], 1.0, "kron") for a in ("default", "other"))
    best = []
    for a_out, a_in in ((4, 2), (2, 3)):
        blocks = want.detach().reshape(a_out, 8 // a_out, a_in, 12 // a_in).permute(0, 2, 1, 3)
        values = torch.linalg.svdvals(blocks.reshape(a_out * a_in, -1))
        best.append((values[3:].norm() / values.norm()).item())
    assert abs(errors["0"] - min(best)) <= STORED and layer.r["sum"] == 3


@pytest.mark.parametrize(
    "arguments,message",
    [
        ((["default"], [1.0, 2.0], "sum"), "Expected one weight an adapter, got 1 adapters and 2 weights"),
        (([], [], "sum"), "Expected one weight an adapter, got 0 adapters"),
        (
            (["default", "nobody"], [1.0, 2.0], "sum"),
            r"Adapter\(s\) \['nobody'\] do not exist; there are \['default'\]",
        ),
        ((["default"], [1.0], "default"), "Adapter 'default' exists already. Delete it first or choose another name"),
        ((["default"], [float("nan")], "sum"), r"Weights must be finite, got \[nan\]"),
        ((["default"], ["1"], "sum"), r"Expected a list of numbers as weights, got \['1'\]"),
        ((["default"], [None], "sum"), r"Expected a list of numbers as weights, got \[None\]"),
        ((["default"], 1.0, "sum"), r"Expected a list of numbers as weights, got 1\.0"),
        (("default", [1.0], "sum"), "Expected a list of adapter names, got 'default'"),
        (({"default"}, [1.0], "sum"), r"Expected a list of adapter names, got \{'default'\}"),
        (([1], [1.0], "sum"), r"Expected a list of adapter names, got \[1\]"),
        ((["default"], [1.0], 3), "adapter_name=3 is not allowed"),
        ((["default", "default"], [1.0, 1.0], "sum"), "Each adapter may be named once"),
        ((["default"], [1.0], "sum", "linear", 0), "r=0 is not allowed; expected an integer >= 1, or None"),
        ((["default"], [1.0], "lin0"), "adapter_name='lin0' is not allowed: it is a part of the model's own names"),
        ((["default"], [1.0], "sum", "svd"), "combination_type='svd' is not offered; use 'linear', which is exact"),
    ],
    ids=lambda v: str(v)[:30],
)
def test_weighted_sum_refuses(arguments, message):
    model = adapted_mlp()
    with pytest.raises(ConfigError, match=message):
        model.add_weighted_adapter(*arguments)
    assert list(model.peft_config) == ["default"]


def test_weighted_sum_refuses_what_is_not_in_the_factors():
    """A trained bias or a module saved whole would silently be left out."""
    for kwargs in ({"modules_to_save": ["lin1"]}, {"bias": "all"}):
        model = adapted_mlp(targets=["lin0"], **kwargs)
        with pytest.raises(ConfigError, match=next(iter(kwargs))):
            model.add_weighted_adapter(["default"], [2.0], "sum")


# -- other -------------------------------------------------------------------------------------------------------------


def test_requires_grad_with_several_adapters():
    model = two()
    model.base_model.set_adapter(["default", "other"])
    assert sum(p.requires_grad for p in model.parameters()) == 6
    model.set_requires_grad("other", False)
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {"default"}


def test_the_optimizer_step_of_a_bf16_model_changes_fp32_factors_only():
    model = get_peft_model(mlp(torch.bfloat16), config(["lin0", "lin1"]))
    before = snapshot(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(X.bfloat16()).square().mean().backward()
    optimizer.step()
    changed = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert changed == {name for name in before if "krona_" in name}
    assert all(before[name].dtype == torch.float32 for name in changed)


def test_deepcopy_and_torch_save(tmp_path):
    model = two()
    torch.save(model, tmp_path / "model.pt")
    for clone in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert torch.equal(clone(X), model(X)) and isinstance(clone.base_model.model.lin0, KronALayer)


def test_adapters_of_one_config_do_not_share_state():
    shared = KronAConfig(target_modules="all-linear", a_out=4, a_in=2, init_weights=False)
    first, second = get_peft_model(mlp(), copy.deepcopy(shared)), get_peft_model(mlp(), copy.deepcopy(shared))
    assert not torch.equal(first(X), second(X)) and F.mse_loss(first(X), second(X)) > 0


def test_no_log_lines_for_factors_that_fit(caplog):
    with caplog.at_level(logging.INFO, logger="peft_krona"):
        adapted_mlp()
    assert not caplog.records

# SPDX-License-Identifier: Apache-2.0
"""PEFT's mixed models: KronA beside LoRA, LoKr and LoHa."""

import copy
import itertools
import warnings

import pytest
import torch
from adapted import assert_same_bits, config, krona_layers, mlp, snapshot
from peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig, PeftMixedModel, get_peft_model

OTHERS = {
    "lora": lambda **k: LoraConfig(target_modules=["lin0", "lin1"], r=2, init_lora_weights=False, **k),
    "lokr": lambda **k: LoKrConfig(target_modules=["lin0", "lin1"], r=2, init_weights=False, **k),
    "loha": lambda **k: LoHaConfig(target_modules=["lin0", "lin1"], r=2, init_weights=False, **k),
}
KRONA = {"targets": ["lin0", "lin1"]}


def mixed(other, krona_first, **kwargs):
    """An MLP with both adapters, active together."""
    configs = [("krona", config(**KRONA, **kwargs)), ("other", OTHERS[other]())]
    if not krona_first:
        configs.reverse()
    (name, first), (second_name, second) = configs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(mlp(), first, adapter_name=name, mixed=True)
        model.add_adapter(second_name, second)
    model.set_adapter(["krona", "other"])
    return model.eval()


def deltas(model):
    """dW of every adapter by layer, summed."""
    total = {}
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight") and name.rpartition(".")[2] != "base_layer":
            layer = module
            while hasattr(layer, "base_layer"):
                for adapter in ("krona", "other"):
                    if adapter in getattr(layer, layer.adapter_layer_names[0]):
                        key = name.rpartition(".")[2]
                        total[key] = total.get(key, 0) + layer.get_delta_weight(adapter).detach()
                layer = layer.base_layer
    return total


def dense(model, x):
    base, total = mlp(), deltas(model)
    with torch.no_grad():
        for name, delta in total.items():
            base.get_submodule(name).weight += delta
    return base(x)


BOTH = list(itertools.product(OTHERS, [True, False]))
IDS = [f"{other} {'after' if first else 'before'} krona" for other, first in BOTH]


@pytest.mark.parametrize("other,krona_first", BOTH, ids=IDS)
@pytest.mark.usefixtures("float64")
def test_outputs_add_up(other, krona_first):
    model, x = mixed(other, krona_first), torch.randn(3, 10)
    assert isinstance(model, PeftMixedModel)
    torch.testing.assert_close(model(x), dense(model, x))
    base = mlp()(x)
    outputs = {}
    for names in ("krona", "other"):
        model.set_adapter(names)
        outputs[names] = model(x)
        assert not torch.allclose(outputs[names], base)
    model.set_adapter(["other", "krona"])
    torch.testing.assert_close(model(x), dense(model, x))
    with model.disable_adapter():
        assert torch.equal(model(x), base)


@pytest.mark.parametrize("other,krona_first", BOTH, ids=IDS)
def test_gradients_reach_both(other, krona_first):
    model, x = mixed(other, krona_first), torch.randn(3, 10)
    model(x).sum().backward()
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    assert any("krona_" in name for name, _ in trainable) and any("krona_" not in name for name, _ in trainable)
    assert all(p.grad is not None for _, p in trainable)


@pytest.mark.parametrize("other,krona_first", BOTH, ids=IDS)
@pytest.mark.usefixtures("float64")
def test_merge_and_unload(other, krona_first):
    model, x = mixed(other, krona_first), torch.randn(3, 10)
    want = model(x)
    plain = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(plain(x), want)
    assert not any("base_layer" in name for name, _ in plain.named_modules())
    unloaded = model.unload()
    assert torch.equal(unloaded(x), mlp()(x))


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.usefixtures("float64")
def test_krona_merged_over_another_tuner(other):
    """KronA's layer wraps the other tuner's; unmerging in reverse order is exact."""
    model, x = mixed(other, krona_first=False), torch.randn(3, 10)
    layers = krona_layers(model)
    assert layers and all(hasattr(layer.base_layer, "base_layer") for layer in layers.values())
    before, want = snapshot(model), model(x)
    for layer in layers.values():
        layer.merge()
    torch.testing.assert_close(model(x), want)
    for layer in layers.values():
        layer.unmerge()
    assert_same_bits(model, before)


@pytest.mark.usefixtures("float64")
def test_another_tuner_merged_in_between_warns_and_subtracts():
    model, x = mixed("lora", krona_first=False), torch.randn(3, 10)
    want = model(x)
    layer = model.base_model.model.lin1
    layer.merge()
    layer.base_layer.merge()  # LoRA, inside
    torch.testing.assert_close(model(x), want)
    with pytest.warns(RuntimeWarning, match=r"was changed by something else while a KronA adapter was merged"):
        layer.unmerge()
    torch.testing.assert_close(model(x), want)
    layer.base_layer.unmerge()
    torch.testing.assert_close(layer.get_base_layer().weight, mlp().lin1.weight)


def test_what_was_merged_is_subtracted_whatever_the_adapter_is_now():
    model = mixed("lora", krona_first=False)
    layer = model.base_model.model.lin1
    layer.merge()
    layer.base_layer.merge()  # LoRA, inside
    layer.set_scale("krona", 5.0)
    torch.nn.init.normal_(layer.krona_A["krona"])
    with pytest.warns(RuntimeWarning, match=r"was changed by something else"):
        layer.unmerge()
    layer.base_layer.unmerge()
    error = (layer.get_base_layer().weight - mlp().lin1.weight).abs().max()
    assert error <= 8 * torch.finfo(torch.float32).eps * (1 + layer.base_layer.get_delta_weight("other").abs().max())


def test_krona_inside_another_tuner_restores_exactly_when_unmerged_in_reverse():
    model = mixed("lora", krona_first=True)
    outer = model.base_model.model.lin1
    inner = outer.base_layer
    original = inner.get_base_layer().weight.detach().clone()
    inner.merge()
    inner.unmerge()
    assert torch.equal(inner.get_base_layer().weight, original)


def test_delete_and_add_again():
    model, x = mixed("lora", krona_first=True), torch.randn(3, 10)
    model.delete_adapter("krona")
    assert not any("krona_A.krona" in name or "krona_B.krona" in name for name in model.state_dict())
    model.set_adapter("other")
    only_lora = model(x)
    model.add_adapter("krona", config(**KRONA))
    assert torch.equal(model(x), only_lora)
    model.set_adapter(["krona", "other"])
    assert not torch.allclose(model(x), only_lora)


@pytest.mark.usefixtures("float64")
def test_adapters_saved_apart_load_together(tmp_path):
    x = torch.randn(3, 10)
    base = mlp()(x)
    total = base
    for name, adapter in (
        ("krona", config("lin1")),
        ("other", LoraConfig(target_modules=["lin1"], init_lora_weights=False)),
    ):
        single = get_peft_model(mlp(), adapter)
        single.save_pretrained(str(tmp_path / name))
        total = total + single.eval()(x) - base  # lin1 is the last layer: the parts add up
    loaded = PeftMixedModel.from_pretrained(mlp(), str(tmp_path / "krona"), adapter_name="krona")
    loaded.load_adapter(str(tmp_path / "other"), adapter_name="other")
    loaded.set_adapter(["krona", "other"])
    torch.testing.assert_close(loaded.eval()(x), total)


def test_settings_reach_the_layers():
    model = mixed("lora", krona_first=False, rank_pattern={"lin1": 3}, factor_pattern={"lin0": (5, 5)})
    layers = krona_layers(model)
    assert [layer.r["krona"] for layer in layers.values()] == [1, 3]
    assert [layer.factors("krona") for layer in layers.values()] == [(5, 5), (4, 2)]


def test_incompatible_tuner_is_still_refused():
    model = get_peft_model(mlp(), config(**KRONA), mixed=True)
    with pytest.raises(ValueError, match=r"The provided `peft_type` 'IA3' is not compatible"):
        model.add_adapter("ia3", IA3Config(target_modules=["lin0"], feedforward_modules=[]))

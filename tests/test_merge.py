# SPDX-License-Identifier: Apache-2.0
"""Merging: the right weight, the base back bit for bit, and nothing changed where it is refused."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from adapted import (
    LAYERS,
    adapt,
    adapted_mlp,
    assert_rounded_once,
    assert_same_bits,
    config,
    delta_in_base_shape,
    krona_layers,
    make_layer,
    mlp,
    snapshot,
)
from peft import PeftModel, get_peft_model
from tiny import unet
from torch import nn

import peft_krona
from peft_krona import KronAConfig
from peft_krona.errors import MergeError
from peft_krona.ops.reference import delta_weight_loop

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ("kron", "diffusekrona")
NAN = "NaNs detected in the merged weights. The adapter {} seems to be broken"


def two_adapters(dtype=None):
    """An MLP with "default" on both Linears and "other" on the second one."""
    model = adapted_mlp(dtype=dtype)
    model.add_adapter("other", config(["lin1"], a_out=2, a_in=5, r=2, layout="diffusekrona", alpha=0.6))
    return model


def weights(model):
    return {name: layer.get_base_layer().weight.detach().clone() for name, layer in krona_layers(model).items()}


# -- the merged weight -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", LAYERS)
def test_merged_weight_is_rounded_once_and_restored_bit_for_bit(name, layout, dtype):
    base, model, layer, x = make_layer(name, dtype, layout)
    exact = base.weight.double() + delta_in_base_shape(
        base, delta_weight_loop(layer.krona_A["default"], layer.krona_B["default"], 0.7, layout)
    )
    unmerged = model(x)
    before = snapshot(model)
    model.merge_adapter()
    got = layer.get_base_layer().weight
    assert got.dtype == dtype and got.is_contiguous()
    assert_rounded_once(got, exact, base.weight)
    if dtype == torch.float64:
        torch.testing.assert_close(model(x), unmerged)
    model.unmerge_adapter()
    assert_same_bits(model, before)
    assert torch.equal(model(x), unmerged)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_updates_survive_in_the_sum(dtype):
    """Ten adapters, each less than half an ulp of the weight: added one by one in bf16 they would all be lost."""
    model, layer = adapt(nn.Linear(4, 4, bias=False), adapter_name="n0", a_out=2, a_in=2)
    for i in range(1, 10):
        model.add_adapter(f"n{i}", config("0", a_out=2, a_in=2))
    model.to(dtype)
    with torch.no_grad():
        layer.get_base_layer().weight.fill_(1.0)
        for i in range(10):
            layer.krona_A[f"n{i}"].fill_(torch.finfo(dtype).eps / 4)
            layer.krona_B[f"n{i}"].fill_(1.0)
    names = [f"n{i}" for i in range(10)]
    model.merge_adapter(names)
    assert (layer.get_base_layer().weight.double() - 1 - 2.5 * torch.finfo(dtype).eps).abs().max() <= torch.finfo(
        dtype
    ).eps / 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_after_the_other_equals_all_at_once(dtype):
    one, both = two_adapters(dtype), None
    both = copy.deepcopy(one)
    one.merge_adapter(["default"])
    one.merge_adapter(["other"])
    both.merge_adapter(["default", "other"])
    assert_same_bits(one, snapshot(both))
    assert one.base_model.model.lin1.merged_adapters == ["default", "other"]
    before = weights(one)
    with pytest.warns(UserWarning, match=r"are already merged|Already following adapters were merged"):
        one.merge_adapter(["other"])
    assert all(torch.equal(w, before[n]) for n, w in weights(one).items())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unmerge_after_several_merges(dtype):
    model = two_adapters(dtype)
    before = snapshot(model)
    model.merge_adapter(["other"])
    model.merge_adapter(["default"])
    model.unmerge_adapter()
    assert_same_bits(model, before)
    for layer in krona_layers(model).values():
        assert layer.merged_adapters == [] and not layer.merged and layer._snapshot is None


@pytest.mark.usefixtures("float64")
def test_forward_while_merged_is_the_base_layer_alone(monkeypatch):
    model = adapted_mlp()
    x = torch.randn(3, 10)
    want = model(x)
    model.merge_adapter()
    for layer in krona_layers(model).values():
        monkeypatch.setattr(layer, "_adapted", None)
    torch.testing.assert_close(model(x), want)


def test_disabling_while_merged_unmerges():
    model, base, x = adapted_mlp(), mlp(), torch.randn(3, 10)
    want = model(x)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(x), base(x))
    assert not any(layer.merged for layer in krona_layers(model).values())
    assert torch.equal(model(x), want)


def test_merging_under_disabled_adapters():
    model, x = adapted_mlp(), torch.randn(3, 10)
    before, want = snapshot(model), model(x)
    with model.disable_adapter():
        model.merge_adapter()
        assert torch.equal(model(x), mlp()(x))  # unmerged by the forward
    assert_same_bits(model, before)
    assert torch.equal(model(x), want)


@pytest.mark.usefixtures("float64")
def test_merging_in_train_mode_applies_no_dropout():
    model = adapted_mlp(krona_dropout=0.9, module_dropout=0.9)
    model.train()
    x = torch.randn(3, 10)
    want = copy.deepcopy(model).eval()(x)
    model.merge_adapter()
    torch.testing.assert_close(model.eval()(x), want)


def test_merging_an_adapter_that_a_layer_lacks_changes_nothing_there():
    model = two_adapters()
    before = weights(model)
    model.merge_adapter(["other"])
    after = weights(model)
    assert torch.equal(after["base_model.model.lin0"], before["base_model.model.lin0"])
    assert not torch.equal(after["base_model.model.lin1"], before["base_model.model.lin1"])


def test_gradients_do_not_flow_through_the_merge():
    model = adapted_mlp()
    model.merge_adapter()
    assert all(not layer.get_base_layer().weight.requires_grad for layer in krona_layers(model).values())
    assert all(layer.get_base_layer().weight.grad_fn is None for layer in krona_layers(model).values())


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload", "merged", "layer"])
def test_safe_merge_of_a_broken_adapter_changes_no_layer(how, bad):
    model = adapted_mlp()
    before = snapshot(model)
    layers = krona_layers(model)
    with torch.no_grad():  # the last layer is the broken one
        layers["base_model.model.lin1"].krona_B["default"][0, 0, 0] = bad
    before["base_model.model.lin1.krona_B.default"] = layers["base_model.model.lin1"].krona_B["default"].clone()
    with pytest.raises(ValueError, match=NAN.format("default")):
        if how == "merged":
            with peft_krona.merged(model, safe_merge=True):
                raise AssertionError("not reached")
        elif how == "layer":
            layers["base_model.model.lin1"].merge(safe_merge=True)
        else:
            getattr(model, how)(safe_merge=True)
    after = snapshot(model)
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=0, equal_nan=True)
    assert not any(layer.merged for layer in layers.values())


def test_safe_merge_of_sound_adapters_is_the_same_merge():
    safe, plain = two_adapters(), None
    plain = copy.deepcopy(safe)
    safe.merge_adapter(["default", "other"], safe_merge=True)
    plain.merge_adapter(["default", "other"])
    assert_same_bits(safe, snapshot(plain))


def test_safe_merge_sees_a_sum_that_overflows():
    """In fp16 each adapter alone fits, both together do not."""
    model, layer = adapt(nn.Linear(4, 4).half(), a_out=2, a_in=2)
    model.add_adapter("other", config("0", a_out=2, a_in=2))
    before = layer.get_base_layer().weight.clone()
    with torch.no_grad():
        for name in ("default", "other"):
            layer.krona_A[name].fill_(200.0)
            layer.krona_B[name].fill_(200.0)
    with pytest.raises(ValueError, match=NAN.format("other")):
        model.merge_adapter(["default", "other"], safe_merge=True)
    assert torch.equal(layer.get_base_layer().weight, before)


def test_unmerging_nothing_warns():
    model = adapted_mlp()
    before = snapshot(model)
    with pytest.warns(UserWarning, match=r"Already unmerged. Nothing to do"):
        model.unmerge_adapter()
    assert_same_bits(model, before)


def test_merging_twice_warns_and_merges_once():
    model = adapted_mlp()
    model.merge_adapter()
    before = snapshot(model)
    with pytest.warns(UserWarning, match=r"[Aa]lready.*merged|merged.*already"):
        model.merge_adapter()
    assert_same_bits(model, before)


# -- unloading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("progressbar", [False, True])
@pytest.mark.usefixtures("float64")
def test_merge_and_unload(safe_merge, progressbar):
    model, x = adapted_mlp(), torch.randn(3, 10)
    want, expected = model(x), None
    merged = copy.deepcopy(model)
    merged.merge_adapter()
    expected = weights(merged)
    plain = model.merge_and_unload(safe_merge=safe_merge, progressbar=progressbar)
    assert type(plain.lin0) is nn.Linear and not any("krona" in name for name, _ in plain.named_modules())
    torch.testing.assert_close(plain(x), want)
    for name, weight in expected.items():
        assert torch.equal(plain.get_submodule(name.removeprefix("base_model.model.")).weight, weight)
    assert not hasattr(plain, "peft_config")


def test_unload_gives_the_base_model_back():
    base, x = mlp(), torch.randn(3, 10)
    want, ids = base(x), {name: id(module) for name, module in base.named_modules()}
    plain = get_peft_model(base, config(["lin0", "lin1"])).unload()
    assert plain is base and {name: id(module) for name, module in base.named_modules()} == ids
    assert torch.equal(plain(x), want)


@pytest.mark.usefixtures("float64")
def test_merge_and_unload_of_some_adapters():
    model, x = two_adapters(), torch.randn(3, 10)
    model.set_adapter("other")
    want = model(x)
    model.set_adapter("default")
    torch.testing.assert_close(model.merge_and_unload(adapter_names=["other"])(x), want)


def test_an_unloaded_model_can_be_adapted_again():
    model = get_peft_model(adapted_mlp().merge_and_unload(), config(["lin0"]))
    assert list(krona_layers(model.base_model.model)) == ["lin0"]


# -- merged() ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
def test_merged_context(dtype):
    model, x = two_adapters(dtype), torch.randn(3, 10).to(dtype)
    before, want = snapshot(model), model(x)
    with peft_krona.merged(model) as inside:
        assert inside is model and all(layer.merged for layer in krona_layers(model).values())
        plain = mlp(dtype)
        for name, weight in weights(model).items():
            plain.get_submodule(name.removeprefix("base_model.model.")).weight.data = weight
        assert torch.equal(model(x), plain(x))
        if dtype == torch.float64:
            torch.testing.assert_close(model(x), want)
    assert_same_bits(model, before)
    assert torch.equal(model(x), want)


def test_merged_restores_after_an_exception():
    model = adapted_mlp(dtype=torch.bfloat16)
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt), peft_krona.merged(model):
        raise KeyboardInterrupt
    assert_same_bits(model, before)


def test_merged_restores_when_a_later_layer_cannot_be_merged(monkeypatch):
    model = adapted_mlp()
    before = snapshot(model)
    layer = krona_layers(model)["base_model.model.lin1"]
    monkeypatch.setattr(layer, "merge", lambda **kwargs: (_ for _ in ()).throw(MergeError("no")))
    with pytest.raises(MergeError, match=r"no"), peft_krona.merged(model):
        raise AssertionError("not reached")
    monkeypatch.undo()
    assert_same_bits(model, before)


def test_merged_nests():
    model = two_adapters()
    before = snapshot(model)
    with peft_krona.merged(model):
        outer = snapshot(model)
        with peft_krona.merged(model):
            assert_same_bits(model, outer)
        assert_same_bits(model, outer)
    assert_same_bits(model, before)


def test_merged_leaves_what_was_merged_before_merged():
    model = adapted_mlp()
    model.merge_adapter()
    before = snapshot(model)
    with peft_krona.merged(model):
        assert_same_bits(model, before)
    assert_same_bits(model, before)


def test_merged_with_named_adapters():
    model = two_adapters()
    before = snapshot(model)
    with peft_krona.merged(model, adapter_names=["other"]):
        assert model.base_model.model.lin1.merged_adapters == ["other"]
        assert model.base_model.model.lin0.merged_adapters == []
    assert_same_bits(model, before)


def test_merged_restores_a_weight_that_two_layers_share():
    tied = nn.ModuleDict({"embed": nn.Embedding(20, 8), "head": nn.Linear(8, 20, bias=False)})
    tied["head"].weight = tied["embed"].weight
    model = get_peft_model(tied, config(["embed", "head"]))
    before = snapshot(model)
    with warnings.catch_warnings(), peft_krona.merged(model):
        warnings.simplefilter("error")
    assert_same_bits(model, before)


@pytest.mark.parametrize("how", ["merge_adapter", "merged", "merge_and_unload"])
@pytest.mark.parametrize("merging_in", [torch.inference_mode, torch.no_grad], ids=["inference", "no_grad"])
@pytest.mark.usefixtures("float64")
def test_a_base_made_in_inference_mode(merging_in, how):
    with torch.inference_mode():
        model, x = adapted_mlp(), torch.randn(3, 10)
        want = model(x)
    with merging_in():
        if how == "merged":
            with peft_krona.merged(model):
                torch.testing.assert_close(model(x), want)
            assert torch.equal(model(x), want)
        elif how == "merge_adapter":
            model.merge_adapter()
            torch.testing.assert_close(model(x), want)
            model.unmerge_adapter()
            assert torch.equal(model(x), want)
        else:
            torch.testing.assert_close(model.merge_and_unload()(x), want)


@pytest.mark.parametrize("keep", [True, False], ids=["merge_adapter", "merge_and_unload"])
def test_a_base_merged_in_inference_mode_can_be_trained(keep):
    model, x = adapted_mlp(), torch.randn(3, 10)
    with torch.inference_mode():
        if keep:
            model.merge_adapter()
        else:
            model = model.merge_and_unload()
    model.requires_grad_(True)
    model(x).sum().backward()


@pytest.mark.usefixtures("float64")
def test_merged_on_a_bare_unet():
    model = unet()
    model.add_adapter(KronAConfig(a_out=8, a_in=2, init_weights=False), "a")
    inputs = torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 5, 32)
    before, want = snapshot(model), model(*inputs).sample
    with peft_krona.merged(model):
        torch.testing.assert_close(model(*inputs).sample, want)
    assert_same_bits(model, before)
    assert torch.equal(model(*inputs).sample, want)


def test_merged_without_adapters_is_an_error():
    with pytest.raises(MergeError, match=r"merged\(\) found no KronA layer in MLP. Add an adapter first"):
        with peft_krona.merged(mlp()):
            pass


# -- something else touches the weight ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_weight_that_changed_in_between_keeps_the_change(dtype):
    model, layer = adapt(nn.Linear(12, 8).to(dtype))
    original = layer.get_base_layer().weight.detach().clone()
    model.merge_adapter()
    with torch.no_grad():
        layer.get_base_layer().weight += 0.5
    with pytest.warns(RuntimeWarning, match=r"The base weight of Linear was changed by something else while a KronA"):
        model.unmerge_adapter()
    eps = torch.finfo(dtype).eps
    error = (layer.get_base_layer().weight.double() - original.double() - 0.5).abs().max()
    assert error <= 3 * eps * (original.double().abs().max() + 1 + layer.get_delta_weight("default").abs().max())
    model.merge_adapter()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.unmerge_adapter()


@pytest.mark.usefixtures("float64")
def test_merging_more_onto_a_weight_that_changed_in_between():
    model = two_adapters()
    layer = model.base_model.model.lin1
    original = layer.get_base_layer().weight.detach().clone()
    model.merge_adapter(["default"])
    with torch.no_grad():
        layer.get_base_layer().weight += 0.5
    model.merge_adapter(["other"])
    want = original + 0.5 + layer.get_delta_weight("default") + layer.get_delta_weight("other")
    torch.testing.assert_close(layer.get_base_layer().weight.detach(), want.detach())
    with pytest.warns(RuntimeWarning, match=r"was changed by something else"):
        model.unmerge_adapter()
    torch.testing.assert_close(layer.get_base_layer().weight.detach(), original + 0.5)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", ["a copy of the merged one", "the original"])
def test_a_base_layer_that_was_replaced_in_between(kind):
    """As quantizing and dequantizing a model do it: what was merged is taken out of the layer that is there now."""
    model, layer = adapt(nn.Linear(12, 8))
    original = copy.deepcopy(layer.base_layer)
    model.merge_adapter()
    merged = layer.base_layer
    if kind == "the original":
        layer.base_layer = copy.deepcopy(original)
        with pytest.warns(UserWarning, match="Already unmerged"):
            model.unmerge_adapter()
        assert torch.equal(layer.base_layer.weight, original.weight)
    else:
        layer.base_layer = copy.deepcopy(merged)
        with pytest.warns(RuntimeWarning, match="was changed by something else"):
            model.unmerge_adapter()
        torch.testing.assert_close(layer.base_layer.weight, original.weight)
    assert not torch.equal(merged.weight, original.weight), "the layer that was taken out is left alone"
    assert not layer.merged
    x = torch.randn(3, 12)
    torch.testing.assert_close(model(x), original(x) + F.linear(x, layer.get_delta_weight("default")))


def test_a_cast_in_between():
    model, layer = adapt(nn.Linear(12, 8))
    original = layer.get_base_layer().weight.detach().clone()
    model.merge_adapter()
    model.to(torch.float64)
    with pytest.warns(RuntimeWarning, match=r"do not cast or train the base model in between"):
        model.unmerge_adapter()
    assert layer.get_base_layer().weight.dtype == torch.float64
    error = (layer.get_base_layer().weight.detach() - original.double()).abs()
    size = original.abs() + layer.get_delta_weight("default").detach().abs()
    assert (error <= 2 * torch.finfo(torch.float32).eps * size).all()  # the merged weight was rounded to fp32


def test_a_copy_of_a_merged_model_restores_itself_only():
    model, _ = adapt(nn.Linear(12, 8))
    before = snapshot(model)
    model.merge_adapter()
    merged = snapshot(model)
    clone = copy.deepcopy(model)
    clone.unmerge_adapter()
    assert_same_bits(clone, before)
    assert_same_bits(model, merged)
    model.unmerge_adapter()
    assert_same_bits(model, before)


def test_saving_while_merged_saves_the_adapter(tmp_path):
    model, x = adapted_mlp(), torch.randn(3, 10)
    want = model(x)
    model.merge_adapter()
    model.save_pretrained(str(tmp_path))
    assert torch.equal(PeftModel.from_pretrained(mlp(), str(tmp_path))(x), want)


def test_new_scale_while_merged_takes_effect_after_unmerging():
    model, layer = adapt(nn.Linear(12, 8))
    before = snapshot(model)
    model.merge_adapter()
    layer.set_scale("default", 3.0)
    model.unmerge_adapter()
    assert_same_bits(model, before)

# SPDX-License-Identifier: Apache-2.0
"""What was merged is a fact of the past, whatever happens to the adapter afterwards."""

import copy
import io
import warnings

import pytest
import torch
from adapted import LAYERS, assert_rounded_once, config, delta_in_base_shape, krona_layers, make_layer, mlp
from convert_fixtures import relative
from peft import LoraConfig, get_peft_model
from tiny import sd_pipeline, unet
from torch import nn

import peft_krona
from peft_krona import KronAConfig
from peft_krona.errors import MergeError
from peft_krona.ops.reference import delta_weight_loop
from peft_krona.pipelines import add_krona

KINDS = ["linear b_first", "transformers Conv1D", "conv1d", "conv2d groups", "conv3d", "embedding"]


def delta(layer, name, scale):
    """s * dW of an adapter as it is now, in float64, as the base stores its weight."""
    loop = delta_weight_loop(layer.krona_A[name], layer.krona_B[name], scale, layer.layout[name])
    return delta_in_base_shape(layer.get_base_layer(), loop.detach())


def only_layer(model):
    (layer,) = krona_layers(model).values()
    return layer


@torch.no_grad()
def shake(model, name="a"):
    for layer in krona_layers(model).values():
        layer.krona_A[name].normal_()
        layer.krona_B[name].normal_()


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def load_other_values(model):
    state = {key: torch.randn_like(t) for key, t in model.state_dict().items() if key.endswith(".a")}
    model.load_state_dict(state, strict=False)


def cast_factors(model):
    for factors in (only_layer(model).krona_A, only_layer(model).krona_B):
        factors["a"] = factors["a"].bfloat16()


# What happens to adapter "a" while it is merged; returns the model to go on with, or None for the same one
EVENTS = {
    "nothing": lambda m: None,
    "weight set to 0": lambda m: only_layer(m).set_scale("a", 0.0),
    "weight set": lambda m: only_layer(m).set_scale("a", 3.0),
    "scaled": lambda m: only_layer(m).scale_layer(5.0),
    "scale taken back": lambda m: only_layer(m).unscale_layer(),
    "trained": shake,
    "other values loaded": load_other_values,
    "factors cast": cast_factors,
    "deleted": lambda m: only_layer(m).delete_adapter("a"),
    "another active": lambda m: only_layer(m).set_adapter(["b"]),
    "frozen and train mode": lambda m: m.train().requires_grad_(False),
    "moved": lambda m: m.to("cpu"),
    "copied": copy.deepcopy,
    "pickled": pickled,
}


# What keeps the sum of a weight's bits, and changes the weight
MOVES = {
    "rows swapped": lambda w: w.flip(0),
    "columns swapped": lambda w: w.flip(1),
    "rows rolled": lambda w: w.roll(1, 0),
    "two rows swapped": lambda w: w[[1, 0, *range(2, len(w))]],
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("move", MOVES)
def test_a_base_that_was_reordered_while_merged_stays_so(move, dtype):
    model = get_peft_model(nn.Sequential(nn.Linear(12, 8)).to(dtype), config("0", init_weights=False))
    weight = only_layer(model).get_base_layer().weight
    model.merge_adapter()
    moved = MOVES[move](weight.detach()).clone()
    weight.data.copy_(moved)
    delta = only_layer(model).get_delta_weight("default").double()
    with pytest.warns(RuntimeWarning, match="was changed by something else while a KronA adapter was merged"):
        model.unmerge_adapter()
    assert relative(weight.detach(), moved.double() - delta) <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_second_merge_adds_to_what_was_merged(kind, event):
    base, model, layer, _ = make_layer(kind, torch.float32, adapter_name="a", alpha=1.0)
    (a_out, a_in), r = LAYERS[kind][2:]
    model.add_adapter("b", config("0", a_out=a_out, a_in=a_in, r=r))
    layer.set_scale("a", 0.7)
    layer.set_scale("b", 0.8)
    first, second = delta(layer, "a", 0.7), delta(layer, "b", 0.8)
    model.merge_adapter(["a"])
    result = EVENTS[event](model)
    model = result if isinstance(result, nn.Module) else model
    layer = only_layer(model)
    weight = layer.get_base_layer().weight
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says that a is merged already
        layer.merge(safe_merge=True, adapter_names=["b"])
    assert layer.merged_adapters == ["a", "b"]
    assert_rounded_once(weight.detach(), base.weight.detach().double() + first + second, base.weight.detach())
    layer.unmerge(keep=1)
    assert_rounded_once(weight.detach(), base.weight.detach().double() + first, base.weight.detach())
    layer.unmerge()
    assert not layer.merged and weight is layer.get_base_layer().weight
    assert all(torch.equal(a, b) for a, b in zip(base.parameters(), layer.get_base_layer().parameters(), strict=True))


@pytest.mark.parametrize("event", EVENTS)
def test_unmerging_after_a_cast_subtracts_what_was_merged(event):
    base, model, layer, _ = make_layer("linear b_first", torch.float32, adapter_name="a", alpha=0.7)
    model.add_adapter("b", config("0", a_out=4, a_in=2))
    first = delta(layer, "a", 0.7)
    model.merge_adapter(["a"])
    result = EVENTS[event](model)
    model = (result if isinstance(result, nn.Module) else model).double()
    with pytest.warns(RuntimeWarning, match=r"dW was subtracted instead"):
        only_layer(model).unmerge()
    error = (only_layer(model).get_base_layer().weight - base.weight.double()).abs()
    # W + dW was rounded to fp32 once, dW is computed in fp32
    assert (error <= 4 * torch.finfo(torch.float32).eps * (base.weight.abs() + 2 * first.abs())).all()


@pytest.mark.parametrize(
    "call",
    [lambda m: m.set_adapter("b"), lambda m: m.add_weighted_adapter(["a", "b"], [0.5, -1.0], "sum"),
     lambda m: m.add_adapter("c", config("0"))],
    ids=["set_adapter", "add_weighted_adapter", "add_adapter"],
)  # fmt: skip
def test_where_peft_unmerges_first_the_original_is_back(call):
    base, model, layer, _ = make_layer("linear b_first", torch.bfloat16, adapter_name="a")
    model.add_adapter("b", config("0"))
    model.merge_adapter(["a"])
    layer.set_scale("a", 3.0)
    with pytest.warns(UserWarning, match=r"Unmerging the model first"):
        call(model)
    assert torch.equal(layer.get_base_layer().weight, base.weight) and not layer.merged


@pytest.mark.parametrize("how", ["unload", "merge_and_unload", "diffusers"])
def test_unloading_keeps_what_was_merged(how):
    """As with LoRA: what is in the base weight stays there."""
    if how == "diffusers":
        pipe = sd_pipeline()
        add_krona(pipe, KronAConfig(a_out=8, a_in=2, init_weights=False), adapter_name="one")
        pipe.fuse_lora()
        want = {n: layer.get_base_layer().weight.clone() for n, layer in krona_layers(pipe.unet).items()}
        pipe.unload_lora_weights()
        assert not krona_layers(pipe.unet)
        assert all(torch.equal(pipe.unet.get_submodule(n).weight, weight) for n, weight in want.items())
        return
    base, model, layer, _ = make_layer("linear b_first", torch.float32, adapter_name="a", alpha=0.7)
    model.add_adapter("b", config("0", alpha=0.8))
    want = base.weight.detach().double() + delta(layer, "a", 0.7)
    want += delta(layer, "b", 0.8) if how == "merge_and_unload" else 0
    model.merge_adapter(["a"])
    shake(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = model.unload() if how == "unload" else model.merge_and_unload(adapter_names=["b"])
    assert_rounded_once(plain[0].weight.detach(), want, base.weight.detach())


def test_a_weight_that_was_loaded_back_holds_no_share():
    model = get_peft_model(mlp(), config(["lin0", "lin1"]), adapter_name="a")
    model.add_adapter("b", config(["lin0", "lin1"]))
    before = copy.deepcopy(model.state_dict())
    model.merge_adapter(["a"])
    model.load_state_dict(before)
    with pytest.warns(UserWarning, match=r"Already unmerged"):
        model.unmerge_adapter()
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    model.merge_adapter(["a"])
    model.load_state_dict(before)
    model.merge_adapter(["b"])
    assert all(layer.merged_adapters == ["b"] for layer in krona_layers(model).values())
    model.unmerge_adapter()
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())


def test_adding_under_the_name_of_a_merged_adapter_is_refused():
    _, model, layer, _ = make_layer("linear b_first", torch.float32, adapter_name="a")
    model.add_adapter("b", config("0"))
    model.merge_adapter(["a"])
    layer.delete_adapter("a")
    del model.peft_config["a"]
    with pytest.raises(MergeError, match=r"Cannot add adapter 'a' to '0': an adapter of that name is merged into its"):
        model.add_adapter("a", config("0"))
    layer.unmerge()
    model.add_adapter("a", config("0"))


def test_merged_merges_beside_what_was_merged_before():
    base, model, layer, _ = make_layer("linear b_first", torch.bfloat16, adapter_name="a", alpha=0.7)
    model.add_adapter("b", config("0", alpha=0.8))
    both = base.weight.double() + delta(layer, "a", 0.7) + delta(layer, "b", 0.8)
    model.merge_adapter(["a"])
    before = layer.get_base_layer().weight.clone()
    shake(model)
    with pytest.warns(UserWarning, match=r"additionally merging b"), peft_krona.merged(model, ["b"], safe_merge=True):
        assert layer.merged_adapters == ["a", "b"]
        assert_rounded_once(layer.get_base_layer().weight.detach(), both.detach(), base.weight.detach())
    assert torch.equal(layer.get_base_layer().weight, before) and layer.merged_adapters == ["a"]
    model.unmerge_adapter()
    assert torch.equal(layer.get_base_layer().weight, base.weight)


@pytest.mark.parametrize(
    "names,error,message",
    [(["a", "typo"], MergeError, r"no KronA adapter \['typo'\] in this model; it has \['a'\]"),
     ("a", TypeError, r"should be a list of strings, got 'a'")],
)  # fmt: skip
def test_merged_with_names_that_are_none(names, error, message):
    _, model, layer, _ = make_layer("linear b_first", torch.float32, adapter_name="a")
    before = layer.get_base_layer().weight.clone()
    with pytest.raises(error, match=message), peft_krona.merged(model, names):
        raise AssertionError("not reached")
    assert torch.equal(layer.get_base_layer().weight, before)


def test_two_layers_that_share_a_weight_unmerge_exactly():
    tied = nn.ModuleDict({"embed": nn.Embedding(20, 8), "head": nn.Linear(8, 20, bias=False)})
    tied["head"].weight = tied["embed"].weight
    model = get_peft_model(tied, config(["embed", "head"]))
    before = tied["head"].weight.detach().clone()
    model.merge_adapter()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.unmerge_adapter()
    assert torch.equal(model.base_model.model["head"].weight, before)


def in_diffusers(make_config):
    """Weights of a tiny UNet after the calls of a report, by step."""
    torch.manual_seed(0)
    model = unet()
    original = {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith("weight")}
    model.add_adapter(make_config(), "a")
    model.add_adapter(make_config(), "b")
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "get_delta_weight")}
    da, db = ({n: m.get_delta_weight(k).detach() for n, m in layers.items()} for k in "ab")

    def error(weight_a, weight_b):
        worst = 0.0
        for name, layer in layers.items():
            want = original[f"{name}.weight"] + weight_a * da[name] + weight_b * db[name]
            size = original[f"{name}.weight"].abs() + da[name].abs() + db[name].abs()
            worst = max(worst, ((layer.get_base_layer().weight - want).abs() / size).max().item())
        return worst / torch.finfo(torch.float32).eps

    steps = {}
    model.set_adapters(["a"])
    model.fuse_lora(lora_scale=0.7)
    model.set_adapters(["a", "b"], [1.0, 0.8])
    model.fuse_lora(adapter_names=["b"])
    steps["a at 0.7, then b at 0.8"] = error(0.7, 0.8)
    model.unfuse_lora()
    steps["unfused"] = error(0, 0)
    model.set_adapters(["a"])
    model.fuse_lora()
    model.set_adapters(["a", "b"], [0.0, 0.5])
    model.fuse_lora(adapter_names=["b"])
    steps["a set to 0 afterwards"] = error(1, 0.5)
    model.unfuse_lora()
    steps["unfused again"] = error(0, 0)
    model.set_adapters(["a"])
    model.fuse_lora()
    model.delete_adapters("a")
    model.set_adapters(["b"])
    model.fuse_lora(adapter_names=["b"])
    steps["a deleted"] = error(1, 1)
    return steps, model, original


@pytest.mark.filterwarnings("ignore:.*were merged")
def test_fusing_in_diffusers_is_as_with_lora():
    krona, model, original = in_diffusers(lambda: KronAConfig(a_out=8, a_in=2, init_weights=False))
    lora, *_ = in_diffusers(lambda: LoraConfig(target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False))
    first = next(iter(krona))
    assert krona.pop("unfused") == krona.pop("unfused again") == 0  # exact; LoRA takes a out at its new weight
    assert all(error <= 4 for error in krona.values()), krona
    assert krona[first] <= lora[first] + 4
    model.unfuse_lora()  # more than LoRA can: the deleted one's share goes too
    assert all(torch.equal(p, original[n.replace(".base_layer", "")])
               for n, p in model.named_parameters() if n.replace(".base_layer", "") in original)  # fmt: skip

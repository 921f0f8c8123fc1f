# SPDX-License-Identifier: Apache-2.0
"""Parameter groups: every trainable parameter once, the rate and decay of each, and what PEFT's LoRA+ helper says."""

import warnings

import peft.optimizers
import pytest
import torch
from adapted import MLP, adapted_mlp, config, krona_layers, mlp
from peft import LoraConfig, PeftMixedModel, PeftModel, VeraConfig, get_peft_model
from torch import nn

from peft_krona import krona_param_groups
from peft_krona.errors import ConfigError, ConfigTypeError


def both(**kwargs):
    return get_peft_model(mlp(), config(["lin0", "lin1"], **kwargs))


def as_names(model: nn.Module, groups: list[dict]) -> dict[str, set[str]]:
    names = {id(p): n.removeprefix("base_model.model.") for n, p in model.named_parameters()}
    return {group["name"]: {names[id(p)] for p in group["params"]} for group in groups}


def check_once(model: nn.Module, groups: list[dict]) -> None:
    given = [id(p) for group in groups for p in group["params"]]
    assert len(given) == len(set(given))
    assert set(given) == {id(p) for p in model.parameters() if p.requires_grad}


A = {"lin0.krona_A.default", "lin1.krona_A.default"}
B = {"lin0.krona_B.default", "lin1.krona_B.default"}


def case(value) -> str:
    """The name of a case; a set has no order, and test workers have to agree on names."""
    return str(sorted(value)) if isinstance(value, set) else str(value)


@pytest.mark.parametrize(
    ("init", "zero"), [(True, B), ("diffusekrona", B), ("kaiming", B), ("cdka", A), (False, B)], ids=case
)
def test_the_factor_that_starts_at_zero_has_the_ratio(init, zero):
    model = both(init_weights=init)
    groups = krona_param_groups(model, 1e-3, ratio=4.0)
    check_once(model, groups)
    assert as_names(model, groups) == {"krona.random": (A | B) - zero, "krona.zero": zero}
    assert {g["name"]: g["lr"] for g in groups} == {"krona.random": 1e-3, "krona.zero": 4e-3}
    if init is not False:
        assert all((p == 0).all() for g in groups if g["name"] == "krona.zero" for p in g["params"])
        assert all((p != 0).any() for g in groups if g["name"] == "krona.random" for p in g["params"])
    assert not any("weight_decay" in group for group in groups)  # the optimizer's own


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_a_step_moves_each_side_at_its_own_rate(optimizer):
    model = both(init_weights=False)
    groups = krona_param_groups(model, 1e-2, ratio=4, weight_decay=0.0)
    assert all(g["weight_decay"] == 0.0 for g in groups)
    before = {n: p.clone() for n, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    optimizer(groups).step()
    moved = {n: (before[n] - p).abs().max().item() for n, p in model.named_parameters()}
    for name, by in moved.items():
        wanted = 1e-2 if "krona_A" in name else 4e-2 if "krona_B" in name else 0.0
        assert by == pytest.approx(wanted, rel=1e-4), name


def named(module: nn.Module) -> nn.Module:
    """Under names that say nothing: classes and shapes decide."""
    module.other = nn.Linear(4, 4)
    return module


@pytest.mark.parametrize(
    ("kwargs", "other", "no_decay"),
    [
        ({"bias": "krona_only"}, set(), {"lin0.base_layer.bias", "lin1.base_layer.bias"}),
        (
            {"bias": "all"},
            set(),
            {"lin0.base_layer.bias", "lin1.base_layer.bias", "norm.bias", "other.bias"},
        ),
        (
            {"modules_to_save": ["norm", "other"]},
            {"other.modules_to_save.default.weight"},
            {
                *("norm.modules_to_save.default.weight", "norm.modules_to_save.default.bias"),
                "other.modules_to_save.default.bias",
            },
        ),
    ],
    ids=case,
)
def test_what_else_is_trained(kwargs, other, no_decay):
    model = get_peft_model(named(mlp()), config(["lin0", "lin1"], init_weights=True, **kwargs))
    groups = krona_param_groups(model, 1e-3, ratio=16, weight_decay=0.1)
    check_once(model, groups)
    found = as_names(model, groups)
    assert (found.get("other", set()), found["no_decay"]) == (other, no_decay)
    for group in groups:
        assert group["lr"] == (16e-3 if group["name"] == "krona.zero" else 1e-3)
        assert group["weight_decay"] == (0.0 if group["name"] == "no_decay" else 0.1)


class RMSNorm2d(nn.Module):
    """A norm whose weight is no vector."""

    def __init__(self):
        super().__init__()
        self.weight, self.scale_bias = nn.Parameter(torch.ones(4, 1, 1)), nn.Parameter(torch.zeros(4, 1))


def test_norms_and_biases_of_any_shape_do_not_decay():
    base = mlp()
    base.rms = RMSNorm2d()
    model = get_peft_model(base, config(["lin0"], modules_to_save=["rms"]))
    found = as_names(model, krona_param_groups(model, 1e-3))
    assert found["no_decay"] == {f"rms.modules_to_save.default.{name}" for name in ("weight", "scale_bias")}


def test_other_adapters_beside_it():
    model = PeftMixedModel(mlp(), config(["lin0"], init_weights="cdka"), adapter_name="k")
    model.add_adapter("l", LoraConfig(target_modules=["lin1"], r=2))
    model.set_adapter(["k", "l"])
    groups = krona_param_groups(model, 1e-3, ratio=4)
    check_once(model, groups)
    found = as_names(model, groups)
    assert found["krona.zero"] == {"lin0.krona_A.k"}
    assert found["other"] == {"lin1.lora_A.l.weight", "lin1.lora_B.l.weight"}
    assert {g["name"]: g["lr"] for g in groups}["other"] == 1e-3


def test_two_adapters_of_different_inits():
    model = both(init_weights=True)
    model.add_adapter("second", config(["lin0"], init_weights="cdka"))
    model.set_adapter("second")
    groups = krona_param_groups(model, 1e-3)
    check_once(model, groups)  # the first one rests
    assert as_names(model, groups) == {"krona.random": {"lin0.krona_B.second"}, "krona.zero": {"lin0.krona_A.second"}}


def test_models_in_one_module_keep_their_own_inits():
    pair = nn.ModuleList([both(init_weights="cdka"), both(init_weights=True)])
    groups = krona_param_groups(pair, 1e-3)
    check_once(pair, groups)
    zero = next(g["params"] for g in groups if g["name"] == "krona.zero")
    assert all((p == 0).all() for p in zero) and len(zero) == 4


def test_a_parameter_that_two_modules_share_is_there_once():
    base = mlp()
    base.tied = nn.Linear(10, 20)
    base.tied.weight = base.lin0.weight
    model = get_peft_model(base, config(["lin1"]))
    base.lin0.weight.requires_grad_(True)
    check_once(model, krona_param_groups(model, 1e-3))


def test_a_model_of_diffusers_and_a_compiled_one():
    from tiny import unet

    model = unet()
    model.add_adapter(config(["to_q", "to_k"], init_weights=True))
    for wrapped in (model, torch.compile(model)):
        groups = krona_param_groups(wrapped, 1e-4, 2)
        check_once(model, groups)
        assert {g["name"]: len(g["params"]) for g in groups} == dict.fromkeys(
            ("krona.random", "krona.zero"), len(krona_layers(model))
        )


def test_a_reloaded_adapter_keeps_its_sides(tmp_path):
    both(init_weights="cdka").save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(mlp(), tmp_path, is_trainable=True)
    assert as_names(model, krona_param_groups(model, 1e-3))["krona.zero"] == A


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"lr": -1.0}, ConfigError, "lr=-1.0 is not allowed; expected a number >= 0."),
        ({"lr": "1e-3"}, ConfigError, "lr='1e-3' is not allowed; expected a number >= 0."),
        ({"lr": float("nan")}, ConfigError, "lr=nan is not allowed"),
        ({"ratio": 0}, ConfigError, "ratio=0 is not allowed; expected a number > 0."),
        ({"ratio": None}, ConfigError, "ratio=None is not allowed"),
        ({"ratio": True}, ConfigError, "ratio=True is not allowed"),
        ({"weight_decay": -0.1}, ConfigError, "weight_decay=-0.1 is not allowed; expected a number >= 0, or None"),
        ({"model": MLP()}, ConfigError, "MLP has no trainable KronA factors: no layer of it is adapted."),
        ({"model": None}, ConfigTypeError, "expected a model (torch.nn.Module), got NoneType. Of a pipeline, pass"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_input(arguments, error, says):
    with pytest.raises(error) as raised:
        krona_param_groups(**{"model": both(), "lr": 1e-3, **arguments})
    assert str(raised.value).startswith("krona_param_groups: ") and says in str(raised.value)


def test_an_adapter_that_does_not_train(tmp_path):
    both().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(mlp(), tmp_path)
    with pytest.raises(ConfigError, match=r"loaded for inference, or not the active one\. Load it with is_trainable"):
        krona_param_groups(model, 1e-3)


def test_a_part_of_a_model_does_not_know_the_init():
    model = both()
    with pytest.raises(ConfigError, match=r"says how adapter 'default' was initialised\. Pass the whole model"):
        krona_param_groups(nn.Sequential(model.base_model.model.lin0), 1e-3)


# -- PEFT's optimizers for LoRA ----------------------------------------------------------------------------------------

HELPERS = {
    "create_loraplus_optimizer": (
        lambda model: peft.optimizers.create_loraplus_optimizer(
            model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0
        ),
        "loraplus_lr_ratio has no effect on them. Use optimizer_cls",
    ),
    "create_lorafa_optimizer": (
        lambda model: peft.optimizers.create_lorafa_optimizer(model, r=2, lora_alpha=4, lr=1e-3),
        "it trains both of KronA's as AdamW does, and freezes none. Freeze krona_A yourself",
    ),
}


@pytest.mark.parametrize("name", HELPERS)
def test_a_helper_for_lora_says_that_it_does_nothing_for_krona(name):
    create, says = HELPERS[name]
    model = adapted_mlp()
    with pytest.warns(RuntimeWarning, match=f"{name} knows LoRA's factors only: ") as caught:
        optimizer = create(model)
    (warning,) = [w for w in caught if "LoRA's factors" in str(w.message)]
    assert says in str(warning.message) and warning.filename == __file__  # the line that called it
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    trained = [p for n, p in model.named_parameters() if "krona_" in n]
    assert all(p.requires_grad for p in trained) and {rates[id(p)] for p in trained} == {1e-3}  # as the warning says


@pytest.mark.parametrize("name", HELPERS)
@pytest.mark.parametrize("other", [LoraConfig(target_modules=["lin0"], r=2), VeraConfig(target_modules=["lin0"], r=2)])
def test_a_helper_for_lora_is_as_it_was_for_others(name, other):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        HELPERS[name][0](get_peft_model(mlp(), other))


def test_the_helper_that_finds_no_lora_refuses_by_itself():
    with pytest.raises(ValueError, match="did not find any trainable lora_A/lora_B"):
        peft.optimizers.create_riemannian_optimizer(adapted_mlp(), torch.optim.AdamW, lr=1e-3)

# SPDX-License-Identifier: Apache-2.0
"""Damaged files, configs from elsewhere and wrong calls: what is said, and what is left as it was."""

import json
import os
import warnings

import peft
import pytest
import torch
from adapted import adapted_mlp, assert_same_bits, assert_same_state, config, krona_layers, mlp, snapshot, state_of
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from peft_krona import KronAConfig
from peft_krona.errors import ConfigError, FactorError, FormatError

# 0.21 checks more when an adapter is added, and asks the tuner about weights that it loads
HAS_LOAD_HOOK = tuple(map(int, peft.__version__.split(".")[:2])) >= (0, 21)
KEY = "base_model.model.lin0.krona_A"
X = torch.randn(5, 10, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def folder(tmp_path):
    adapted_mlp().save_pretrained(str(tmp_path))
    return tmp_path


def rewrite(folder, change):
    path = folder / "adapter_model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path)


def rewrite_config(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


DAMAGE = {
    "truncated": (
        lambda f: os.truncate(f / "adapter_model.safetensors", 200), SafetensorError, "Error while deserial"),
    "cut short": (
        lambda f: os.truncate(f / "adapter_model.safetensors", (f / "adapter_model.safetensors").stat().st_size - 4),
        SafetensorError, "Error while deserializing header"),
    "garbage": (
        lambda f: (f / "adapter_model.safetensors").write_bytes(b"hello" * 99), SafetensorError, "Error while deseria"),
    "wrong shape": (
        lambda f: rewrite(f, lambda s: s.update({KEY: torch.zeros(1, 2, 2)})), RuntimeError,
        r"size mismatch for .*lin0.krona_A.*torch.Size\(\[1, 2, 2\]\) from checkpoint.* is torch.Size\(\[1, 4, 2\]\)"),
}  # fmt: skip
if HAS_LOAD_HOOK:
    DAMAGE |= {
        "foreign": (
            lambda f: save_file({"a.weight": torch.zeros(3)}, f / "adapter_model.safetensors"), FormatError,
            r"The weights do not fit adapter '\w+': no weights for base_model.model.lin0.krona_A; no weights for .*in0."
            r"krona_B; no weights for .*lin1.krona_A \(and 1 more\). Was it trained on another base model"),
        "missing key": (
            lambda f: rewrite(f, lambda s: s.pop(KEY)), FormatError,
            r"do not fit adapter '\w+': no weights for base_model.model.lin0.krona_A. Was it"),
        "left-over key": (
            lambda f: rewrite(f, lambda s: s.update({"base_model.model.lin9.krona_B": torch.zeros(3)})), FormatError,
            r"do not fit adapter '\w+': no layer for base_model.model.lin9.krona_B. Was it"),
    }  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_weights(folder, name):
    damage, error, message = DAMAGE[name]
    damage(folder)
    with pytest.raises(error, match=message):
        PeftModel.from_pretrained(mlp(), str(folder))


@pytest.mark.parametrize("name", DAMAGE)
def test_after_a_failed_load_the_other_adapter_is_as_it_was(folder, name):
    """PEFT has added the adapter when it finds the file damaged; deleting it leaves no trace."""
    damage, error, _ = DAMAGE[name]
    damage(folder)
    model = adapted_mlp("first")
    before, want = state_of(model), model(X)
    with pytest.raises(error):
        model.load_adapter(str(folder), "second")
    assert torch.equal(model(X), want) and model.active_adapters == ["first"]
    model.delete_adapter("second")
    if HAS_LOAD_HOOK:
        assert_same_state(model, before)
    else:  # peft < 0.21 freezes the other adapter while it adds one
        assert_same_bits(model, before["bits"])


def test_a_sound_file_loads_after_the_damaged_one(folder):
    rewrite(folder, lambda s: s.update({KEY: torch.zeros(1, 2, 2)}))
    model = adapted_mlp("first")
    with pytest.raises(RuntimeError):
        model.load_adapter(str(folder), "second")
    model.delete_adapter("second")
    rewrite(folder, lambda s: s.update({KEY: torch.ones(1, 4, 2)}))
    model.load_adapter(str(folder), "second")
    assert (krona_layers(model)["base_model.model.lin0"].krona_A["second"] == 1).all()


CONFIGS = {
    "bad value": ({"a_out": 0}, ConfigError, "KronAConfig.a_out=0 is not allowed; expected an integer >= 1"),
    "bad scaling": ({"scaling": "?"}, ConfigError, r"KronAConfig.scaling='\?' is not allowed; expected one of"),
    "contradiction": (
        {"target_modules": "lin0", "layers_to_transform": [1]}, ConfigError, "cannot be used with target_modules as"),
    "no such layer": ({"target_modules": ["nope"]}, ValueError, r"Target modules \{'nope'\} not found in the base"),
    "no such type": ({"peft_type": "NOPE"}, KeyError, "NOPE"),
    "strict factors": (
        {"a_out": 7, "strict_factors": True}, FactorError, "lin0: a_out=7 does not divide out_features=20. The n"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("how", ["from_pretrained", "load_adapter"])
def test_bad_configs_leave_the_model_as_it_was(folder, how, name):
    if name == "no such layer" and how == "load_adapter" and not HAS_LOAD_HOOK:
        pytest.skip("peft < 0.21 accepts a second adapter that matches nothing")
    fields, error, message = CONFIGS[name]
    rewrite_config(folder, **fields)
    model = mlp() if how == "from_pretrained" else adapted_mlp("first")
    before = state_of(model)
    with pytest.raises(error, match=message):
        if how == "from_pretrained":
            PeftModel.from_pretrained(model, str(folder))
        else:
            model.load_adapter(str(folder), "second")
    assert_same_state(model, before)


def test_unknown_fields_warn_and_are_left_out(folder):
    rewrite_config(folder, field_of_the_future=3)
    with pytest.warns(
        UserWarning, match=r"Unexpected keyword arguments \['field_of_the_future'\] for class KronAConfig"
    ):
        loaded = PeftConfig.from_pretrained(str(folder))
    assert type(loaded) is KronAConfig and not hasattr(loaded, "field_of_the_future")


def test_broken_json(folder):
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(json.JSONDecodeError):
        PeftModel.from_pretrained(mlp(), str(folder))


def test_unknown_field_in_python():
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'lora_alpha'"):
        KronAConfig(target_modules=["q"], lora_alpha=3)


@pytest.mark.skipif(not HAS_LOAD_HOOK, reason="peft < 0.21 has no hook for it")
def test_setting_a_state_dict_that_does_not_fit():
    model = adapted_mlp()
    before = snapshot(model)
    state = get_peft_model_state_dict(adapted_mlp(targets=["lin0"]))
    with pytest.raises(
        FormatError, match=r"no weights for base_model.model.lin1.krona_A; no weights for .*lin1.krona_B"
    ):
        set_peft_model_state_dict(model, state)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_refused_layers_come_before_anything_is_replaced_when_all_are():
    model = nn.ModuleDict({"norm": nn.LayerNorm(4)})
    before = state_of(model)
    with pytest.raises(TypeError, match=r"Cannot adapt 'norm'"):
        get_peft_model(model, config("norm"))
    assert_same_state(model, before)


@pytest.mark.parametrize("second", [False, True], ids=["first adapter", "second adapter"])
def test_a_target_refused_halfway_leaves_nothing_behind(second):
    """lin0 (10 to 20) is adapted before lin1 (20 to 8) is reached."""
    bad = KronAConfig(target_modules=["lin0", "lin1"], a_out=5, a_in=5, strict_factors=True)
    if second:
        model = adapted_mlp()
        before = state_of(model)
        with pytest.raises(FactorError, match="a_out=5 does not divide out_features=8"):
            model.add_adapter("other", bad)
        assert_same_state(model, before)
        assert list(model.peft_config) == ["default"]
    else:
        model = mlp()
        before = state_of(model)
        with pytest.raises(FactorError, match="a_out=5 does not divide out_features=8"):
            get_peft_model(model, bad)
        assert_same_state(model, before)
        assert not hasattr(model, "peft_config")


def test_strict_factor_error_names_the_nested_layer():
    with pytest.raises(FactorError, match=r"^block.lin: a_in=5 does not divide in_features=12. The nearest "
                                          r"divisors are 4 or 6; set them with factor_pattern"):  # fmt: skip
        base = nn.ModuleDict({"block": nn.ModuleDict({"lin": nn.Linear(12, 8)})})
        get_peft_model(base, KronAConfig(target_modules=["lin"], a_out=8, a_in=5, strict_factors=True))


def test_adapter_of_another_type_beside_krona():
    with pytest.raises(
        ValueError,  # the text of an enum that is a str names its class or not, as Python's version is
        match=r"Cannot combine adapters with different peft types. Found (PeftType\.)?KRONA and (PeftType\.)?LORA",
    ):
        adapted_mlp().add_adapter("other", LoraConfig(target_modules=["lin0"]))


@pytest.mark.parametrize("shape", [(5, 11), (5, 9), (5,)], ids=str)
def test_input_of_the_wrong_width(shape):
    with pytest.raises((RuntimeError, ValueError), match=r"shape"):
        adapted_mlp()(torch.randn(*shape))


def test_input_of_another_dtype_says_what_the_base_layer_says():
    def message(model):
        with pytest.raises(RuntimeError) as caught:
            model(X.bfloat16())
        return str(caught.value)

    assert message(adapted_mlp()) == message(mlp())


def test_no_warning_in_ordinary_use(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = PeftModel.from_pretrained(mlp(), str(folder))
        model(X)
        model.merge_adapter()
        model.unmerge_adapter()
        model.merge_and_unload()

# SPDX-License-Identifier: Apache-2.0
"""Names of adapters: what PEFT cannot tell from the model's own names is refused wherever an adapter is added."""

import warnings

import pytest
import torch
from adapted import adapted_mlp, assert_same_state, config, krona_layers, mlp, state_of
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import load_file
from tiny import sd_pipeline, text_encoder, unet
from transformers import CLIPTextModel

from peft_krona import KronAConfig
from peft_krona.errors import ConfigError
from peft_krona.pipelines import add_krona, load_krona_weights, save_krona_weights

PART = r"adapter_name='{}' is not allowed: it is a part of the model's own names"
UNET = KronAConfig(a_out=8, a_in=2, init_weights=False)


def attention(**kwargs):
    return KronAConfig(target_modules=["to_q"], a_out=8, a_in=2, init_weights=False, **kwargs)


def nothing(model):
    return model


def with_adapter(model):
    model.add_adapter(attention())
    return model


# Every way by which an adapter comes into a model: (the model before, the call with a name)
WAYS = {
    "get_peft_model": (mlp, lambda m, name: get_peft_model(m, config("lin0"), adapter_name=name)),
    "add_adapter": (adapted_mlp, lambda m, name: m.add_adapter(name, config("lin0"))),
    "inject": (mlp, lambda m, name: inject_adapter_in_model(config("lin0"), m, adapter_name=name)),
    "weighted": (adapted_mlp, lambda m, name: m.add_weighted_adapter(["default"], [1.0], name)),
    "mixed": (mlp, lambda m, name: get_peft_model(m, config(["lin0", "lin1"]), adapter_name=name, mixed=True)),
    "diffusers": (lambda: with_adapter(unet()), lambda m, name: m.add_adapter(attention(), name)),
    "transformers": (lambda: text_encoder(CLIPTextModel), lambda m, name: m.add_adapter(
        KronAConfig(target_modules=["q_proj"], a_out=8, a_in=2), name)),
}  # fmt: skip
NAMES = {
    "get_peft_model": ["lin0", "norm", "weight", "krona_A", "base_layer", "model", "base_model"],
    "add_adapter": ["lin1", "bias", "krona_dropout", "modules_to_save"],
    "inject": ["lin0"],
    "weighted": ["norm"],
    "mixed": ["lin1"],
    "diffusers": ["attn1", "mid_block", "to_q", "0", "transformer_blocks", "conv_in"],
    "transformers": ["mlp", "encoder", "fc1", "1"],
}


@pytest.mark.parametrize("way,name", [(way, name) for way, names in NAMES.items() for name in names])
def test_a_part_of_the_models_names_is_refused(way, name):
    make, add = WAYS[way]
    model = make()
    before = state_of(model)
    with pytest.raises(ConfigError, match=PART.format(name)), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        add(model, name)
    if way == "transformers":  # it has set this before it calls PEFT
        before["loaded"] = False
    if way != "mixed":
        assert_same_state(model, before)
    if way in ("diffusers", "transformers"):
        add(model, "fine")  # and what PEFT's callers noted beforehand is taken back


@pytest.mark.parametrize("name", ["", "a.b", "keys", "training", "_modules"])
@pytest.mark.parametrize("way", ["get_peft_model", "add_adapter", "inject"])
def test_names_that_torch_does_not_take_are_refused(way, name):
    make, add = WAYS[way]
    with pytest.raises(ConfigError, match=r"expected a name that is not empty, has no dots and is no attribute"):
        add(make(), name)


@pytest.mark.parametrize("name", ["default", "style", "attn", "lin", "krona_", "a b"])
def test_other_names_are_not(name):
    model = get_peft_model(mlp(), config(["lin0", "lin1"]), adapter_name=name)
    model.add_adapter("other", config(["lin0"]))
    model.delete_adapter(name)
    model.add_adapter(name, config(["lin0"], krona_dropout=0.1))
    assert len(get_peft_model_state_dict(model, adapter_name=name)) == 2


def test_modules_to_save_do_not_make_a_name_taken():
    model = get_peft_model(mlp(), config("lin0", modules_to_save=["lin1"]), adapter_name="one")
    model.add_adapter("two", config("lin0"))
    model.delete_adapter("one")
    model.add_adapter("one", config("lin0", modules_to_save=["lin1"]))


def test_another_tuners_adapter_of_such_a_name_takes_nothing_away(tmp_path):
    """LoRA's names are PEFT's; KronA's tensors are saved all the same."""
    pipe = sd_pipeline()
    add_krona(pipe, KronAConfig(a_out=8, a_in=2, init_weights=False))
    save_krona_weights(pipe, tmp_path / "before")
    lora = LoraConfig(target_modules=["to_q"], init_lora_weights=False)
    for name in ("attn1", "mid_block", "to_k", "0"):
        pipe.unet.add_adapter(lora, name)
    save_krona_weights(pipe, tmp_path / "after")
    before, after = (load_file(tmp_path / n / "unet" / "adapter_model.safetensors") for n in ("before", "after"))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert any(".base_layer.krona_" in key for key in pipe.unet.state_dict())  # LoRA's layers are around KronA's
    load_krona_weights(pipe, tmp_path / "after", "again")
    save_krona_weights(pipe, tmp_path / "again", "again")
    again = load_file(tmp_path / "again" / "unet" / "adapter_model.safetensors")
    assert before.keys() == again.keys() and all(torch.equal(before[key], again[key]) for key in before)


def test_a_file_is_loaded_beside_such_an_adapter(tmp_path):
    pipe = sd_pipeline()
    add_krona(pipe, UNET)
    save_krona_weights(pipe, tmp_path / "one")
    fresh = sd_pipeline()
    with pytest.raises(ConfigError, match=PART.format("attn1")):
        load_krona_weights(fresh, tmp_path / "one", "attn1")
    fresh.unet.add_adapter(LoraConfig(target_modules=["to_q"]), "attn1")
    load_krona_weights(fresh, tmp_path / "one", "style")
    for name, layer in krona_layers(fresh.unet).items():
        assert torch.equal(layer.krona_B["style"], pipe.unet.get_submodule(name).krona_B["default"])


def test_from_pretrained_says_so(tmp_path):
    adapted_mlp().save_pretrained(str(tmp_path))
    with pytest.raises(ConfigError, match=PART.format("lin0")):
        PeftModel.from_pretrained(mlp(), str(tmp_path), adapter_name="lin0")

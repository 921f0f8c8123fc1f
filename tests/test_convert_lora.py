# SPDX-License-Identifier: Apache-2.0
"""LoRA in: every dialect, exactly; and KronA in the single files that diffusers writes."""

import json

import pytest
import torch
from convert_fixtures import anything, attention, random_adapter, relative, tiny_clip, tiny_unet
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from rounding import STORED
from torch import nn

from peft_krona.convert import from_lora, from_tensors, read_adapter
from peft_krona.errors import FormatError

BLOCK = "mid_block.attentions.0.transformer_blocks.0.attn1"
FLAT = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1"
DIALECTS = {
    "kohya": (f"{FLAT}_to_out_0.lora_down.weight", f"{FLAT}_to_out_0.lora_up.weight"),
    "kohya-ldm": (
        "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_out_0.lora_down.weight",
        "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_out_0.lora_up.weight",
    ),
    "peft": (f"unet.{BLOCK}.to_out.0.lora_A.weight", f"unet.{BLOCK}.to_out.0.lora_B.weight"),
    "diffusers": (f"unet.{BLOCK}.to_out.0.lora.down.weight", f"unet.{BLOCK}.to_out.0.lora.up.weight"),
    "diffusers-old": (
        f"unet.{BLOCK}.processor.to_out_lora.down.weight",
        f"unet.{BLOCK}.processor.to_out_lora.up.weight",
    ),
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_is_kronecker_with_a_in_of_one(dialect):
    down, up = torch.randn(4, 24), torch.randn(32, 4)
    (layer,) = from_tensors(dict(zip(DIALECTS[dialect], (down, up), strict=True)))
    assert layer.name == f"unet.{BLOCK}.to_out.0"
    assert (layer.r, layer.factors, tuple(layer.B.shape), layer.scale) == (4, (32, 1), (4, 1, 24), 1.0)
    assert relative(layer.delta_weight(), up.double() @ down.double()) < 1e-12


@pytest.mark.parametrize("kernel", [(3, 3), (1, 1)])
def test_convolutions_and_alpha(kernel):
    down, up = torch.randn(4, 8, *kernel), torch.randn(16, 4, 1, 1)
    name = "lora_unet_down_blocks_0_resnets_0_conv1"
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(2.0)}
    (layer,) = from_tensors(tensors)
    wanted = torch.einsum("or,rikl->oikl", up.double()[..., 0, 0], down.double()) * 0.5
    assert relative(layer.delta_weight(), wanted) < 1e-12


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_lora_folders(tmp_path, rslora):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.conv = nn.Linear(24, 16), nn.Linear(24, 32), nn.Conv2d(4, 8, 3)

        def forward(self, x):
            return x

    settings = {"rank_pattern": {"b": 2}, "alpha_pattern": {"conv": 7}, "use_rslora": rslora}
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["a", "b", "conv"], init_lora_weights=False, **settings)
    model = get_peft_model(Net(), config)
    model.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path)
    assert len(adapter) == 3
    for layer in adapter:
        wanted = model.base_model.model.get_submodule(layer.module).get_delta_weight("default")
        assert relative(layer.delta_weight(), wanted) <= STORED


def test_the_lora_that_diffusers_saves_with_its_config(tmp_path):
    unet = tiny_unet()
    config = LoraConfig(r=4, lora_alpha=2, target_modules=["to_q", "conv1"], init_lora_weights=False)
    unet.add_adapter(config, "x")
    unet.save_lora_adapter(tmp_path, adapter_name="x")
    layers = {layer.module: layer for layer in read_adapter(tmp_path)}
    for name, module in unet.named_modules():
        if hasattr(module, "lora_A"):
            assert relative(layers.pop(name).delta_weight(), module.get_delta_weight("x")) <= STORED
    assert not layers


@pytest.mark.parametrize("way", ["save_lora_adapter", "save_lora_weights"])
def test_krona_in_the_single_files_that_diffusers_writes(way, tmp_path):
    from diffusers import StableDiffusionPipeline

    models = {"unet": tiny_unet(), "text_encoder": tiny_clip()}
    if way == "save_lora_adapter":
        del models["text_encoder"]
    adapter = random_adapter(models, attention, factors=(8, 4), layout="diffusekrona", scale=0.5)
    states, configs = {}, {}
    for component, (config, state_dict) in adapter.peft_components(models).items():
        models[component].add_adapter(config, "x")
        state = {key.removeprefix("base_model.model."): tensor for key, tensor in state_dict.items()}
        from peft import set_peft_model_state_dict

        assert not set_peft_model_state_dict(models[component], state, "x").unexpected_keys
        states[component] = get_peft_model_state_dict(models[component], adapter_name="x")
        configs[component] = models[component].peft_config["x"].to_dict()
    if way == "save_lora_adapter":
        models["unet"].save_lora_adapter(tmp_path, adapter_name="x")
    else:
        StableDiffusionPipeline.save_lora_weights(
            tmp_path, states["unet"], text_encoder_lora_layers=states["text_encoder"],
            unet_lora_adapter_metadata=configs["unet"], text_encoder_lora_adapter_metadata=configs["text_encoder"],
        )  # fmt: skip
    again = {layer.name: layer for layer in read_adapter(tmp_path)}
    assert again.keys() == {layer.name for layer in adapter}
    for layer in adapter:
        assert torch.equal(again[layer.name].A, layer.A)
        assert (again[layer.name].scale, again[layer.name].layout) == (0.5, "diffusekrona")


def test_native_adapters_of_every_kind_of_layer_through_peft(tmp_path):
    """What PEFT itself saves, with patterns and scalings, read back to the same dW."""
    from peft_krona import KronAConfig

    unet = tiny_unet(xl=True)
    config = KronAConfig(
        target_modules=["to_q", "to_k", "conv1", "proj_in"], a_out=8, a_in=4, r=2, alpha=3.0, scaling="cdka",
        rank_pattern={"to_k": 1}, alpha_pattern={"conv1": 0.5}, factor_pattern={"attn2.to_k": (4, 16)},
        init_weights=False,
    )  # fmt: skip
    model = get_peft_model(unet, config)
    model.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path)
    assert adapter.components == ("unet",)
    for layer in adapter:
        wanted = model.base_model.model.get_submodule(layer.module).get_delta_weight("default")
        assert relative(layer.delta_weight(), wanted) <= STORED
    assert {layer.r for layer in adapter} == {1, 2} and anything("unet", layer.module)


def test_weights_trained_beside_the_adapter_are_left_to_peft(tmp_path):
    from peft_krona import KronAConfig

    config = KronAConfig(target_modules=["to_q"], a_out=8, a_in=4, modules_to_save=["conv_out"])
    get_peft_model(tiny_unet(), config).save_pretrained(tmp_path)
    with pytest.raises(FormatError, match=r"'conv_out\.(weight|bias)' is a whole weight .* PeftModel.from_pretrained"):
        read_adapter(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_up.weight": None}, "has lora_down.weight but not lora_up.weight"),
        ({"lora_up.weight": torch.ones(32, 5)}, "expected down"),
        ({"lora_down.weight": torch.ones(4)}, "expected down"),
        ({"lora_up.weight": torch.ones(32, 4, 3, 3), "lora_down.weight": torch.ones(4, 24, 3, 3)}, "expected down"),
        ({"dora_scale": torch.ones(32)}, r"dora_scale.*no plain low-rank update"),
        ({"lora_mid.weight": torch.ones(4, 4, 3, 3)}, "lora_mid.weight"),
        ({"alpha": torch.tensor(0.0)}, "positive number"),
        ({"banana": torch.tensor(0.0)}, "does not belong here"),
    ],
)
def test_errors_name_layer_and_reason(change, message):
    parts = {"lora_down.weight": torch.ones(4, 24), "lora_up.weight": torch.ones(32, 4)} | change
    with pytest.raises(FormatError, match=message) as error:
        from_lora({f"{FLAT}_to_q.{key}": tensor for key, tensor in parts.items() if tensor is not None})
    assert "to_q" in str(error.value)


@pytest.mark.parametrize("text", ["[", "[1]", json.dumps({"peft_type": "LORA", "lora_alpha": "x"}), "{}x", '{"r": 1}'])
def test_metadata_that_is_no_config(text):
    with pytest.raises(FormatError, match=r"lora_adapter_metadata|positive number|peft_type=None"):
        from_tensors(
            {f"{FLAT}_to_q.lora_A.weight": torch.ones(4, 24), f"{FLAT}_to_q.lora_B.weight": torch.ones(32, 4)},
            {"lora_adapter_metadata": text},
        )

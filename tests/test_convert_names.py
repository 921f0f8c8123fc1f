# SPDX-License-Identifier: Apache-2.0
"""Names: every layer of the real architectures there and back, and known pairs."""

import pytest
import torch
from convert_fixtures import tiny_clip, tiny_unet

from peft_krona.convert import BASES, shapes_of_models
from peft_krona.convert.file_names import from_name
from peft_krona.convert.names import guess_component, to_module_name
from peft_krona.convert.unet_names import diffusers_to_ldm, kernel_of, ldm_to_diffusers, to_kohya_name
from peft_krona.errors import FormatError


def real_unet(kind):
    """The real architecture on the meta device."""
    from diffusers import UNet2DConditionModel

    sd = {
        "block_out_channels": (320, 640, 1280, 1280),
        "cross_attention_dim": BASES[kind].cross_attention_dim,
        "use_linear_projection": BASES[kind].linear_projection,
    }
    xl = {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }
    with torch.device("meta"):
        return UNet2DConditionModel(**(xl if kind == "sdxl" else sd))


@pytest.mark.parametrize("kind", BASES)
def test_every_layer_of_the_real_unets_there_and_back(kind):
    shapes = shapes_of_models({"unet": real_unet(kind)})["unet"]
    names = {to_kohya_name("unet", module, BASES[kind]): module for module in shapes}
    assert len(names) == len(shapes)
    for name, module in names.items():
        assert from_name(name) == ("unet", module)
        ldm = diffusers_to_ldm(module, BASES[kind])
        assert ldm_to_diffusers(ldm) == module
        assert from_name(f"diffusion_model.{ldm}") == ("unet", module)
        assert from_name(f"unet.{module}") == ("unet", module)
        kernel = shapes[module][2:]
        assert kernel_of("unet", module, BASES[kind]) == kernel


@pytest.mark.parametrize(
    ("module", "ldm"),
    [
        ("down_blocks.1.attentions.0.proj_in", "input_blocks.4.1.proj_in"),
        ("down_blocks.0.resnets.1.time_emb_proj", "input_blocks.2.0.emb_layers.1"),
        ("down_blocks.0.downsamplers.0.conv", "input_blocks.3.0.op"),
        ("mid_block.attentions.0.transformer_blocks.9.ff.net.2", "middle_block.1.transformer_blocks.9.ff.net.2"),
        ("mid_block.resnets.1.conv2", "middle_block.2.out_layers.3"),
        ("up_blocks.0.attentions.2.proj_out", "output_blocks.2.1.proj_out"),
        ("up_blocks.0.upsamplers.0.conv", "output_blocks.2.2.conv"),
        ("up_blocks.2.resnets.0.conv_shortcut", "output_blocks.6.0.skip_connection"),
        ("add_embedding.linear_2", "label_emb.0.2"),
        ("conv_in", "input_blocks.0.0"),
        ("conv_out", "out.2"),
    ],
)
def test_known_names_of_sdxl(module, ldm):
    assert diffusers_to_ldm(module, BASES["sdxl"]) == ldm


def test_upsampler_slot_depends_on_attention():
    assert diffusers_to_ldm("up_blocks.0.upsamplers.0.conv", BASES["sd15"]) == "output_blocks.2.1.conv"
    assert diffusers_to_ldm("up_blocks.1.upsamplers.0.conv", BASES["sd15"]) == "output_blocks.5.2.conv"


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("lora_te_text_model_encoder_layers_3_mlp_fc1", "text_encoder text_model.encoder.layers.3.mlp.fc1"),
        ("lora_te1_text_model_encoder_layers_3_mlp_fc2", "text_encoder text_model.encoder.layers.3.mlp.fc2"),
        ("lora_te2_text_model_encoder_layers_31_self_attn_q_proj",
         "text_encoder_2 text_model.encoder.layers.31.self_attn.q_proj"),
        ("lora_te_encoder_layers_0_mlp_fc2", "text_encoder text_model.encoder.layers.0.mlp.fc2"),
        ("text_encoder.encoder.layers.0.mlp.fc2", "text_encoder text_model.encoder.layers.0.mlp.fc2"),
        ("lycoris_up_blocks_1_attentions_0_proj_in", "unet up_blocks.1.attentions.0.proj_in"),
        ("lycoris_transformer_blocks_0_attn_to_add_out", "transformer transformer_blocks.0.attn.to_add_out"),
        ("lora_transformer_single_transformer_blocks_7_proj_mlp", "transformer single_transformer_blocks.7.proj_mlp"),
        ("lora_unet_output_blocks_5_1_transformer_blocks_1_attn2_to_out_0",
         "unet up_blocks.1.attentions.2.transformer_blocks.1.attn2.to_out.0"),
    ],
)  # fmt: skip
def test_names_of_files(name, wanted):
    assert from_name(name) == tuple(wanted.split())


@pytest.mark.parametrize(
    "name",
    [
        "lora_unet_", "lora_unet_foo_bar", "lora_unet_input_blocks_x", "lora_unet_input_blocks_3_0_conv", "banana",
        "diffusion_model.layers.0.attn", "lora_unet_output_blocks_1_2_conv", "lora_unet_middle_block_7_proj_in",
        "lora_unet_input_blocks_1_0_nothing", "lora_unet_down_blocks_0_", "a.b.c", "",
    ],
)  # fmt: skip
def test_foreign_names_are_refused(name):
    with pytest.raises(FormatError):
        from_name(name)


def test_text_model_is_put_back_and_taken_off():
    for component, model in (("text_encoder", tiny_clip()), ("text_encoder_2", tiny_clip(with_projection=True))):
        known = {name for name, _ in model.named_modules()}
        for module in shapes_of_models({component: model})[component]:
            if "projection" not in module:
                assert module.startswith("text_model.")
            assert to_module_name(component, module, known) in known
            assert to_module_name(component, module) in known


def test_components_are_guessed_from_names():
    assert guess_component(shapes_of_models({"unet": tiny_unet()})["unet"]) == "unet"
    assert guess_component(["encoder.layers.0.self_attn.q_proj"]) == "text_encoder"
    assert guess_component(["model.layers.0.q_proj"]) == "model"


@pytest.mark.parametrize(("kind", "prefix"), [("sd15", "lora_te_"), ("sd2", "lora_te_"), ("sdxl", "lora_te1_")])
def test_the_first_text_encoders_prefix_follows_the_model_not_the_adapter(kind, prefix):
    module = "text_model.encoder.layers.0.mlp.fc1"
    assert to_kohya_name("text_encoder", module, BASES[kind]) == f"{prefix}text_model_encoder_layers_0_mlp_fc1"

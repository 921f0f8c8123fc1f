# SPDX-License-Identifier: Apache-2.0
"""Parameter counts on the real models' shapes, on the meta device, against the published ones."""

from functools import cache

import pytest
import torch
from adapted import krona_layers
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model
from transformers import CLIPTextConfig, CLIPTextModel

from peft_krona import KronAConfig
from peft_krona.factors import num_parameters

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
CLIP = ["q_proj", "k_proj", "v_proj", "out_proj"]
SD = {
    "sample_size": 64, "block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2,
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
}  # fmt: skip
UNETS = {
    "sd15": {**SD, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sd21-base": {
        **SD, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
    "sdxl": {
        "sample_size": 128, "block_out_channels": (320, 640, 1280), "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 2),
        "up_block_types": (*("CrossAttnUpBlock2D",) * 2, "UpBlock2D"), "cross_attention_dim": 2048,
        "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20), "use_linear_projection": True,
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816},
}  # fmt: skip
CLIP_L = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "vocab_size": 49408, "projection_dim": 768,
}  # fmt: skip

# a_in (a_out is 64): parameters of sd15, sd21-base, sdxl and CLIP-L; DiffuseKronA states 3.8M for SDXL, 0.52M for
# SD 1.5 with its text encoder, and for LoRA (r=4) 5.8M and 1.09M
COUNTS = {
    4: {"sd15": 398_048, "sd21-base": 423_008, "sdxl": 3_874_560, "clip-l": 122_880},
    8: {"sd15": 248_176, "sd21-base": 260_656, "sdxl": 2_152_320, "clip-l": 79_872},
    16: {"sd15": 222_392, "sd21-base": 228_632, "sdxl": 1_506_240, "clip-l": 76_800},
}
LORA = {"sd15": 797_184, "sd21-base": 829_952, "sdxl": 5_806_080, "clip-l": 294_912}


@cache
def build(name):
    with torch.device("meta"):
        return CLIPTextModel(CLIPTextConfig(**CLIP_L)) if name == "clip-l" else UNet2DConditionModel(**UNETS[name])


def count(name, config):
    model = get_peft_model(build(name), config, low_cpu_mem_usage=True)
    trainable = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    layers = krona_layers(model)
    model.unload()
    return trainable, layers


@pytest.mark.parametrize("name", LORA)
def test_published_counts(name):
    targets = CLIP if name == "clip-l" else ATTENTION
    for a_in, counts in COUNTS.items():
        trainable, layers = count(name, KronAConfig(target_modules=targets, a_out=64, a_in=a_in, strict_factors=True))
        assert sum(trainable.values()) == counts[name]
        assert len(trainable) == 2 * len(layers)
        formula = [num_parameters(m.out_features, m.in_features, *m.factors("default")) for m in layers.values()]
        assert sum(formula) == counts[name]
    assert sum(count(name, LoraConfig(target_modules=targets, r=4))[0].values()) == LORA[name]


@pytest.mark.parametrize("name", ["sd15", "clip-l"])
def test_default_targets_and_factors_give_the_published_counts(name):
    assert sum(count(name, KronAConfig())[0].values()) == COUNTS[4][name]


def test_counts_of_the_paper():
    assert COUNTS[4]["sd15"] + COUNTS[4]["clip-l"] == 520_928
    assert LORA["sd15"] + LORA["clip-l"] == 1_092_096


def test_more_terms_cost_in_proportion():
    one, three = (count("clip-l", KronAConfig(target_modules=CLIP, r=r))[0] for r in (1, 3))
    assert {n: 3 * c for n, c in one.items()} == three


def test_no_dense_weight_is_created_on_the_meta_device():
    assert all(
        layer.krona_A["default"].is_meta for layer in count("clip-l", KronAConfig(target_modules=CLIP))[1].values()
    )

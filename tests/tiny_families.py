# SPDX-License-Identifier: Apache-2.0
"""Tiny random pipelines of the families that examples/dreambooth_kron.py trains, in folders, without downloads."""

from __future__ import annotations

from pathlib import Path

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny import WIDTH, text_encoder, tiny_denoiser, tokenizer, vae
from transformers import (
    AutoConfig,
    CLIPTextModelWithProjection,
    Mistral3ForConditionalGeneration,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3VLModel,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{{ m.content[0].text }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def t5(width: int = WIDTH) -> dict:
    pieces = ["<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz"]
    config = T5Config(vocab_size=40, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    vocab = [(piece, -float(i)) for i, piece in enumerate(pieces)]
    return {"text_encoder": T5EncoderModel(config).eval(), "tokenizer": T5Tokenizer(vocab=vocab, extra_ids=0)}


def qwen_tokenizer() -> Qwen2Tokenizer:
    """A byte a token."""
    vocab = {c: i for i, c in enumerate([*bytes_to_unicode().values(), *SPECIAL])}
    made = Qwen2Tokenizer(vocab=vocab, merges=[], additional_special_tokens=SPECIAL[1:], pad_token=SPECIAL[0])
    made.chat_template = CHAT
    return made


TEXT = dict(
    vocab_size=300, hidden_size=16, intermediate_size=16, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
    max_position_embeddings=2048, bos_token_id=256, eos_token_id=256, pad_token_id=256,
)  # fmt: skip
VISION = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=16, fullatt_block_indexes=[0])


def flow(**kwargs) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**kwargs)


def sd3() -> diffusers.DiffusionPipeline:
    third = t5()
    return diffusers.StableDiffusion3Pipeline(
        tiny_denoiser("SD3Transformer2DModel"), flow(shift=3.0), vae(shift_factor=0.06),
        text_encoder(CLIPTextModelWithProjection), tokenizer(), text_encoder(CLIPTextModelWithProjection), tokenizer(),
        third["text_encoder"], third["tokenizer"],
    )  # fmt: skip


def flux(guidance_embeds: bool = True) -> diffusers.DiffusionPipeline:
    second = t5()
    return diffusers.FluxPipeline(
        flow(use_dynamic_shifting=True, shift=3.0), vae(shift_factor=0.1), text_encoder(), tokenizer(),
        second["text_encoder"], second["tokenizer"],
        tiny_denoiser("FluxTransformer2DModel", guidance_embeds=guidance_embeds),
    )  # fmt: skip


def flux2_vae() -> diffusers.AutoencoderKLFlux2:
    made = diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, layers_per_block=1, latent_channels=4,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, sample_size=16,
    )  # fmt: skip
    torch.nn.init.normal_(made.bn.running_mean)
    torch.nn.init.uniform_(made.bn.running_var, 0.5, 2.0)
    return made.eval()


def flux2_klein() -> diffusers.DiffusionPipeline:
    text = Qwen3ForCausalLM(AutoConfig.for_model("qwen3", **TEXT, num_hidden_layers=27)).eval()
    return diffusers.Flux2KleinPipeline(
        flow(use_dynamic_shifting=True, shift=3.0), flux2_vae(), text, qwen_tokenizer(),
        tiny_denoiser("Flux2Transformer2DModel", joint_attention_dim=3 * TEXT["hidden_size"]),
    )  # fmt: skip


def flux2() -> diffusers.DiffusionPipeline:
    """With a tokenizer in the place of Mistral's processor, which needs torchvision."""
    vision = dict(
        model_type="pixtral", hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        image_size=28, patch_size=14,
    )  # fmt: skip
    text_config = {**TEXT, "num_hidden_layers": 30, "model_type": "mistral"}
    text = Mistral3ForConditionalGeneration(
        AutoConfig.for_model("mistral3", text_config=text_config, vision_config=vision, image_token_index=261)
    ).eval()
    return diffusers.Flux2Pipeline(
        flow(use_dynamic_shifting=True, shift=3.0), flux2_vae(), text, qwen_tokenizer(),
        tiny_denoiser("Flux2Transformer2DModel", joint_attention_dim=3 * TEXT["hidden_size"], guidance_embeds=True),
    )  # fmt: skip


def qwen_vae() -> diffusers.AutoencoderKLQwenImage:
    return diffusers.AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[True],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.7, 2.0, 1.0],
    ).eval()  # fmt: skip


def qwen_image() -> diffusers.DiffusionPipeline:
    config = AutoConfig.for_model(
        "qwen2_5_vl", vision_config=VISION, vision_start_token_id=259, vision_end_token_id=260, image_token_id=261,
        text_config={**TEXT, "num_hidden_layers": 1, "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]}},
        video_token_id=262,
    )  # fmt: skip
    return diffusers.QwenImagePipeline(
        flow(use_dynamic_shifting=True), qwen_vae(), Qwen2_5_VLForConditionalGeneration(config).eval(),
        qwen_tokenizer(), tiny_denoiser("QwenImageTransformer2DModel", joint_attention_dim=TEXT["hidden_size"]),
    )  # fmt: skip


def z_image() -> diffusers.DiffusionPipeline:
    transformer = tiny_denoiser("ZImageTransformer2DModel", cap_feat_dim=TEXT["hidden_size"], axes_lens=[256, 32, 32])
    for pad in (transformer.x_pad_token, transformer.cap_pad_token):
        torch.nn.init.normal_(pad)
    text = Qwen3Model(AutoConfig.for_model("qwen3", **TEXT, num_hidden_layers=2)).eval()
    return diffusers.ZImagePipeline(flow(shift=3.0), vae(shift_factor=0.1), text, qwen_tokenizer(), transformer)


def krea2() -> diffusers.DiffusionPipeline:
    text = {**TEXT, "num_hidden_layers": 2, "rope_scaling": {"rope_type": "default", "mrope_section": [2, 1, 1]}}
    vision = dict(
        depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=16, deepstack_visual_indexes=[0]
    )
    config = AutoConfig.for_model("qwen3_vl", text_config=text, vision_config=vision)
    return diffusers.Krea2Pipeline(
        flow(use_dynamic_shifting=True), qwen_vae(), Qwen3VLModel(config).eval(), qwen_tokenizer(),
        tiny_denoiser("Krea2Transformer2DModel", text_hidden_dim=TEXT["hidden_size"]),
        text_encoder_select_layers=(0, 1, 2),
    )  # fmt: skip


def chroma() -> diffusers.DiffusionPipeline:
    """Of no family: for the drill of adding one."""
    parts = t5()
    return diffusers.ChromaPipeline(
        flow(), vae(shift_factor=0.1), parts["text_encoder"], parts["tokenizer"],
        tiny_denoiser("ChromaTransformer2DModel"),
    )  # fmt: skip


MAKERS = {
    "sd3": sd3, "flux": flux, "flux2": flux2, "flux2_klein": flux2_klein, "qwen_image": qwen_image, "z_image": z_image,
    "krea2": krea2,
}  # fmt: skip


def build(folder: Path, kind: str) -> Path:
    """Write the pipeline, its zero-initialised layers filled: what they lead to would have no gradient."""
    torch.manual_seed(0)
    pipe = (MAKERS | {"chroma": chroma})[kind]()
    for parameter in pipe.transformer.parameters():
        if not parameter.any() or parameter.isnan().any():
            torch.nn.init.normal_(parameter, std=0.02)
    pipe.save_pretrained(folder)
    return folder

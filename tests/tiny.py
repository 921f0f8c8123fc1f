# SPDX-License-Identifier: Apache-2.0
"""Tiny random pipelines of several kinds, built from configs: nothing is downloaded."""

from __future__ import annotations

import json
import tempfile
from functools import lru_cache
from pathlib import Path

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

WIDTH = 32  # of every text encoder


# Denoisers by class: what makes one tiny.
DENOISERS: dict[str, dict] = {
    "UNet2DConditionModel": dict(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
    ),
    "SD3Transformer2DModel": dict(
        sample_size=8, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        caption_projection_dim=32, joint_attention_dim=WIDTH, pooled_projection_dim=2 * WIDTH, out_channels=4,
    ),
    "FluxTransformer2DModel": dict(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, axes_dims_rope=[4, 4, 8],
    ),
    "Flux2Transformer2DModel": dict(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, axes_dims_rope=(4, 4, 4, 4), timestep_guidance_channels=32, guidance_embeds=False,
    ),
    "QwenImageTransformer2DModel": dict(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
    ),
    "ZImageTransformer2DModel": dict(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[4, 6, 6], axes_lens=[32, 32, 32],
    ),
    "Krea2Transformer2DModel": dict(
        in_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=64, timestep_embed_dim=16, text_hidden_dim=32, num_text_layers=3, text_num_attention_heads=2,
        text_num_key_value_heads=2, text_intermediate_size=32, num_layerwise_text_blocks=1, num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
    ),
    "Ideogram4Transformer2DModel": dict(
        in_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=2, intermediate_size=32, adaln_dim=16,
        llm_features_dim=32, mrope_section=(4, 2, 2),
    ),
    "Lumina2Transformer2DModel": dict(
        sample_size=8, in_channels=4, hidden_size=32, num_layers=2, num_refiner_layers=1, num_attention_heads=2,
        num_kv_heads=2, multiple_of=16, axes_dim_rope=(4, 6, 6), axes_lens=(16, 16, 16), cap_feat_dim=16,
    ),
    "SanaTransformer2DModel": dict(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=16,
        sample_size=8,
    ),
    "HiDreamImageTransformer2DModel": dict(
        patch_size=2, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        caption_channels=[32, 16], text_emb_dim=16, num_routed_experts=2, num_activated_experts=1,
        axes_dims_rope=(8, 8), max_resolution=(16, 16), llama_layers=[0, 1],
    ),
    "CogVideoXTransformer3DModel": dict(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=4,
        text_embed_dim=16, num_layers=2, sample_width=8, sample_height=8, sample_frames=5, max_text_seq_length=8,
    ),
    "CosmosTransformer3DModel": dict(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2, text_embed_dim=16,
        adaln_lora_dim=4, max_size=(4, 8, 8),
    ),
    "ChromaTransformer2DModel": dict(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, axes_dims_rope=(4, 4, 8), approximator_num_channels=8, approximator_hidden_dim=16,
        approximator_layers=1,
    ),
    "PixArtTransformer2DModel": dict(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, num_layers=2,
        cross_attention_dim=32, sample_size=8, caption_channels=16,
    ),
    "JoyImageEditPlusTransformer3DModel": dict(
        patch_size=[1, 2, 2], in_channels=4, hidden_size=32, num_attention_heads=2, text_dim=16, num_layers=1,
        rope_dim_list=[4, 6, 6],
    ),
}  # fmt: skip


def tiny_denoiser(name: str, **changes) -> torch.nn.Module:
    """A denoiser by its class in diffusers."""
    torch.manual_seed(0)
    return getattr(diffusers, name)(**{**DENOISERS[name], **changes}).eval()


@lru_cache
def tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose words are single letters."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
        Path(folder, "merges.txt").write_text("#version: 0.2\n")
        return CLIPTokenizer(f"{folder}/vocab.json", f"{folder}/merges.txt", model_max_length=77)


def text_encoder(cls: type = CLIPTextModel) -> torch.nn.Module:
    return cls(
        CLIPTextConfig(
            hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=60,
            max_position_embeddings=77, projection_dim=WIDTH, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        )
    ).eval()  # fmt: skip


def unet(cross_attention_dim: int = WIDTH, **kwargs) -> UNet2DConditionModel:
    fields = {**DENOISERS["UNet2DConditionModel"], "cross_attention_dim": cross_attention_dim, **kwargs}
    return UNet2DConditionModel(**fields).eval()


def vae(latent_channels: int = 4, **kwargs) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=latent_channels, **kwargs,
    ).eval()  # fmt: skip


def sd_pipeline() -> StableDiffusionPipeline:
    torch.manual_seed(0)
    return _quiet(
        StableDiffusionPipeline(
            vae(), text_encoder(), tokenizer(), unet(), _scheduler(), None, None, requires_safety_checker=False
        )
    )


def sdxl_pipeline() -> StableDiffusionXLPipeline:
    torch.manual_seed(0)
    added = {
        "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": WIDTH + 6 * 8,
    }  # fmt: skip
    return _quiet(
        StableDiffusionXLPipeline(
            vae(), text_encoder(), text_encoder(CLIPTextModelWithProjection), tokenizer(), tokenizer(),
            unet(2 * WIDTH, **added), _scheduler(),
        )
    )  # fmt: skip


def sd3_pipeline() -> StableDiffusion3Pipeline:
    torch.manual_seed(0)
    transformer = tiny_denoiser("SD3Transformer2DModel")
    return _quiet(
        StableDiffusion3Pipeline(
            transformer, FlowMatchEulerDiscreteScheduler(), vae(shift_factor=0.0),
            text_encoder(CLIPTextModelWithProjection), tokenizer(),
            text_encoder(CLIPTextModelWithProjection), tokenizer(), None, None,
        )
    )  # fmt: skip


def flux_pipeline() -> FluxPipeline:
    torch.manual_seed(0)
    transformer = tiny_denoiser("FluxTransformer2DModel")
    return _quiet(
        FluxPipeline(
            FlowMatchEulerDiscreteScheduler(), vae(shift_factor=0.0), text_encoder(), tokenizer(), None, None,
            transformer,
        )
    )  # fmt: skip


def _scheduler() -> DDIMScheduler:
    return DDIMScheduler(steps_offset=1, clip_sample=False)


PIPELINES = {"sd": sd_pipeline, "sdxl": sdxl_pipeline, "sd3": sd3_pipeline, "flux": flux_pipeline}


def denoiser(pipe) -> torch.nn.Module:
    return getattr(pipe, "unet", None) or pipe.transformer


def _quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def image(pipe, prompt: str = "a b c", seed: int = 0, **kwargs) -> torch.Tensor:
    """One 16x16 image as a tensor, two steps, fixed seed."""
    if isinstance(pipe, FluxPipeline):  # its second text encoder is a T5; embeddings stand in for it
        generator = torch.Generator().manual_seed(1)
        kwargs["prompt_embeds"] = torch.randn(1, 5, WIDTH, generator=generator)
        kwargs["pooled_prompt_embeds"] = torch.randn(1, WIDTH, generator=generator)
    else:
        kwargs["prompt"] = prompt
    out = pipe(
        num_inference_steps=2, height=16, width=16, output_type="pt",
        generator=torch.Generator().manual_seed(seed), **kwargs,
    )  # fmt: skip
    return out.images

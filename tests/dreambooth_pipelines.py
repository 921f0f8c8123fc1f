# SPDX-License-Identifier: Apache-2.0
"""Tiny random Stable Diffusion pipelines, SD and SDXL, for the tests of the examples."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

TEXT = 32


def tokenizer(folder: Path) -> CLIPTokenizer:
    """Byte-level BPE without merges: every text works, a letter a token."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(i) for i in range(ord("!"), ord("~") + 1)]
    tokens = [*letters, *[c + "</w>" for c in letters], "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=24)


def text_encoder(size: int, cls=CLIPTextModel) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=200, hidden_size=TEXT, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=24, projection_dim=TEXT, bos_token_id=size - 2, eos_token_id=size - 1,
        pad_token_id=size - 1,
    )  # fmt: skip
    return cls(config).eval()


def vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(16, 16), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=8, sample_size=32,
    ).eval()  # fmt: skip


def build(folder: Path, kind: str = "sd", prediction_type: str = "epsilon", dtype: torch.dtype = torch.float32) -> Path:
    """Write a pipeline of `kind` "sd" or "sdxl" that makes 32x32 images."""
    torch.manual_seed(0)
    shape = {
        "block_out_channels": (16, 32), "layers_per_block": 1, "sample_size": 16, "norm_num_groups": 8,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": (2, 4),
    }  # fmt: skip
    tok = tokenizer(folder / "tokenizer")
    common = {"vae": vae(), "tokenizer": tok, "text_encoder": text_encoder(len(tok))}
    if kind == "sd":
        pipe = StableDiffusionPipeline(
            **common,
            unet=UNet2DConditionModel(**shape, cross_attention_dim=TEXT),
            scheduler=PNDMScheduler(
                beta_schedule="scaled_linear", skip_prk_steps=True, prediction_type=prediction_type
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    else:
        pipe = StableDiffusionXLPipeline(
            **common,
            tokenizer_2=tok,
            text_encoder_2=text_encoder(len(tok), CLIPTextModelWithProjection),
            unet=UNet2DConditionModel(
                **shape, cross_attention_dim=2 * TEXT, transformer_layers_per_block=(1, 2), use_linear_projection=True,
                addition_embed_type="text_time", addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=6 * 8 + TEXT,
            ),
            scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear", prediction_type=prediction_type),
        )  # fmt: skip
    pipe.to(dtype).save_pretrained(folder)
    return folder


def images(folder: Path, count: int = 3, size: tuple[int, int] = (40, 40)) -> Path:
    """Pictures of noise; `size` is (width, height)."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


def in_float64(patch) -> None:
    """Make dreambooth_kron.py compute in float64, for comparisons. `patch(object, name, value)` sets an attribute."""
    from examples import dreambooth_kron as script

    cast, load = script.cast_training_params, script.evaluate.base_pipeline
    patch(script.evaluate, "base_pipeline", lambda *args, **more: load(*args, **more | {"dtype": torch.float64}))
    patch(script.adapters, "dtype_of", lambda _: torch.float64)
    patch(script, "cast_training_params", lambda models, dtype: cast(models, torch.float64))
    patch(torch.Tensor, "float", torch.Tensor.double)

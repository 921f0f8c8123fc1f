# SPDX-License-Identifier: Apache-2.0
"""Tiny pipelines and adapters for the tests of peft_krona.convert."""

from __future__ import annotations

import json

import torch
from torch import nn

from peft_krona.convert import AdapterFile, LayerUpdate, shapes_of_models


def tiny_unet(xl: bool = False, linear_projection: bool | None = None):
    """An SD (or SDXL) UNet with every kind of layer that the names have to get right."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(1)
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 80,
    }
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64, 64) if xl else (32, 64),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
        if xl
        else ("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
        if xl
        else ("UpBlock2D", "CrossAttnUpBlock2D"),
        transformer_layers_per_block=(1, 2, 1) if xl else 1,
        attention_head_dim=(2, 4, 4) if xl else 8,
        cross_attention_dim=64 if xl else 32,
        use_linear_projection=xl if linear_projection is None else linear_projection,
        norm_num_groups=8,
        **(added if xl else {}),
    ).eval()


def tiny_clip(with_projection: bool = False):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(2)
    config = CLIPTextConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=1000,
        max_position_embeddings=77,
        projection_dim=32,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
    )
    return (CLIPTextModelWithProjection if with_projection else CLIPTextModel)(config).eval()


def tiny_tokenizer(folder):
    """A CLIP tokenizer whose words are single letters."""
    from transformers import CLIPTokenizer

    letters = [chr(c) for c in range(97, 123)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)


def tiny_pipeline(folder, xl: bool = False):
    """A Stable Diffusion (XL) pipeline of a few layers, ready to make an image on a CPU."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

    torch.manual_seed(3)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )
    common = {
        "vae": vae.eval(),
        "unet": tiny_unet(xl),
        "scheduler": DDIMScheduler(clip_sample=False, steps_offset=1),
        "tokenizer": tiny_tokenizer(folder),
    }
    if xl:
        pipe = StableDiffusionXLPipeline(
            text_encoder=tiny_clip(),
            text_encoder_2=tiny_clip(with_projection=True),
            tokenizer_2=tiny_tokenizer(folder),
            **common,
        )
    else:
        pipe = StableDiffusionPipeline(
            text_encoder=tiny_clip(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            **common,
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def image(pipe, **kwargs) -> torch.Tensor:
    """The pipeline's image at a fixed seed, as a tensor; in float64, so that no machine's rounding is in it."""
    out = pipe.to(torch.float64)(
        "a b c",
        height=16,
        width=16,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
        **kwargs,
    )
    return out.images


def random_adapter(
    models: dict[str, nn.Module], select, *, r=1, layout="kron", factors=(4, 2), scale=1.0
) -> AdapterFile:
    """A random adapter on the layers of `models` that select(component, module) admits."""
    from peft_krona.factors import choose_factors

    generator = torch.Generator().manual_seed(5)
    layers = []
    for component, shapes in shapes_of_models(models).items():
        for module, (n_out, n_in, *kernel) in shapes.items():
            if select(component, module):
                a_out, a_in = choose_factors(n_out, n_in, *factors)
                A = torch.randn(r, a_out, a_in, generator=generator)
                B = torch.randn(r, n_out // a_out, n_in // a_in, *kernel, generator=generator) * 0.05
                layers.append(LayerUpdate(component, module, A, B, scale, layout))
    return AdapterFile(tuple(layers))


def merge_by_hand(models: dict[str, nn.Module], adapter: AdapterFile) -> None:
    """Add every dW to the models' own weights: what each exported file has to do as well."""
    from peft_krona.convert.names import to_module_name

    for layer in adapter:
        model = models[layer.component]
        known = {name for name, _ in model.named_modules()}
        weight = model.get_submodule(to_module_name(layer.component, layer.module, known)).weight
        with torch.no_grad():
            weight += layer.delta_weight().to(weight.dtype)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """||a - b|| / ||b||, and ||a|| for b = 0."""
    norm = b.double().norm().item()
    return (a.double() - b.double()).norm().item() / (norm or 1.0)


ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")


def attention(component: str, module: str) -> bool:
    return module.endswith(ATTENTION)


def anything(component: str, module: str) -> bool:
    return not module.endswith(("text_projection", "token_embedding", "position_embedding"))

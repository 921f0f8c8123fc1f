# SPDX-License-Identifier: Apache-2.0
"""What is measured, as data."""

from __future__ import annotations

from typing import NamedTuple


class LinearCase(NamedTuple):
    """One dense layer: x (tokens, n_in) -> (tokens, n_out)."""

    name: str
    tokens: int
    n_in: int
    n_out: int


def layers(device: str, only: str | None = None) -> list[LinearCase]:
    """The layers that are measured on a device; with `only`, those whose name contains it."""
    return [case for case in LAYERS + (LAYERS_ON_CUDA if device == "cuda" else ()) if not only or only in case.name]


FACTORS = ((64, 4), (64, 8))

# Attention projections at batch 1: SDXL at 1024 px, SD1.5 at 512 px.
LAYERS = (
    LinearCase("SDXL self-attention, 64x64", 4096, 640, 640),
    LinearCase("SDXL self-attention, 32x32", 1024, 1280, 1280),
    LinearCase("SDXL cross-attention k/v, 640", 77, 2048, 640),
    LinearCase("SDXL cross-attention k/v, 1280", 77, 2048, 1280),
    LinearCase("SD1.5 self-attention, 64x64", 4096, 320, 320),
    LinearCase("SD1.5 self-attention, 32x32", 1024, 640, 640),
    LinearCase("SD1.5 self-attention, 16x16", 256, 1280, 1280),
)
# Too slow for a CPU: a layer of Flux's size.
LAYERS_ON_CUDA = (LinearCase("Flux DiT, 3072", 4096, 3072, 3072),)


class HostCase(NamedTuple):
    """So many dense layers of a size at which calls, not products, take the time."""

    name: str
    layers: int
    tokens: int
    n_in: int
    n_out: int
    factors: tuple[tuple[int, int], ...]


HOST = (
    HostCase("64 layers of 64 x 64", 64, 8, 64, 64, ((64, 4), (16, 4), (4, 16))),
    HostCase("SDXL k/v, 2048 to 640", 8, 77, 2048, 640, FACTORS),
    HostCase("SDXL k/v, 2048 to 1280", 8, 77, 2048, 1280, FACTORS),
)

# What one layer costs as one of these changes and the others stay at POINT; factors (64, 4).
POINT = {"tokens": 1024, "width": 640, "r": 1, "adapters": 1}
SCALING = {
    "tokens": (16, 64, 256, 1024, 4096),
    "width": (320, 640, 1280, 2560),
    "r": (1, 2, 4, 8),
    "adapters": (1, 2, 4),
}

# Real UNets from their public configs (random weights): {name: (diffusers config, latent size on a CPU and on a GPU)}.
UNETS = {
    "SD1.5": (
        {
            "sample_size": 64,
            "in_channels": 4,
            "out_channels": 4,
            "layers_per_block": 2,
            "block_out_channels": (320, 640, 1280, 1280),
            "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
            "cross_attention_dim": 768,
            "attention_head_dim": 8,
        },
        (32, 64),
    ),
    "SDXL": (
        {
            "sample_size": 128,
            "in_channels": 4,
            "out_channels": 4,
            "layers_per_block": 2,
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
        },
        (32, 128),
    ),
}

# SPDX-License-Identifier: Apache-2.0
"""FLUX.1: CLIP's pooled embedding and T5; latents in patches of 2 x 2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .base import Family, Text


class Flux(Family):
    title = "FLUX.1"
    pipelines = ("FluxPipeline",)
    components = (
        "transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler",
    )  # fmt: skip
    sequence = (512, 512)
    guidance = 3.5
    negative = False  # unless it is called with true_cfg_scale
    trained_text = ("text_encoder",)
    tags = ("flux",)

    def windows(self) -> list[tuple[Any, int]]:
        pipe = self.pipe
        return [(pipe.tokenizer, pipe.tokenizer_max_length), (pipe.tokenizer_2, self.max_sequence_length)]

    def encode_prompt(self, prompts: list[str]) -> list[Text]:
        hidden, pooled, _ = self.pipe.encode_prompt(
            prompts, device=self.text_device(), max_sequence_length=self.max_sequence_length
        )
        return [{"hidden": h, "pooled": p} for h, p in zip(hidden, pooled, strict=True)]

    def encode(self, encoders: Sequence[nn.Module], text: Text) -> Text:
        return {"pooled": encoders[0](text["ids"][0]).pooler_output}

    def predict(self, model: nn.Module, noisy: torch.Tensor, level: torch.Tensor, text: Text) -> torch.Tensor:
        samples, channels, height, width = noisy.shape
        hidden, pooled = text["hidden"].to(noisy.dtype), text["pooled"].to(noisy.dtype)
        velocity = model(
            hidden_states=self.pipe._pack_latents(noisy, samples, channels, height, width),
            timestep=level,
            guidance=self.told_guidance(samples, noisy.device),
            encoder_hidden_states=hidden,
            pooled_projections=pooled,
            txt_ids=hidden.new_zeros(hidden.shape[1], 3),
            img_ids=self.pipe._prepare_latent_image_ids(samples, height // 2, width // 2, noisy.device, noisy.dtype),
            return_dict=False,
        )[0]
        return self.pipe._unpack_latents(velocity, height, width, vae_scale_factor=1)

# SPDX-License-Identifier: Apache-2.0
"""FLUX.2, dev and klein: several layers of a language model as text; latents in patches, normalised per channel."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .base import Family, Text, precise


class Flux2Klein(Family):
    title = "FLUX.2 klein"
    pipelines = ("Flux2KleinPipeline",)
    sequence = (512, 512)
    negative = False
    tags = ("flux2", "flux2-klein")

    def shift(self, height: int, width: int) -> float:
        """Of latents that are in patches already, for 50 steps."""
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        return compute_empirical_mu(height * width, num_steps=50)

    # -- text ----------------------------------------------------------------------------------------------------------

    def windows(self) -> list[tuple[Any, int]]:
        tokenizer, empty = self.pipe.tokenizer, [{"role": "user", "content": ""}]
        chat = tokenizer.apply_chat_template(empty, tokenize=False, add_generation_prompt=True, enable_thinking=False)
        return [(tokenizer, self.max_sequence_length - len(tokenizer(chat).input_ids))]

    def encode_prompt(self, prompts: list[str]) -> list[Text]:
        hidden, _ = self.pipe.encode_prompt(
            prompts, device=self.text_device(), max_sequence_length=self.max_sequence_length
        )
        return [{"hidden": h} for h in hidden]

    # -- images --------------------------------------------------------------------------------------------------------

    def encode_image(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        vae = self.pipe.vae
        mode = self.pipe._patchify_latents(vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode())
        mean, variance = (t.view(1, -1, 1, 1) for t in (vae.bn.running_mean, vae.bn.running_var))
        latents = (precise(mode) - mean) / (variance + vae.config.batch_norm_eps).sqrt()
        return latents, torch.zeros_like(latents)

    # -- transformer ---------------------------------------------------------------------------------------------------

    def predict(self, model: nn.Module, noisy: torch.Tensor, level: torch.Tensor, text: Text) -> torch.Tensor:
        samples, device = len(noisy), noisy.device
        hidden = text["hidden"].to(noisy.dtype)
        velocity = model(
            hidden_states=noisy.flatten(2).transpose(1, 2),
            timestep=level,
            guidance=self.told_guidance(samples, device),
            encoder_hidden_states=hidden,
            txt_ids=self.pipe._prepare_text_ids(hidden).to(device),
            img_ids=self.pipe._prepare_latent_ids(noisy).to(device),
            return_dict=False,
        )[0]
        return velocity.transpose(1, 2).reshape(noisy.shape)


class Flux2(Flux2Klein):
    title = "FLUX.2"
    pipelines = ("Flux2Pipeline",)
    tags = ("flux2",)

    def windows(self) -> list[tuple[Any, int]]:
        from diffusers.pipelines.flux2.pipeline_flux2 import format_input

        processor = self.pipe.tokenizer
        empty = format_input([""], self.pipe.system_message)
        chat = processor.apply_chat_template(empty, tokenize=False)[0]
        tokenizer = getattr(processor, "tokenizer", processor)
        length = len(tokenizer(chat, add_special_tokens=False).input_ids)
        return [(tokenizer, self.max_sequence_length - length)]

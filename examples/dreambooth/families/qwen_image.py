# SPDX-License-Identifier: Apache-2.0
"""Qwen-Image: Qwen2.5-VL's last layer, of each prompt's own length; a video VAE whose one frame is the image."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from .base import Family, Text, precise


class QwenImage(Family):
    title = "Qwen-Image"
    pipelines = ("QwenImagePipeline",)
    sequence = (1024, 1024)
    guidance = 4.0
    tags = ("qwen-image",)

    # -- text ----------------------------------------------------------------------------------------------------------

    def windows(self) -> list[tuple[Any, int]]:
        pipe = self.pipe
        template = len(pipe.tokenizer(pipe.prompt_template_encode.format("")).input_ids)
        return [(pipe.tokenizer, self.max_sequence_length + pipe.prompt_template_encode_start_idx - template)]

    def encode_prompt(self, prompts: list[str]) -> list[Text]:
        """One by one, so that no prompt depends on the length of another."""
        encode, device = self.pipe.encode_prompt, self.text_device()
        return [
            {"hidden": encode(prompt, device=device, max_sequence_length=self.max_sequence_length)[0][0]}
            for prompt in prompts
        ]

    def collate(self, texts: list[Text]) -> Text:
        hidden = [text["hidden"] for text in texts]
        lengths = torch.tensor([len(h) for h in hidden])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        return {"hidden": pad_sequence(hidden, batch_first=True), "mask": None if mask.all() else mask}

    # -- images --------------------------------------------------------------------------------------------------------

    def encode_image(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        vae = self.pipe.vae
        posterior = vae.encode(pixels.to(vae.device, vae.dtype)[:, :, None]).latent_dist
        mean, std = (
            torch.tensor(vae.config[k], device=vae.device).view(-1, 1, 1) for k in ("latents_mean", "latents_std")
        )
        return (precise(posterior.mean[:, :, 0]) - mean) / std, precise(posterior.std[:, :, 0]) / std

    # -- transformer ---------------------------------------------------------------------------------------------------

    def predict(self, model: nn.Module, noisy: torch.Tensor, level: torch.Tensor, text: Text) -> torch.Tensor:
        samples, channels, height, width = noisy.shape
        velocity = model(
            hidden_states=self.pipe._pack_latents(noisy, samples, channels, height, width),
            timestep=level,
            guidance=self.told_guidance(samples, noisy.device),
            encoder_hidden_states=text["hidden"].to(noisy.dtype),
            encoder_hidden_states_mask=text["mask"],
            img_shapes=[[(1, height // 2, width // 2)]] * samples,
            return_dict=False,
        )[0]
        return self.pipe._unpack_latents(velocity, height, width, vae_scale_factor=1)[:, :, 0]

    def sampling(self, guidance: float | None) -> dict[str, Any]:
        """Its guidance has a name of its own, and needs a negative prompt."""
        settings = super().sampling(guidance)
        return {"true_cfg_scale": settings.pop("guidance_scale"), "negative_prompt": " "} | settings

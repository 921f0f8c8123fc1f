# SPDX-License-Identifier: Apache-2.0
"""Krea 2: twelve layers of Qwen3-VL as text, Qwen-Image's VAE, one stream of text and image."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .base import Family, Text
from .qwen_image import QwenImage


class Krea2(QwenImage):
    title = "Krea 2"
    pipelines = ("Krea2Pipeline",)
    sequence = (512, 512)
    guidance = 4.5
    guidance_of_few_steps = 0.0  # its scale 0 is others' 1
    tags = ("krea-2",)

    def resolution(self) -> int:
        return 1024  # the pipeline's; its config does not have it

    def shift(self, height: int, width: int) -> float:
        return 1.15 if self.few_steps() else super().shift(height, width)

    def windows(self) -> list[tuple[Any, int]]:
        return [(self.pipe.tokenizer, self.max_sequence_length - self.pipe.prompt_template_encode_num_suffix_tokens)]

    def encode_prompt(self, prompts: list[str]) -> list[Text]:
        """Without the padding, which is masked in the model; all text is at the same position there."""
        hidden, mask = self.pipe.encode_prompt(
            prompts, device=self.text_device(), max_sequence_length=self.max_sequence_length
        )
        return [{"hidden": h[m]} for h, m in zip(hidden, mask, strict=True)]

    def predict(self, model: nn.Module, noisy: torch.Tensor, level: torch.Tensor, text: Text) -> torch.Tensor:
        samples, channels, height, width = noisy.shape
        hidden = text["hidden"].to(noisy.dtype)
        velocity = model(
            hidden_states=self.pipe._pack_latents(noisy, samples, channels, height, width),
            timestep=level,
            encoder_hidden_states=hidden,
            encoder_attention_mask=text["mask"],
            position_ids=self.pipe.prepare_position_ids(hidden.shape[1], height // 2, width // 2, noisy.device),
            return_dict=False,
        )[0]
        scale = self.pipe.vae_scale_factor
        return self.pipe._unpack_latents(velocity, height * scale, width * scale)[:, :, 0]

    def sampling(self, guidance: float | None) -> dict[str, Any]:
        return Family.sampling(self, guidance)

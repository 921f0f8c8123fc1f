# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion 1.x, 2.x and XL: a UNet that predicts noise or velocity, and CLIP text encoders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from peft_krona.targets import ATTENTION

from .base import Family, Text


class StableDiffusion(Family):
    title = "Stable Diffusion 1.x and 2.x"
    pipelines = ("StableDiffusionPipeline",)
    components = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
    denoiser = "unet"
    objective = "noise"
    trained_text = ("text_encoder",)
    prompts_at_once = 16
    guidance = 7.0  # the DiffuseKronA paper's best
    tags = ("stable-diffusion",)

    def targets(self) -> list[str]:
        return list(ATTENTION)

    def resolution(self) -> int:
        size = self.pipe.unet.config.sample_size or 64  # which is what diffusers takes then
        return (size if isinstance(size, int) else size[0]) * self.vae_scale()

    def multiple(self) -> int:
        return self.vae_scale() * 2 ** (len(self.pipe.unet.config.down_block_types) - 1)

    def vae_scale(self) -> int:
        return 2 ** (len(self.pipe.vae.config.block_out_channels) - 1)

    # -- text ----------------------------------------------------------------------------------------------------------

    def windows(self) -> list[tuple[Any, int]]:
        tokenizers = [self.pipe.components[name] for name in self.components if name.startswith("tokenizer")]
        return [(tokenizer, tokenizer.model_max_length) for tokenizer in tokenizers]

    def encode(self, encoders: Sequence[nn.Module], text: Text) -> Text:
        return {"hidden": encoders[0](text["ids"][0])[0]}

    def encode_prompt(self, prompts: list[str]) -> list[Text]:
        encoders = [getattr(self.pipe, name) for name in self.trained_text]
        encoded = self.encode(encoders, self.tokens(prompts, encoders[0].device))
        return [{name: value[i] for name, value in encoded.items()} for i in range(len(prompts))]

    # -- UNet ----------------------------------------------------------------------------------------------------------

    def predict(self, model: nn.Module, noisy: torch.Tensor, level: torch.Tensor, text: Text) -> torch.Tensor:
        return model(noisy, level, text["hidden"].to(noisy.dtype), return_dict=False)[0]


class StableDiffusionXL(StableDiffusion):
    title = "Stable Diffusion XL"
    pipelines = ("StableDiffusionXLPipeline",)
    components = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
    trained_text = ("text_encoder", "text_encoder_2")
    tags = ("stable-diffusion-xl",)

    def encode(self, encoders: Sequence[nn.Module], text: Text) -> Text:
        outputs = [encoder(i, output_hidden_states=True) for encoder, i in zip(encoders, text["ids"], strict=True)]
        hidden, pooled = torch.cat([o.hidden_states[-2] for o in outputs], dim=-1), outputs[-1][0]
        if self.pipe.config.get("force_zeros_for_empty_prompt"):  # the empty prompt is all zeros, not its encoding
            empty = text["empty"]
            hidden, pooled = hidden.masked_fill(empty[:, None, None], 0), pooled.masked_fill(empty[:, None], 0)
        return {"hidden": hidden, "pooled": pooled}

    def conditions(self, batch: dict[str, Any], device: torch.device) -> Text:
        """Micro-conditioning: original size, crop corner, target size."""
        columns = (batch["original_size"], batch["crop"], batch["target_size"])
        rows = [(*o, *c, *t) for o, c, t in zip(*columns, strict=True)]
        return {"time_ids": torch.tensor(rows, device=device, dtype=torch.float32)}

    def predict(self, model: nn.Module, noisy: torch.Tensor, level: torch.Tensor, text: Text) -> torch.Tensor:
        hidden, pooled, time_ids = (text[name].to(noisy.dtype) for name in ("hidden", "pooled", "time_ids"))
        added = {"text_embeds": pooled, "time_ids": time_ids}
        return model(noisy, level, hidden, added_cond_kwargs=added, return_dict=False)[0]

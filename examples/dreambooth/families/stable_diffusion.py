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
    trains_text = True
    guidance = 7.0  # the DiffuseKronA paper's best
    tags = ("stable-diffusion",)

    def targets(self) -> list[str]:
        return list(ATTENTION)

    def resolution(self) -> int:
        size = self.pipe.unet.config.sample_size
        return (size if isinstance(size, int) else size[0]) * self.vae_scale()

    def multiple(self) -> int:
        return self.vae_scale() * 2 ** (len(self.pipe.unet.config.down_block_types) - 1)

    def vae_scale(self) -> int:
        return 2 ** (len(self.pipe.vae.config.block_out_channels) - 1)

    # -- text ----------------------------------------------------------------------------------------------------------

    def tokenizers(self) -> list[Any]:
        return [self.pipe.components[name] for name in self.components if name.startswith("tokenizer")]

    def windows(self) -> list[tuple[Any, int]]:
        return [(tokenizer, tokenizer.model_max_length) for tokenizer in self.tokenizers()]

    def tokens(self, prompts: list[str], device: torch.device) -> Text:
        """Token ids, one tensor per text encoder, and which prompts are empty."""
        ids = [
            t(prompts, padding="max_length", max_length=t.model_max_length, truncation=True, return_tensors="pt")
            for t in self.tokenizers()
        ]
        empty = torch.tensor([prompt == "" for prompt in prompts], device=device)
        return {"ids": [i.input_ids.to(device) for i in ids], "empty": empty}

    def encode(self, encoders: Sequence[nn.Module], ids: list[torch.Tensor], empty: torch.Tensor) -> Text:
        """What the UNet attends to (`hidden`) and, for SDXL, the pooled embedding. `empty` marks empty prompts."""
        return {"hidden": encoders[0](ids[0])[0]}

    def encode_prompt(self, prompts: list[str]) -> list[Text]:
        encoders = list(self.text_encoders().values())
        encoded = self.encode(encoders, **self.tokens(prompts, encoders[0].device))
        return [{name: value[i] for name, value in encoded.items()} for i in range(len(prompts))]

    # -- UNet ----------------------------------------------------------------------------------------------------------

    def predict(self, model: nn.Module, noisy: torch.Tensor, level: torch.Tensor, text: Text) -> torch.Tensor:
        return model(noisy, level, text["hidden"].to(noisy.dtype), return_dict=False)[0]


class StableDiffusionXL(StableDiffusion):
    title = "Stable Diffusion XL"
    pipelines = ("StableDiffusionXLPipeline",)
    components = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
    tags = ("stable-diffusion-xl",)

    def encode(self, encoders: Sequence[nn.Module], ids: list[torch.Tensor], empty: torch.Tensor) -> Text:
        outputs = [encoder(i, output_hidden_states=True) for encoder, i in zip(encoders, ids, strict=True)]
        hidden, pooled = torch.cat([o.hidden_states[-2] for o in outputs], dim=-1), outputs[-1][0]
        if self.pipe.config.get("force_zeros_for_empty_prompt"):  # the empty prompt is all zeros, not its encoding
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

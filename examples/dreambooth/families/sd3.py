# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion 3 and 3.5: two CLIP encoders and, if it is there, T5."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad

from .base import Family, Text


class StableDiffusion3(Family):
    title = "Stable Diffusion 3 and 3.5"
    pipelines = ("StableDiffusion3Pipeline",)
    components = (
        "transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler",
    )  # fmt: skip
    weighting = "logit_normal"
    precondition = True  # as in diffusers' train_dreambooth_lora_sd3.py
    sequence = (256, 512)
    spare = True  # the last block has no use for its text queries
    guidance = 7.0
    trained_text = ("text_encoder", "text_encoder_2")
    tags = ("sd3", "stable-diffusion-3")

    def multiple(self) -> int:
        return self.pipe.vae_scale_factor * self.pipe.patch_size

    def shift(self, height: int, width: int) -> float:
        return super().shift(2 * height // self.pipe.patch_size, 2 * width // self.pipe.patch_size)

    def windows(self) -> list[tuple[Any, int]]:
        pipe = self.pipe
        clip = [(tokenizer, pipe.tokenizer_max_length) for tokenizer in (pipe.tokenizer, pipe.tokenizer_2)]
        return clip if pipe.text_encoder_3 is None else [*clip, (pipe.tokenizer_3, self.max_sequence_length)]

    def encode_prompt(self, prompts: list[str]) -> list[Text]:
        hidden, _, pooled, _ = self.pipe.encode_prompt(
            prompts, None, None, device=self.text_device(), do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )  # fmt: skip
        return [{"hidden": h, "pooled": p} for h, p in zip(hidden, pooled, strict=True)]

    def encode(self, encoders: Sequence[nn.Module], text: Text) -> Text:
        outputs = [encoder(i, output_hidden_states=True) for encoder, i in zip(encoders, text["ids"], strict=True)]
        clip = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        if "hidden" in text:
            t5 = text["hidden"][:, clip.shape[1] :].to(clip.dtype)
        else:  # there is none: as the pipeline does without it
            t5 = clip.new_zeros(len(clip), self.max_sequence_length, self.model.config.joint_attention_dim)
        hidden = torch.cat([pad(clip, (0, t5.shape[-1] - clip.shape[-1])), t5], dim=1)
        return {"hidden": hidden, "pooled": torch.cat([output[0] for output in outputs], dim=-1)}

    def predict(self, model: nn.Module, noisy: torch.Tensor, level: torch.Tensor, text: Text) -> torch.Tensor:
        return model(
            hidden_states=noisy, timestep=level * 1000, encoder_hidden_states=text["hidden"].to(noisy.dtype),
            pooled_projections=text["pooled"].to(noisy.dtype), return_dict=False,
        )[0]  # fmt: skip

# SPDX-License-Identifier: Apache-2.0
"""Z-Image: Qwen3's last layer but one, lists instead of batches, time from 0 (noise) to 1 (image), velocity negated."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .base import Family, Text


class ZImage(Family):
    title = "Z-Image"
    pipelines = ("ZImagePipeline",)
    sequence = (512, 512)
    guidance = 5.0
    tags = ("z-image",)

    def resolution(self) -> int:
        return 1024  # the pipeline's; its config does not have it

    # -- text ----------------------------------------------------------------------------------------------------------

    def windows(self) -> list[tuple[Any, int]]:
        tokenizer, empty = self.pipe.tokenizer, [{"role": "user", "content": ""}]
        chat = tokenizer.apply_chat_template(empty, tokenize=False, add_generation_prompt=True, enable_thinking=True)
        return [(tokenizer, self.max_sequence_length - len(tokenizer(chat).input_ids))]

    def encode_prompt(self, prompts: list[str]) -> list[Text]:
        hidden, _ = self.pipe.encode_prompt(
            list(prompts),
            device=self.text_device(),
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )  # fmt: skip  (it writes into the list that it is given)
        return [{"hidden": h} for h in hidden]

    def collate(self, texts: list[Text]) -> Text:
        return {"hidden": [text["hidden"] for text in texts]}

    # -- images --------------------------------------------------------------------------------------------------------

    def encode_image(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mode, std = super().encode_image(pixels)
        return mode, torch.zeros_like(std)

    # -- transformer ---------------------------------------------------------------------------------------------------

    def predict(self, model: nn.Module, noisy: torch.Tensor, level: torch.Tensor, text: Text) -> torch.Tensor:
        frames, hidden = list(noisy[:, :, None]), [h.to(noisy.dtype) for h in text["hidden"]]
        velocity = model(frames, 1 - level, hidden, return_dict=False)[0]
        return -torch.stack(velocity)[:, :, 0]

# SPDX-License-Identifier: Apache-2.0
"""What the training asks of a family of models. Shapes: b samples, c channels, h x w latent pixels."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

Text = dict[str, Any]


class Family:
    """One kind of pipeline. Everything else about a training is the same for all.

    Attributes:
        title: for messages. pipelines: names of diffusers' classes. components: what such a pipeline must have.
        denoiser: the component that is trained. objective: "noise" (DDPM) or "flow" (rectified flow).
        weighting: the default --weighting_scheme. trains_text: whether its text encoders can be adapted.
        guidance: the default of --validation_guidance_scale. tags: for the model card.
    """

    title = ""
    pipelines: tuple[str, ...] = ()
    components: tuple[str, ...] = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
    denoiser = "transformer"
    objective = "flow"
    weighting = "none"
    trains_text = False
    guidance = 4.0
    tags: tuple[str, ...] = ()

    def __init__(self, pipe: Any):
        self.pipe = pipe

    # -- sizes ---------------------------------------------------------------------------------------------------------

    def resolution(self) -> int:
        """Side of the images that the pipeline makes, in pixels."""
        return self.pipe.default_sample_size * self.pipe.vae_scale_factor

    def multiple(self) -> int:
        """What sides of images are multiples of, in pixels."""
        return self.pipe.vae_scale_factor * 2

    # -- text ----------------------------------------------------------------------------------------------------------

    def text_encoders(self) -> dict[str, nn.Module]:
        """By component."""
        parts = self.pipe.components
        return {name: parts[name] for name in self.components if name.startswith("text_encoder")}

    def windows(self) -> list[tuple[Any, int]]:
        """(tokenizer, tokens that its encoder reads, special ones included) of the text encoders."""
        raise NotImplementedError

    def encode_prompt(self, prompts: list[str]) -> list[Text]:
        """For each prompt the tensors that `collate` takes, without a batch dimension; they are kept on the CPU."""
        raise NotImplementedError

    def collate(self, texts: list[Text]) -> Text:
        """A batch of what `encode_prompt` gave."""
        return {name: torch.stack([text[name] for text in texts]) for name in texts[0]}

    # -- images --------------------------------------------------------------------------------------------------------

    def encode_image(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of the latents as the denoiser sees them, b x c x h x w, in float32.

        `pixels`: b x 3 x H x W from -1 to 1. A standard deviation of 0 means that the mode is taken.
        """
        raise NotImplementedError

    def conditions(self, batch: dict[str, Any], device: torch.device) -> Text:
        """What the denoiser is told about the images' sizes, by name; it reaches `predict` with the text."""
        return {}

    # -- denoiser ------------------------------------------------------------------------------------------------------

    def predict(self, model: nn.Module, noisy: torch.Tensor, level: torch.Tensor, text: Text) -> torch.Tensor:
        """The prediction of the noise or velocity that `objective` names; for "flow" it is noise - image.

        `noisy`: b x c x h x w. `level`: of the noise, b; for "noise" the time step, for "flow" sigma, from 0 (only
        image) to 1 (only noise).
        """
        raise NotImplementedError

    def sampling(self, guidance: float | None) -> dict[str, Any]:
        """The pipeline's arguments for this guidance."""
        return {"guidance_scale": self.guidance if guidance is None else guidance}


class Trained(nn.Module):
    """Denoiser and text encoders as one module, so that one wrapper (DDP, DeepSpeed, ...) sees all that is trained."""

    def __init__(self, family: Family):
        super().__init__()
        self.family = family
        self.model = getattr(family.pipe, family.denoiser)
        self.encoder_names = list(family.text_encoders())
        self.encoders = nn.ModuleList(family.text_encoders().values())

    @property
    def _no_split_modules(self) -> list[str]:
        """The blocks that FSDP gathers one at a time, as diffusers and transformers name them for each model."""
        names = {type(module).__name__ for module in self.modules()}
        wanted = [name for m in (self.model, *self.encoders) for name in getattr(m, "_no_split_modules", None) or ()]
        return [name for name in dict.fromkeys(wanted) if name in names]

    def by_component(self, state: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
        """This module's whole state dict as {component of the pipeline: its state dict}."""
        names = {"model.": self.family.denoiser} | {f"encoders.{i}.": n for i, n in enumerate(self.encoder_names)}
        return {
            name: {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}
            for start, name in names.items()
        }

    def forward(self, noisy: torch.Tensor, level: torch.Tensor, text: Text) -> torch.Tensor:
        """`Family.predict`. `text`: either token ids, to be encoded here, or what `Family.collate` gave."""
        if "ids" in text:
            text = text | self.family.encode(self.encoders, text["ids"], text["empty"])
        return self.family.predict(self.model, noisy, level, text)

# SPDX-License-Identifier: Apache-2.0
"""What the training asks of a family of models. Shapes: b samples, c channels, h x w latent pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from peft_krona.targets import default_target_modules

Text = dict[str, Any]


class Family:
    """One kind of pipeline. Everything else about a training is the same for all.

    Attributes:
        title: for messages. pipelines: names of diffusers' classes. components: what such a pipeline must have.
        denoiser: the component that is trained. objective: "noise" (DDPM) or "flow" (rectified flow).
        weighting: the default --weighting_scheme. precondition: the default --precondition_outputs.
        sequence: (usual, largest) --max_sequence_length; None if the text encoders have a fixed length.
        spare: whether layers are adapted whose result the model drops, so that they have no gradient.
        trained_text: the text encoders that --train_text_encoder adapts. prompts_at_once: so many are encoded together.
        guidance, guidance_of_few_steps: the default of --validation_guidance_scale; if distilled to few steps.
        negative: whether the pipeline has a use for a negative prompt. tags: for the model card.
    """

    title = ""
    pipelines: tuple[str, ...] = ()
    components: tuple[str, ...] = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
    denoiser = "transformer"
    objective = "flow"
    weighting = "none"
    precondition = False
    sequence: tuple[int, int] | None = None
    spare = False
    trained_text: tuple[str, ...] = ()
    prompts_at_once = 1
    guidance = 4.0
    guidance_of_few_steps = 1.0
    negative = True
    tags: tuple[str, ...] = ()

    def __init__(self, pipe: Any, max_sequence_length: int | None = None, guidance_scale: float = 3.5):
        """`max_sequence_length`: tokens of a prompt. `guidance_scale`: what a guidance-distilled model is told."""
        self.pipe = pipe
        self.max_sequence_length = max_sequence_length or (self.sequence[0] if self.sequence else None)
        self.guidance_scale = guidance_scale

    @property
    def model(self) -> Any:
        return getattr(self.pipe, self.denoiser)

    @property
    def distilled(self) -> bool:
        """Whether the model is told a guidance scale."""
        return bool(self.model.config.get("guidance_embeds"))

    def targets(self) -> list[str]:
        """Names of the layers that are adapted by default."""
        return sorted(default_target_modules(self.model))

    # -- sizes ---------------------------------------------------------------------------------------------------------

    def resolution(self) -> int:
        """Side of the images that the pipeline makes, in pixels."""
        return self.pipe.default_sample_size * self.pipe.vae_scale_factor

    def multiple(self) -> int:
        """What sides of images are multiples of, in pixels."""
        return self.pipe.vae_scale_factor * 2

    def shifts(self) -> bool:
        """Whether the pipeline's scheduler shifts noise levels with the size of the image."""
        return bool(self.pipe.scheduler.config.get("use_dynamic_shifting"))

    def shift(self, height: int, width: int) -> float:
        """mu, by which the pipeline shifts the noise levels of latents of this size, if its scheduler is told to.

        Usual: a line in the number of 2 x 2 patches, as in diffusers' FluxPipeline.
        """
        config = self.pipe.scheduler.config
        (x0, y0), (x1, y1) = (
            (config.get("base_image_seq_len", 256), config.get("base_shift", 0.5)),
            (config.get("max_image_seq_len", 4096), config.get("max_shift", 1.15)),
        )
        return y0 + (y1 - y0) / (x1 - x0) * (height * width / 4 - x0)

    # -- text ----------------------------------------------------------------------------------------------------------

    def text_encoders(self) -> dict[str, nn.Module]:
        """By component."""
        parts = self.pipe.components
        return {name: parts[name] for name in sorted(parts) if name.startswith("text_encoder") and parts[name]}

    def windows(self) -> list[tuple[Any, int]]:
        """(tokenizer, tokens that its encoder reads, special ones included) of the text encoders."""
        raise NotImplementedError

    def encode_prompt(self, prompts: list[str]) -> list[Text]:
        """For each prompt the tensors that `collate` takes, without a batch dimension; they are kept on the CPU."""
        raise NotImplementedError

    def tokens(self, prompts: list[str], device: torch.device) -> Text:
        """For text encoders that are trained: token ids, one tensor per encoder, and which prompts are empty."""
        tokenizers = [getattr(self.pipe, name.replace("text_encoder", "tokenizer")) for name in self.trained_text]
        ids = [
            t(prompts, padding="max_length", max_length=t.model_max_length, truncation=True, return_tensors="pt")
            for t in tokenizers
        ]
        empty = torch.tensor([prompt == "" for prompt in prompts], device=device)
        return {"ids": [i.input_ids.to(device) for i in ids], "empty": empty}

    def encode(self, encoders: Sequence[nn.Module], text: Text) -> Text:
        """What trained encoders make of `tokens`, by name. `text` also has what `collate` gave, if any is frozen."""
        raise NotImplementedError

    def collate(self, texts: list[Text]) -> Text:
        """A batch of what `encode_prompt` gave."""
        return {name: torch.stack([text[name] for text in texts]) for name in texts[0]}

    # -- images --------------------------------------------------------------------------------------------------------

    def encode_image(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of the latents as the denoiser sees them, b x c x h x w, float32 or more.

        `pixels`: b x 3 x H x W from -1 to 1. A standard deviation of 0 means that the mode is taken.
        """
        vae, config = self.pipe.vae, self.pipe.vae.config
        posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
        shift, scale = config.get("shift_factor") or 0, config.scaling_factor
        if config.get("latents_mean") is not None and config.get("latents_std") is not None:
            shift, std = (
                torch.tensor(config[k], device=vae.device).view(1, -1, 1, 1) for k in ("latents_mean", "latents_std")
            )
            scale = scale / std
        return (precise(posterior.mean) - shift) * scale, precise(posterior.std) * scale

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
        """The pipeline's arguments for this guidance; None: the usual one."""
        length = {"max_sequence_length": self.max_sequence_length} if self.sequence else {}
        usual = self.guidance_of_few_steps if self.few_steps() else self.guidance
        return {"guidance_scale": usual if guidance is None else guidance} | length

    def few_steps(self) -> bool:
        """Whether the pipeline says that its model is distilled to few steps, without guidance."""
        return bool(self.pipe.config.get("is_distilled"))

    # -- for the families --------------------------------------------------------------------------------------------

    def text_device(self) -> torch.device:
        return next(iter(self.text_encoders().values())).device

    def told_guidance(self, samples: int, device: torch.device) -> torch.Tensor | None:
        """The guidance that a guidance-distilled model is told, per sample."""
        return torch.full((samples,), self.guidance_scale, device=device) if self.distilled else None


def precise(tensor: torch.Tensor) -> torch.Tensor:
    """In float32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class Trained(nn.Module):
    """Denoiser and trained text encoders as one, so that one wrapper (DDP, DeepSpeed, ...) sees all that is trained."""

    def __init__(self, family: Family):
        super().__init__()
        self.family = family
        self.model = getattr(family.pipe, family.denoiser)
        self.encoder_names = family.trained_text
        self.encoders = nn.ModuleList(getattr(family.pipe, name) for name in family.trained_text)

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
            text = text | self.family.encode(self.encoders, text)
        return self.family.predict(self.model, noisy, level, text)

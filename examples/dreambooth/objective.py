# SPDX-License-Identifier: Apache-2.0
"""What the denoiser learns from: noise, times, noisy latents, targets and the weights of the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import (
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
    compute_snr,
)
from torch.nn.functional import mse_loss

from . import TrainingError
from .data import torch_rng


class Objective(Protocol):
    """How images become noise, and what is predicted of that."""

    def noise(self, shape: torch.Size, rng: torch.Generator) -> torch.Tensor:
        """The noise of one sample of this shape, c x h x w."""

    def time(self, shape: torch.Size, rng: torch.Generator) -> torch.Tensor:
        """The time of one sample of this shape; a number that only `add_noise` understands."""

    def add_noise(
        self, latents: torch.Tensor, noise: torch.Tensor, times: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(noisy latents, the level that `Family.predict` is given, target, weight of each sample's loss)."""


class NoisePrediction:
    """DDPM's noise, predicted itself or as a velocity; min-SNR weights (arXiv 2303.09556) if `snr_gamma` is set.

    `scheduler_config`: of the pipeline. `noise_offset`: of a constant per channel that is added to the noise.

    Raises:
        TrainingError: if the pipeline predicts something else.
    """

    def __init__(self, scheduler_config: Any, snr_gamma: float | None = None, noise_offset: float = 0.0):
        self.scheduler = DDPMScheduler.from_config(scheduler_config)
        self.kind = self.scheduler.config.prediction_type
        self.snr_gamma, self.noise_offset = snr_gamma, noise_offset
        if self.kind not in ("epsilon", "v_prediction"):
            raise TrainingError(
                f"The scheduler's prediction_type is {self.kind!r}; this script trains epsilon and v_prediction."
            )

    def noise(self, shape: torch.Size, rng: torch.Generator) -> torch.Tensor:
        return torch.randn(shape, generator=rng) + self.noise_offset * torch.randn(shape[0], 1, 1, generator=rng)

    def time(self, shape: torch.Size, rng: torch.Generator) -> torch.Tensor:
        return torch.randint(self.scheduler.config.num_train_timesteps, (), generator=rng)

    def add_noise(
        self, latents: torch.Tensor, noise: torch.Tensor, times: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        noisy = self.scheduler.add_noise(latents, noise, times)
        target = noise if self.kind == "epsilon" else self.scheduler.get_velocity(latents, noise, times)
        return noisy, times, target, self.weight(times)

    def weight(self, times: torch.Tensor) -> torch.Tensor:
        if self.snr_gamma is None:
            return torch.ones(len(times), device=times.device)
        snr = compute_snr(self.scheduler, times)
        if self.kind == "v_prediction":
            return snr.clamp(max=self.snr_gamma) / (snr + 1)
        return (self.snr_gamma / snr).clamp(max=1)  # min(snr, gamma) / snr, also where snr is 0


class RectifiedFlow:
    """Straight lines from images (sigma 0) to noise (sigma 1); the velocity, noise - image, is predicted.

    Sigmas, their density and the weights are those of SD3 (arXiv 2403.03206), from diffusers.training_utils.

    Args:
        scheduler_config: of the pipeline; a fixed shift of the sigmas in it is used.
        scheme: "none", "logit_normal", "mode", "sigma_sqrt" or "cosmap". logit_mean, logit_std, mode_scale: of it.
        precondition: measure the error in the image that the velocity leads to, which is sigma times as large.
        shift: mu by height and width of the latents, to shift the sigmas as the pipeline does when it samples.
    """

    def __init__(
        self,
        scheduler_config: Any,
        scheme: str = "none",
        logit_mean: float = 0.0,
        logit_std: float = 1.0,
        mode_scale: float = 1.29,
        *,
        precondition: bool = False,
        shift: Callable[[int, int], float] | None = None,
    ):
        self.scheduler = FlowMatchEulerDiscreteScheduler.from_config(scheduler_config)
        self.scheme, self.logit_mean, self.logit_std, self.mode_scale = scheme, logit_mean, logit_std, mode_scale
        self.precondition, self.shift = precondition, shift

    def noise(self, shape: torch.Size, rng: torch.Generator) -> torch.Tensor:
        return torch.randn(shape, generator=rng)

    def time(self, shape: torch.Size, rng: torch.Generator) -> torch.Tensor:
        """The index of a sigma."""
        u = compute_density_for_timestep_sampling(
            self.scheme, 1, self.logit_mean, self.logit_std, self.mode_scale, generator=rng
        )
        steps = self.scheduler.config.num_train_timesteps
        return (u[0] * steps).long().clamp(0, steps - 1)  # u can round to 1

    def add_noise(
        self, latents: torch.Tensor, noise: torch.Tensor, times: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        sigmas = self.scheduler.sigmas.to(times.device)[times]
        if self.shift is not None:
            sigmas = self.scheduler.time_shift(self.shift(*latents.shape[-2:]), 1.0, sigmas)
        s = sigmas.view(-1, 1, 1, 1)
        weight = compute_loss_weighting_for_sd3(self.scheme, sigmas)
        if self.precondition:
            weight = weight * sigmas**2
        return (1 - s) * latents + s * noise, sigmas, noise - latents, weight


def draw(
    batch: dict[str, Any], shape: torch.Size, seed: int, objective: Objective, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per sample, from the sample's own generator: noise for the posterior, noise to predict, a time."""
    drawn = []
    for number, purpose in batch["noise_key"]:
        rng = torch_rng(seed, number, purpose)
        drawn.append((torch.randn(shape, generator=rng), objective.noise(shape, rng), objective.time(shape, rng)))
    posterior, noise, times = (torch.stack(part).to(device) for part in zip(*drawn, strict=True))
    return posterior, noise, times


def loss_of(prediction: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Mean over the samples of weight times mean squared error."""
    precise = torch.promote_types(torch.promote_types(prediction.dtype, target.dtype), torch.float32)
    loss = mse_loss(prediction.to(precise), target.to(precise), reduction="none").mean(dim=(1, 2, 3))
    return (loss * weight).mean()

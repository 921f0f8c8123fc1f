# SPDX-License-Identifier: Apache-2.0
"""Latents, noise, targets and the weights of the loss."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.training_utils import compute_snr
from torch.nn.functional import mse_loss

from . import TrainingError
from .data import torch_rng


def scale_latents(vae: torch.nn.Module, latents: torch.Tensor) -> torch.Tensor:
    """As the UNet sees them."""
    config = vae.config
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        mean, std = (
            torch.tensor(config[k], device=latents.device).view(1, -1, 1, 1) for k in ("latents_mean", "latents_std")
        )
        return (latents - mean) * config.scaling_factor / std
    return (latents - (config.get("shift_factor") or 0)) * config.scaling_factor


@torch.no_grad()
def encode_latents(
    vae: torch.nn.Module, batch: dict[str, Any], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of the latents, cached or computed."""
    if "mean" in batch:
        return batch["mean"].to(device).float(), batch["std"].to(device).float()
    posterior = vae.encode(batch["pixels"].to(device, vae.dtype)).latent_dist
    return posterior.mean.float(), posterior.std.float()


def draw(
    batch: dict[str, Any], shape: torch.Size, seed: int, timesteps: int, noise_offset: float, device: torch.device
):
    """Per sample, from the sample's own generator: noise for the posterior, noise to predict, a time step."""
    posterior, noise, steps = [], [], []
    for number, purpose in batch["noise_key"]:
        rng = torch_rng(seed, number, purpose)
        posterior.append(torch.randn(shape, generator=rng))
        noise.append(torch.randn(shape, generator=rng) + noise_offset * torch.randn(shape[0], 1, 1, generator=rng))
        steps.append(torch.randint(timesteps, (), generator=rng))
    return tuple(torch.stack(part).to(device) for part in (posterior, noise, steps))


def target_of(scheduler: Any, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """What the UNet of this scheduler predicts.

    Raises:
        TrainingError: if it is neither noise nor velocity.
    """
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return scheduler.get_velocity(latents, noise, timesteps)
    raise TrainingError(f"The scheduler's prediction_type is {kind!r}; this script trains epsilon and v_prediction.")


def loss_of(
    prediction: torch.Tensor, target: torch.Tensor, scheduler: Any, timesteps: torch.Tensor, snr_gamma: float | None
) -> torch.Tensor:
    """Mean squared error, weighted by min-SNR (arXiv 2303.09556) if `snr_gamma` is set."""
    loss = mse_loss(prediction.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))
    if snr_gamma is not None:
        snr = compute_snr(scheduler, timesteps)
        if scheduler.config.prediction_type == "v_prediction":
            weight = snr.clamp(max=snr_gamma) / (snr + 1)
        else:  # min(snr, gamma) / snr, also where snr is 0
            weight = (snr_gamma / snr).clamp(max=1)
        loss = loss * weight
    return loss.mean()

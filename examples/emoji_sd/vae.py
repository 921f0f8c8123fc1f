"""The autoencoder: 64x64x3 pictures to 8x8x16 latents (an AutoencoderKL), with L1, edges and a small KL term."""

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn.functional import l1_loss

from .loop import Loop, autocast, to_tensor

STEPS, DECODER_STEPS, BATCH, LR, KL_WEIGHT = 3600, 2400, 16, 1.2e-3, 5e-4


def build() -> AutoencoderKL:
    torch.manual_seed(0)
    widths = (32, 32, 64, 96)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths), up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths, layers_per_block=1, latent_channels=16, norm_num_groups=8, sample_size=64,
    )  # fmt: skip
    # Convolutions that keep the scale of what they pass on: with torch's default (a third of the variance a layer, and
    # biases) the picture is lost among constants at first, and learning is several times slower.
    for name, module in vae.named_modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=(0.5 if ".conv2" in name else 1) / module.weight[0].numel() ** 0.5)
            nn.init.zeros_(module.bias)
    nn.init.constant_(vae.quant_conv.bias.data[16:], -4.0)  # little noise on the latents at first
    return vae


def edges(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., 1:] - x[..., :-1]


def reconstruction_loss(y: Tensor, x: Tensor) -> tuple[Tensor, dict]:
    l1, edge = l1_loss(y, x), sum(l1_loss(a, b) for a, b in zip(edges(y), edges(x), strict=True))
    return l1 + 2 * edge, {"l1": l1, "edge": edge}


def train(folder, images, steps: int = STEPS, deadline=None) -> AutoencoderKL:
    """Train on uint8 pictures, N x 64 x 64 x 3."""
    vae = build()

    def loss(step):
        x = to_tensor(images[torch.randint(len(images), (BATCH,)).numpy()])
        with autocast():
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample.float()
        kl = posterior.kl().float().mean() / posterior.mean[0].numel()
        value, shown = reconstruction_loss(y, x)
        return value + KL_WEIGHT * kl, shown | {"kl": kl}

    loop = Loop("vae", folder, vae, LR, steps, seed=1, weight_decay=0, deadline=deadline)
    loop.run(loss)
    return vae.eval()


def train_decoder(folder, vae: AutoencoderKL, latents: tuple[Tensor, Tensor], images, steps: int = DECODER_STEPS,
                  deadline=None) -> None:  # fmt: skip
    """Train the decoder on, its latents (unscaled means and deviations of `images`) as they are; changes `vae`."""
    mean, std = latents
    decoder = nn.ModuleDict({"conv": vae.post_quant_conv, "decoder": vae.decoder})

    def loss(step):
        pick = torch.randint(len(images), (BATCH,))
        z = mean[pick].float() + std[pick].float() * torch.randn(BATCH, *mean.shape[1:])
        with autocast():
            y = vae.decode(z).sample.float()
        return reconstruction_loss(y, to_tensor(images[pick.numpy()]))

    Loop("decoder", folder, decoder, 8e-4, steps, seed=5, weight_decay=0, deadline=deadline).run(loss)


@torch.no_grad()
def encode(vae: AutoencoderKL, images, batch: int = 64) -> tuple[Tensor, Tensor]:
    """Means and standard deviations of the latents (unscaled) of uint8 pictures, as float16."""
    parts = []
    for start in range(0, len(images), batch):
        with autocast():
            posterior = vae.encode(to_tensor(images[start : start + batch])).latent_dist
        parts.append((posterior.mean.half(), posterior.std.half()))
    return torch.cat([m for m, _ in parts]), torch.cat([s for _, s in parts])

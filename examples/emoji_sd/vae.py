"""The autoencoder: 64x64x3 pictures to 16x16x8 latents (an AutoencoderKL), with L1, edges and a small KL term."""

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import l1_loss, relu

from .loop import Loop, adamw, autocast, soap, to_tensor

STEPS, DECODER_STEPS, BATCH, LR, KL_WEIGHT = 1800, 900, 8, 3e-3, 1e-3
DECODER_LR, CRITIC_WEIGHT = 3e-4, 0.02
WIDTHS, CHANNELS = (32, 48, 64), 8


def build() -> AutoencoderKL:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(WIDTHS), up_block_types=("UpDecoderBlock2D",) * len(WIDTHS),
        block_out_channels=WIDTHS, layers_per_block=1, latent_channels=CHANNELS, norm_num_groups=8, sample_size=64,
    )  # fmt: skip
    # Convolutions that keep the scale of what they pass on: with torch's default (a third of the variance a layer, and
    # biases) the picture is lost among constants at first, and learning is several times slower.
    for name, module in vae.named_modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=(0.5 if ".conv2" in name else 1) / module.weight[0].numel() ** 0.5)
            nn.init.zeros_(module.bias)
    nn.init.constant_(vae.quant_conv.bias.data[CHANNELS:], -4.0)  # little noise on the latents at first
    return vae


def load(folder) -> AutoencoderKL:
    """A trained autoencoder, in fp32 and with the sizes of `build`.

    Raises:
        ValueError: if it has others.
    """
    vae = AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True)
    if (found := (tuple(vae.config.block_out_channels), vae.config.latent_channels)) != (WIDTHS, CHANNELS):
        raise ValueError(f"{folder}: widths and latent channels are {found}, expected {(WIDTHS, CHANNELS)}")
    return vae.eval()


def edges(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., 1:] - x[..., :-1]


def reconstruction_loss(y: Tensor, x: Tensor) -> tuple[Tensor, dict]:
    l1, edge = l1_loss(y, x), sum(l1_loss(a, b) for a, b in zip(edges(y), edges(x), strict=True))
    return l1 + 2 * edge, {"l1": l1, "edge": edge}


def train(folder, images, steps: int = STEPS, deadline=None) -> tuple[AutoencoderKL, bool]:
    """Train on uint8 pictures, N x 64 x 64 x 3.  Returns the autoencoder, and whether it has had all its steps."""
    vae = build()

    def loss(step):
        x = to_tensor(images[torch.randint(len(images), (BATCH,)).numpy()])
        with autocast():
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample.float()
        kl = posterior.kl().float().mean() / posterior.mean[0].numel()
        value, shown = reconstruction_loss(y, x)
        return value + KL_WEIGHT * kl, shown | {"kl": kl}

    loop = Loop("vae", folder, vae, soap(list(vae.parameters()), LR), steps, seed=1, deadline=deadline)
    return vae.eval(), loop.run(loss).finished


class Critic(nn.Module):
    """Says of every patch of 22x22 pixels how real it looks (Isola et al., arXiv 1611.07004)."""

    def __init__(self, width: int = 32):
        super().__init__()
        layers, channels = [], 3
        for multiple, stride in ((1, 2), (2, 2), (4, 1)):
            layers += [nn.Conv2d(channels, width * multiple, 4, stride, 1), nn.LeakyReLU(0.2)]
            channels = width * multiple
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def train_decoder(folder, vae: AutoencoderKL, images, steps: int = DECODER_STEPS, deadline=None) -> bool:
    """Train the decoder on against a critic of patches, its latents as they are; changes `vae`.  Returns whether it has
    had all its steps."""
    torch.manual_seed(1)
    critic = Critic()
    trained = nn.ModuleDict({"conv": vae.post_quant_conv, "decoder": vae.decoder, "critic": critic})

    def loss(step):
        x = to_tensor(images[torch.randint(len(images), (BATCH,)).numpy()])
        with autocast():
            with torch.no_grad():
                z = vae.encode(x).latent_dist.sample()
            y = vae.decode(z).sample.float()
            fixed = {name: p.detach() for name, p in critic.named_parameters()}  # the decoder's term leaves it alone
            fooled = -functional_call(critic, fixed, (y,)).float().mean()
            real, fake = critic(x).float(), critic(y.detach()).float()
        hinge = relu(1 - real).mean() + relu(1 + fake).mean()
        value, shown = reconstruction_loss(y, x)
        return value + CRITIC_WEIGHT * fooled + hinge, shown | {"critic": hinge}

    optimizer = adamw(list(trained.parameters()), DECODER_LR, weight_decay=0)
    return Loop("decoder", folder, trained, optimizer, steps, seed=5, deadline=deadline).run(loss).finished


@torch.no_grad()
def encode(vae: AutoencoderKL, images, batch: int = 64) -> tuple[Tensor, Tensor]:
    """Means and standard deviations of the latents (unscaled) of uint8 pictures, as float16."""
    parts = []
    for start in range(0, len(images), batch):
        with autocast():
            posterior = vae.encode(to_tensor(images[start : start + batch])).latent_dist
        parts.append((posterior.mean.half(), posterior.std.half()))
    return torch.cat([m for m, _ in parts]), torch.cat([s for _, s in parts])

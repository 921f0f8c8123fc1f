"""Is the autoencoder good enough to train a U-Net on?  Held to on the 75 subject pictures, which it has never seen:

python -m examples.emoji_sd.gate [PIPELINE/vae]
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

from ..measure.pictures import laplacian_variance, psnr
from .loop import to_tensor
from .subjects import SUBJECTS

PSNR, SHARPNESS = 31.0, 0.70  # at least: mean dB, and the share of the pictures' Laplacian variance


@torch.no_grad()
def reconstruct(vae, images: list[Image.Image], batch: int = 25) -> list[Image.Image]:
    """Each picture through the autoencoder: the mean of its latents, decoded."""
    result = []
    for start in range(0, len(images), batch):
        x = to_tensor(np.stack([np.asarray(image.convert("RGB")) for image in images[start : start + batch]]))
        y = vae.decode(vae.encode(x).latent_dist.mean).sample
        y = ((y.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        result += [Image.fromarray(array) for array in y]
    return result


def check(vae, folder: Path = SUBJECTS) -> dict:
    """{"psnr": mean dB, "sharpness": share of the Laplacian variance, "passes": both reach what is held to}."""
    images = [Image.open(path) for path in sorted(folder.glob("*/input/*.png"))]
    again = reconstruct(vae, images)
    found = {
        "pictures": len(images),
        "psnr": round(float(psnr(images, again).mean()), 2),
        "sharpness": round(float(laplacian_variance(again).mean() / laplacian_variance(images).mean()), 3),
    }
    return found | {"passes": found["psnr"] >= PSNR and found["sharpness"] >= SHARPNESS}


if __name__ == "__main__":
    from .train import PIPELINE

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vae", type=Path, nargs="?", default=PIPELINE / "vae")
    vae = AutoencoderKL.from_pretrained(parser.parse_args().vae, torch_dtype=torch.float32, local_files_only=True)
    print(json.dumps(check(vae.eval()), indent=1))

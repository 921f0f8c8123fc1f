# SPDX-License-Identifier: Apache-2.0
"""Whether the best learning rate of the shipped pipeline depends on the factors and terms.

    python -m benchmarks.unet_learning_rates --out benchmarks/results/learning-rates-unet.json

Short DreamBooth trainings of examples/assets/emoji-sd, every one with the same pictures, noises and timesteps. What is
kept is the loss on those pictures, with other noises that are the same for all, relative to the loss before: how much
was learned, not how well pictures come out. Finished trainings are in the file and are not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import get_peft_model
from tqdm import tqdm

from peft_krona import KronAConfig

from .learning_rates import save
from .measure import environment

ASSETS = Path(__file__).parents[1] / "examples" / "assets"
RATES = tuple(2.0**e for e in range(-10, -3))
SUBJECTS = ("dog",)
FACTORS = ((64, 4, 1), (64, 16, 1), (16, 16, 1), (4, 64, 1), (64, 4, 4))
JUDGED = 32  # pairs of noise and timestep


class Data(NamedTuple):
    """Latents (n, channels, h, w) of the pictures; the caption's embedding (1, tokens, width)."""

    latents: torch.Tensor
    text: torch.Tensor


def load(subject: str) -> tuple[Any, Any, Data]:
    """(U-Net, noise scheduler, data) of the shipped pipeline."""
    from diffusers import DDPMScheduler, StableDiffusionPipeline
    from diffusers.image_processor import VaeImageProcessor
    from PIL import Image

    pipe = StableDiffusionPipeline.from_pretrained(ASSETS / "emoji-sd")
    paths = sorted((ASSETS / "subjects" / subject / "input").glob("*.png"))
    pictures = [Image.open(path).convert("RGB") for path in paths]
    size = pipe.unet.config.sample_size * pipe.vae_scale_factor
    pixels = VaeImageProcessor(vae_scale_factor=pipe.vae_scale_factor).preprocess(pictures, size, size)
    with torch.no_grad():
        latents = pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor
        text, _ = pipe.encode_prompt(f"a {subject.replace('_', ' ')}", "cpu", 1, False)
    return pipe.unet.requires_grad_(False), DDPMScheduler.from_config(pipe.scheduler.config), Data(latents, text)


def loss(unet: Any, scheduler: Any, data: Data, picture: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Mean squared error of the prediction for latents at these indices."""
    latents = data.latents[picture]
    noise = torch.randn(latents.shape, generator=generator)
    steps = torch.randint(0, scheduler.config.num_train_timesteps, (len(latents),), generator=generator)
    noisy = scheduler.add_noise(latents, noise, steps)
    kind = scheduler.config.prediction_type
    target = noise if kind == "epsilon" else scheduler.get_velocity(latents, noise, steps)
    predicted = unet(noisy, steps, data.text.expand(len(latents), -1, -1)).sample
    return (predicted - target).square().mean()


def judged(unet: Any, scheduler: Any, data: Data) -> float:
    with torch.no_grad():
        pictures = torch.arange(JUDGED) % len(data.latents)
        return loss(unet, scheduler, data, pictures, torch.Generator().manual_seed(1)).item()


def train(factors: tuple[int, int, int], rate: float, subject: str, steps: int, batch: int) -> float:
    """The loss after a training, relative to the one before; inf where it diverged."""
    a_out, a_in, r = factors
    unet, scheduler, data = load(subject)
    torch.manual_seed(0)
    model = get_peft_model(unet.eval(), KronAConfig(a_out=a_out, a_in=a_in, r=r))
    before = judged(model, scheduler, data)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        pictures = torch.randint(0, len(data.latents), (batch,), generator=generator)
        loss(model, scheduler, data, pictures, generator).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    after = judged(model, scheduler, data) / before
    return after if math.isfinite(after) else math.inf


def main(argv: list[str] | None = None) -> int:
    """Run what the file does not have yet, print the table; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.unet_learning_rates", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file; what is in it is not run again")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=4)
    args = parser.parse_args(argv)
    settings = {"steps": args.steps, "batch": args.batch}
    result: dict[str, Any] = {"suite": "unet learning rates", **settings, "environment": environment("cpu"), "rows": []}
    if args.out.exists():
        result = json.loads(args.out.read_text(encoding="utf-8"))
        if {name: result.get(name) for name in settings} != settings:
            print(f"{args.out} has other settings: {[result.get(name) for name in settings]}. Choose another --out.")
            return 1
    done = {(*row["factors"], row["rate"], row["subject"]) for row in result["rows"]}
    cases = [(f, rate, subject) for subject in SUBJECTS for rate in RATES for f in FACTORS]
    for factors, rate, subject in tqdm([c for c in cases if (*c[0], *c[1:]) not in done], leave=False):
        start = time.perf_counter()
        found = train(factors, rate, subject, args.steps, args.batch)
        row = {"factors": list(factors), "rate": rate, "subject": subject}
        row |= {"loss": round(found, 5) if math.isfinite(found) else None, "seconds": time.perf_counter() - start}
        result["rows"].append(row)
        save(result, args.out)
    print(table(result))
    return 0


def table(result: dict[str, Any]) -> str:
    """Markdown: the loss relative to before, by rate and setting; the mean of the subjects that have all trainings."""
    found = {(*row["factors"], row["rate"], row["subject"]): row["loss"] for row in result["rows"]}
    subjects = [s for s in SUBJECTS if all((*f, rate, s) in found for f in FACTORS for rate in RATES)]
    lines = [
        "| learning rate | " + " | ".join(f"({a_out}, {a_in}), r = {r}" for a_out, a_in, r in FACTORS) + " |",
        "|---:|" + "---:|" * len(FACTORS),
    ]
    means = {
        (rate, f): sum(math.inf if (v := found[(*f, rate, s)]) is None else v for s in subjects) / len(subjects)
        for rate in RATES
        for f in FACTORS
        if subjects
    }
    for rate in RATES:
        cells = []
        for f in FACTORS if subjects else ():
            least = min(means[other, f] for other in RATES)
            text = f"{means[rate, f]:.3f}"
            cells.append(f"**{text}**" if means[rate, f] == least else text)
        lines.append(f"| {rate:.1e} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

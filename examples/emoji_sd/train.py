"""From the raw npm package to a pipeline folder, in resumable stages:

    python -m examples.emoji_sd.train                  # everything, some hours on two CPU cores
    python -m examples.emoji_sd.train --until clip     # the first stages only
    python -m examples.emoji_sd.train --minutes unet=80 --steps unet=7000

Kill it whenever you like and start it again with the same arguments: it goes on where its last checkpoint is.
With more steps than before it trains on; `--minutes` ends a stage early, its learning rate having come down by then.
"""

import argparse
import os
import time
import urllib.request
from pathlib import Path

import numpy as np
import torch

from . import clip, export, judge_train, unet, vae
from .loop import save_atomically
from .record import write_log
from .render import CONCEPTS, PACKAGE_URL, TRAINED_CONCEPTS, caption, load_sprites, render
from .text import build_tokenizer, tokenize

HERE = Path(__file__).resolve().parent
PIPELINE = HERE.parent / "assets" / "emoji-sd"
JUDGE = HERE.parent / "assets" / "judge"
STAGES = ("data", "vae", "latents", "clip", "judge", "unet", "decoder")
PICTURES, CAPTIONS_EACH = 24_000, 2


def cached(path: Path, make):
    """The value that `make()` returns, kept in a file."""
    if not path.exists():
        save_atomically(make(), path)
    return torch.load(path, weights_only=True)


def get_package(folder: Path) -> Path:
    path = folder / "fluent-emoji-3d-1.1.0.tgz"
    if not path.exists():
        temporary = path.with_name(path.name + ".tmp")
        urllib.request.urlretrieve(PACKAGE_URL, temporary)
        os.replace(temporary, path)
    return path


def make_data(package: Path) -> dict:
    """Pictures of trained concepts only, each with two captions."""
    images, captions, scenes = render(load_sprites(package, TRAINED_CONCEPTS), 0, PICTURES, list(TRAINED_CONCEPTS))
    rng = np.random.default_rng(1)
    again = [render_caption(rng, scene) for scene in scenes]
    pairs = [[clip.with_rare_word(c, rng) for c in pair] for pair in zip(captions, again, strict=True)]
    return {"images": torch.from_numpy(images), "captions": pairs}


def render_caption(rng, scene: dict) -> str:
    return caption(rng, **scene, category=CONCEPTS[scene["name"]][1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/emoji"), help="checkpoints, caches and logs")
    parser.add_argument("--package", type=Path, help="the npm package (.tgz), if you have it already")
    parser.add_argument("--output", type=Path, default=PIPELINE, help="the pipeline folder to write")
    parser.add_argument("--latest", type=Path, help="a folder to export the U-Net's average to every 15 minutes")
    parser.add_argument("--until", choices=STAGES, default=STAGES[-1], help="the last stage to run")
    parser.add_argument("--skip", nargs="*", default=[], choices=["judge"], help="it can train in a process of its own")
    parser.add_argument("--steps", nargs="*", default=[], metavar="STAGE=N", help="steps of a stage")
    parser.add_argument("--minutes", nargs="*", default=[], metavar="STAGE=N", help="at most so long for a stage")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.run.mkdir(parents=True, exist_ok=True)
    steps = {k: int(v) for k, v in (item.split("=") for item in args.steps)}
    minutes = {k: float(v) for k, v in (item.split("=") for item in args.minutes)}

    def limits(stage, default):
        deadline = time.time() + 60 * minutes[stage] if stage in minutes else None
        return {"steps": steps.get(stage, default), "deadline": deadline}

    def reached(stage):
        print(f"{stage}: done", flush=True)
        return args.until == stage

    package = args.package or get_package(args.run)
    data = cached(args.run / "data.pt", lambda: make_data(package))
    images = data["images"].numpy()
    if reached("data"):
        return
    autoencoder = vae.train(args.run, images[:16_000], **limits("vae", vae.STEPS))
    if reached("vae"):
        return
    mean, std = cached(args.run / "latents.pt", lambda: vae.encode(autoencoder, images))
    scale = 1 / float((mean.float().var() + std.float().square().mean()).sqrt())
    autoencoder.register_to_config(scaling_factor=round(scale, 5))
    scale = autoencoder.config.scaling_factor
    raw, mean, std = (mean, std), mean * scale, std * scale
    if reached("latents"):
        return
    tokenizer = build_tokenizer(args.run / "tokenizer")
    ids = torch.stack([tokenize(tokenizer, list(c)) for c in zip(*data["captions"], strict=True)], 1)
    encoder = clip.train(args.run, tokenizer, mean, ids, **limits("clip", clip.STEPS)).text
    if reached("clip"):
        return
    if "judge" not in args.skip:
        judge_train.train(args.run, package, autoencoder, JUDGE, **limits("judge", judge_train.STEPS))
    if reached("judge"):
        return

    exported = time.time()

    def export_latest(loop):
        nonlocal exported
        if args.latest and time.time() - exported > 900:
            export_unet(loop, args.latest)
            exported = time.time()

    def export_unet(loop, folder):
        unet_state, text_state = unet.split(loop.ema)
        model = unet.build(mean.shape[-1], mean.shape[1], encoder.config.hidden_size)
        model.load_state_dict(unet_state)
        vae_copy = vae.build()
        vae_copy.load_state_dict(autoencoder.state_dict())
        vae_copy.register_to_config(scaling_factor=scale)
        text_copy = clip.build_text_encoder(tokenizer)
        text_copy.load_state_dict(text_state)
        export.export(folder, vae_copy, text_copy, tokenizer, model)

    empty = tokenize(tokenizer, [""])[0]
    loop = unet.train(
        args.run, (mean, std), encoder, ids, empty, after_save=export_latest, **limits("unet", unet.STEPS)
    )
    export_unet(loop, args.output)
    if reached("unet"):
        return
    vae.train_decoder(args.run, autoencoder, raw, images, **limits("decoder", vae.DECODER_STEPS))
    export_unet(loop, args.output)
    write_log(args.run, args.output / "training_log.json")
    reached("decoder")


if __name__ == "__main__":
    main()

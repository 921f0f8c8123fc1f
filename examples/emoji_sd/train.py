"""From the raw npm package to a pipeline folder, in resumable stages:

    python -m examples.emoji_sd.train                  # everything, some hours of one CPU core
    python -m examples.emoji_sd.train --minutes 60     # a piece of it; the same command goes on from there
    python -m examples.emoji_sd.train --until vae      # the first stages only
    python -m examples.emoji_sd.train --vae examples/assets/emoji-sd/vae   # from a trained autoencoder on

Kill it whenever you like and start it again with the same arguments: it goes on where its last checkpoint is, to the
numbers that an unbroken run would have had.
"""

import argparse
import os
import re
import time
import urllib.request
from pathlib import Path

import numpy as np
import torch

from . import clip, export, gate, judge_train, unet, vae
from .loop import save_atomically
from .record import write_log
from .render import CONCEPTS, DRAWN_CONCEPTS, PACKAGE_URL, TRAINED_CONCEPTS, caption, load_sprites, render
from .text import build_tokenizer, tokenize

HERE = Path(__file__).resolve().parent
PIPELINE = HERE.parent / "assets" / "emoji-sd"
JUDGE = HERE.parent / "assets" / "judge"
STAGES = ("data", "vae", "decoder", "latents", "clip", "judge", "unet")
OTHER_SCENES = re.compile(r"\b(small|large|two|gradient|striped)\b|on the (left|right)")  # in a caption
PICTURES, CAPTIONS_EACH = 16_000, 2


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


def make_vae_data(package: Path) -> torch.Tensor:
    """Pictures of all trained concepts, more than the pipeline draws, for an autoencoder that suits other emoji too."""
    images, _, _ = render(load_sprites(package, TRAINED_CONCEPTS), 0, PICTURES, list(TRAINED_CONCEPTS))
    return torch.from_numpy(images)


def make_data(package: Path) -> dict:
    """Pictures of the concepts that the pipeline draws, each with captions."""
    images, captions, scenes = render(load_sprites(package, DRAWN_CONCEPTS), 6, PICTURES, list(DRAWN_CONCEPTS))
    rng = np.random.default_rng(1)
    again = [[render_caption(rng, scene) for scene in scenes] for _ in range(CAPTIONS_EACH - 1)]
    groups = [[clip.with_rare_word(c, rng) for c in group] for group in zip(captions, *again, strict=True)]
    return {"images": torch.from_numpy(images), "captions": groups}


def render_caption(rng, scene: dict) -> str:
    return caption(rng, **scene, category=CONCEPTS[scene["name"]][1])


def weight(caption: str) -> float:
    """How often the U-Net sees a picture: one thing in the middle of a plain background, what most prompts ask for,
    three times as often as the others."""
    return 1.0 if OTHER_SCENES.search(caption) else 3.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/emoji"), help="checkpoints, caches and logs")
    parser.add_argument("--package", type=Path, help="the npm package (.tgz), if you have it already")
    parser.add_argument("--vae", type=Path, help="the folder of a trained autoencoder, instead of training one")
    parser.add_argument("--output", type=Path, default=PIPELINE, help="the pipeline folder to write")
    parser.add_argument("--latest", type=Path, help="a folder to export the U-Net's average to, ten minutes apart")
    parser.add_argument("--until", choices=STAGES, default=STAGES[-1], help="the last stage to run")
    parser.add_argument("--skip", nargs="*", default=[], choices=["judge"], help="it can train in a process of its own")
    parser.add_argument("--steps", nargs="*", default=[], metavar="STAGE=N", help="other steps than the recipe's")
    parser.add_argument("--minutes", type=float, help="stop after so long; the same command goes on")
    parser.add_argument("--threads", type=int, default=1, help="more than one pays on an idle machine only")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.run.mkdir(parents=True, exist_ok=True)
    steps = {k: int(v) for k, v in (item.split("=") for item in args.steps)}
    deadline = time.time() + 60 * args.minutes if args.minutes else None

    def limits(stage, default):
        return {"steps": steps.get(stage, default), "deadline": deadline}

    def stop_after(stage, finished=True) -> bool:
        print(f"{stage}: {'done' if finished else 'out of time; the same command goes on from here'}", flush=True)
        return args.until == stage or not finished

    package = args.package or get_package(args.run)
    data = cached(args.run / "data.pt", lambda: make_data(package))
    if stop_after("data"):
        return
    if args.vae:
        autoencoder = vae.load(args.vae)
    else:
        vae_images = cached(args.run / "vae_data.pt", lambda: make_vae_data(package)).numpy()
        autoencoder, finished = vae.train(args.run, vae_images, **limits("vae", vae.STEPS))
        if stop_after("vae", finished):
            return
        finished = vae.train_decoder(args.run, autoencoder, vae_images, **limits("decoder", vae.DECODER_STEPS))
        if stop_after("decoder", finished):
            return
        autoencoder.save_pretrained(args.run / "vae")
    print(gate.check(autoencoder), flush=True)
    mean, std = cached(args.run / "latents.pt", lambda: vae.encode(autoencoder, data["images"].numpy()))
    scale = 1 / float((mean.float().var() + std.float().square().mean()).sqrt())
    autoencoder.register_to_config(scaling_factor=round(scale, 5))
    mean, std = mean * round(scale, 5), std * round(scale, 5)
    if stop_after("latents"):
        return
    tokenizer = build_tokenizer(args.run / "tokenizer")
    ids = torch.stack([tokenize(tokenizer, list(c)) for c in zip(*data["captions"], strict=True)], 1)
    pair, finished = clip.train(args.run, tokenizer, mean, ids, **limits("clip", clip.STEPS))
    encoder = pair.text
    if stop_after("clip", finished):
        return
    if "judge" not in args.skip:
        judge = judge_train.train(args.run, package, autoencoder, JUDGE, **limits("judge", judge_train.STEPS))
        if stop_after("judge", judge is not None):
            return

    exported = time.time()

    def export_latest(loop):
        nonlocal exported
        if args.latest and time.time() - exported > 600:
            export_unet(loop, args.latest)
            exported = time.time()

    def export_unet(loop, folder):
        unet_state, text_state = unet.split(loop.averaged())
        model = unet.build(mean.shape[-1], mean.shape[1], encoder.config.hidden_size)
        model.load_state_dict(unet_state)
        text = clip.build_text_encoder(tokenizer)
        text.load_state_dict(text_state)
        export.export(folder, autoencoder, text, tokenizer, model, list(DRAWN_CONCEPTS))

    empty = tokenize(tokenizer, [""])[0]
    weights = torch.tensor([weight(first) for first, *_ in data["captions"]])
    loop = unet.train(
        args.run, (mean, std), weights, encoder, ids, empty, after_save=export_latest, **limits("unet", unet.STEPS)
    )
    if stop_after("unet", loop.finished) and not loop.finished:
        if args.latest:
            export_unet(loop, args.latest)
        return
    export_unet(loop, args.output)
    write_log(args.run, args.output / "training_log.json")


if __name__ == "__main__":
    main()

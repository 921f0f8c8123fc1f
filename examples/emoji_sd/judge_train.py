"""Train the judge on renders of its own: all concepts, the held-out ones too, and pictures made worse on purpose."""

import json
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import avg_pool2d, cross_entropy, interpolate

from .judge import Judge, JudgeModel
from .loop import Loop, adamw, autocast, save_atomically, to_tensor
from .render import (
    CONCEPTS,
    HELD_OUT_CONCEPTS,
    LAYOUTS,
    article,
    draw,
    load_sprites,
    random_scene,
    render,
    sprite_of_file,
)
from .text import words
from .vae import encode

STEPS, BATCH, LR, WIDTH, OUT = 1400, 64, 1.5e-3, 16, 128
PICTURES, VIEWS, MEMBERS = 10_000, 4, 1000


def all_emoji(package: Path) -> list[str]:
    """The files of the package that are single pictures: no flags, keycaps, letters, clocks or skin tones."""
    with tarfile.open(package) as tar:
        files = sorted(Path(n).stem for n in tar.getnames() if n.endswith(".webp"))
    chosen = []
    for file in files:
        codes = [int(c, 16) for c in file.split("-") if c != "fe0f"]
        if len(codes) == 1 and codes[0] > 0x2600 and not 0x1F170 <= codes[0] <= 0x1F265 and codes[0] >> 4 != 0x1F55:
            chosen.append(file)
    return chosen


def make_data(package: Path, vae) -> dict:
    """Captioned renders of all concepts, and `VIEWS` renders each of many emoji, half of them seen through the VAE."""
    images, captions, scenes = render(load_sprites(package), 77, PICTURES, list(CONCEPTS))
    labels = [list(CONCEPTS).index(scene["name"]) for scene in scenes]
    rng = np.random.default_rng(78)
    files = rng.permutation(all_emoji(package))[:MEMBERS]
    views = []
    with tarfile.open(package) as tar:
        for file in files:
            sprite = {"it": sprite_of_file(tar, str(file))}
            for _ in range(VIEWS):
                scene = random_scene(rng, ["it"])
                scene["layout"] = str(rng.choice([x for x in LAYOUTS if x != "two"]))
                views.append(draw(sprite, rng, **scene))
    views = np.stack(views)
    for pictures in (images, views):
        pictures[::2] = decode(vae, encode(vae, pictures[::2]))
    return {
        "images": torch.from_numpy(images), "captions": captions, "labels": torch.tensor(labels),
        "views": torch.from_numpy(views).unflatten(0, (len(files), VIEWS)),
    }  # fmt: skip


@torch.no_grad()
def decode(vae, latents: tuple[Tensor, Tensor]) -> np.ndarray:
    """Pictures of latents drawn from their distribution, with a little more noise for some."""
    generator = torch.Generator().manual_seed(5)
    parts = []
    for mean, std in zip(latents[0].split(64), latents[1].split(64), strict=True):
        noise = torch.randn(mean.shape, generator=generator)
        more = torch.rand(len(mean), 1, 1, 1, generator=generator) * 0.3
        z = mean.float() + noise * torch.maximum(std.float(), more * mean.float().std())
        with autocast():
            x = vae.decode(z).sample.float()
        parts.append(((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1))
    return torch.cat(parts).numpy()


def worsen(x: Tensor) -> Tensor:
    """Random blur, noise and contrast for each picture of a batch (drawn with torch's generator)."""
    n = len(x)
    kind = torch.randint(4, (n, 1, 1, 1))
    small = interpolate(avg_pool2d(x, 2), scale_factor=2, mode="bilinear")
    blurred = avg_pool2d(torch.nn.functional.pad(x, (1, 1, 1, 1), "replicate"), 3, 1)
    x = torch.where(kind == 1, small, torch.where(kind == 2, blurred, x))
    x = x * (1 + 0.1 * torch.randn(n, 1, 1, 1)) + 0.05 * torch.randn(n, 3, 1, 1)
    return (x + 0.15 * torch.rand(n, 1, 1, 1) * torch.randn_like(x)).clamp(-1, 1)


def contrast(a: Tensor, b: Tensor, scale) -> Tensor:
    logits, target = scale * a @ b.T, torch.arange(len(a))
    return (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2


def train(run: Path, package: Path, vae, output: Path, steps: int = STEPS, deadline=None) -> Judge | None:
    """Write the judge to `output` and return it, or None as long as it has not had all its steps."""
    path = run / "judge_data.pt"
    if not path.exists():
        save_atomically(make_data(package, vae), path)
    data = torch.load(path, weights_only=True)
    captions, labels, views = data["captions"], data["labels"], data["views"]
    names = list(CONCEPTS)
    name_texts = [f"a photo of {article(name)}" for name in names]
    torch.manual_seed(0)
    model = JudgeModel(words(), WIDTH, OUT)

    def loss(step):
        pick, members = torch.randint(len(captions), (BATCH,)), torch.randperm(len(views))[: BATCH // 2]
        pairs = torch.rand(BATCH // 2, VIEWS).argsort(1)[:, :2]
        both = views[members[:, None], pairs].flatten(0, 1)
        x = worsen(to_tensor(torch.cat([data["images"][pick], both])))
        with autocast():
            features = model.trunk(x).flatten(1)
            image, subject = model.image_head(features[:BATCH]), model.subject_head(features[BATCH:])
        image, subject = (torch.nn.functional.normalize(v.float(), dim=-1) for v in (image, subject))
        text = model.embed_texts([captions[i] for i in pick] + name_texts)
        scale = model.log_scale.clamp(max=3.5).exp()
        logits = scale * image @ text[BATCH:].T
        clip, concept = contrast(image, text[:BATCH], scale), cross_entropy(logits, labels[pick])
        same = contrast(subject[0::2], subject[1::2], 12.0)
        accuracy = (logits.argmax(1) == labels[pick]).float().mean()
        return clip + concept + same, {"clip": clip, "concept": concept, "same": same, "accuracy": accuracy}

    if (
        not Loop("judge", run, model, adamw(list(model.parameters()), LR), steps, seed=4, deadline=deadline)
        .run(loss)
        .finished
    ):
        return None
    output.mkdir(parents=True, exist_ok=True)
    save_file({k: v.half().contiguous() for k, v in model.state_dict().items()}, output / "model.safetensors")
    config = {"width": WIDTH, "out": OUT, "names": names, "words": list(model.words)}
    (output / "config.json").write_text(json.dumps(config) + "\n")
    return Judge.load(output)


def check(package: Path, judge: Judge, count: int = 1000) -> dict:
    """How often the judge is right about fresh renders, and whether its nameless space finds the same emoji."""
    sprites = load_sprites(package)
    result = {}
    for part, names in (("all", list(CONCEPTS)), ("held_out", list(HELD_OUT_CONCEPTS))):
        images, _, scenes = render(sprites, 991, count, names)
        images = [Image.fromarray(i) for i in images]
        order = judge.concept_scores(images).argsort(1, descending=True)
        truth = torch.tensor([judge.names.index(s["name"]) for s in scenes])[:, None]
        result[part] = {f"top{k}": round(float((order[:, :k] == truth).any(1).float().mean()), 4) for k in (1, 5)}
        subject = judge.subject_similarity(images, images).fill_diagonal_(-1)
        result[part]["nearest_is_same_subject"] = round(
            float((truth[subject.argmax(1), 0] == truth[:, 0]).float().mean()), 4
        )
        colours = judge.background_colour(images)
        right = [a == s["colour"] for a, s in zip(colours, scenes, strict=True)]
        result[part]["background_colour"] = round(sum(right) / count, 4)
    return result

"""The acceptance table of a pipeline:

    python -m examples.emoji_sd.evaluate                        # evaluation.json and samples.png beside the pipeline
    python -m examples.emoji_sd.evaluate --package PACKAGE.tgz  # and sharpness and distance against real renders

Random prompts "a <name> on a <colour> background" with the pipeline's own sampler, four pictures of each held-out name.
The judge names them, border pixels tell the background's colour.  With the npm package, pictures are also compared with
real renders of the same prompts: their Laplacian variance, and the Fréchet distance of features of an encoder that this
project did not train.  Two sets of real renders have a distance too, which is printed beside it.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .export import concepts, grid, load, sample
from .judge import Judge, background_colour
from .render import COLOURS, HELD_OUT_CONCEPTS, TRAINED_CONCEPTS, article, draw, load_sprites
from .train import PIPELINE


def hits(scores: torch.Tensor, truth: list[int], k: int) -> float:
    top = scores.argsort(1, descending=True)[:, :k]
    return round(float((top == torch.tensor(truth)[:, None]).any(1).float().mean()), 4)


def choose(folder: Path, count: int) -> tuple[list[str], list[str]]:
    """Names (each once before any comes twice) and colours of `count` prompts."""
    rng = np.random.default_rng(12345)
    names, chosen, colours = concepts(folder), [], list(COLOURS)
    while len(chosen) < count:
        chosen += [names[i] for i in rng.permutation(len(names))[: count - len(chosen)]]
    return chosen, [colours[i] for i in rng.integers(len(colours), size=count)]


def prompt(name: str, colour: str) -> str:
    return f"{article(name)} on {article(colour)} background"


def evaluate(folder: Path, steps: int = 30, guidance: float = 4.0, count: int = 200, seed: int = 0) -> dict:
    """The table, with "images" and "held_out_images"."""
    pipeline, judge = load(folder), Judge.load()
    trained, held = list(TRAINED_CONCEPTS), list(HELD_OUT_CONCEPTS)
    names, wanted = choose(folder, count)
    prompts = [prompt(n, c) for n, c in zip(names, wanted, strict=True)]
    start = time.process_time()
    images = sample(pipeline, prompts, seed, steps, guidance)
    seconds = time.process_time() - start
    scores, truth = judge.concept_scores(images, trained), [trained.index(n) for n in names]
    found = background_colour(images)

    unseen = [name for name in held for _ in range(4)]
    unseen_colours = [list(COLOURS)[i] for i in np.random.default_rng(1).integers(len(COLOURS), size=len(unseen))]
    unseen_prompts = [prompt(n, c) for n, c in zip(unseen, unseen_colours, strict=True)]
    unseen_images = sample(pipeline, unseen_prompts, seed + 10_000, steps, guidance)
    everything = trained + held
    unseen_scores = judge.concept_scores(unseen_images, everything)
    unseen_truth = [everything.index(n) for n in unseen]
    result = {
        "concepts": len(concepts(folder)), "prompts": count, "sampler_steps": steps, "guidance_scale": guidance,
        "concept_top1": hits(scores, truth, 1), "concept_top5": hits(scores, truth, 5),
        "background_colour": sum(a == b for a, b in zip(found, wanted, strict=True)) / count,
        "cpu_seconds_per_image": round(seconds / count, 3),
        "held_out_prompts": len(unseen), "held_out_top1_of_all": hits(unseen_scores, unseen_truth, 1),
        "held_out_background_colour": sum(
            a == b for a, b in zip(background_colour(unseen_images), unseen_colours, strict=True)
        ) / len(unseen),
    }  # fmt: skip
    order = scores.argsort(1, descending=True)
    missed = [(p, trained[o[0]], c) for p, o, t, c in zip(prompts, order, truth, found, strict=True)
              if t not in o[:5] or c not in p]  # fmt: skip
    result["missed"] = [{"prompt": p, "judge_says": f"{n} on {c}"} for p, n, c in missed]
    return result | {"images": images, "held_out_images": unseen_images}


def against_renders(images: list[Image.Image], folder: Path, package: Path) -> dict:
    """Sharpness and feature distance of the pictures that `evaluate` drew, against renders of the same prompts."""
    from ..measure.encoder import Encoder
    from ..measure.pictures import frechet_distance, laplacian_variance

    names, colours = choose(folder, len(images))
    sprites, encoder = load_sprites(package, sorted(set(names))), Encoder.load()
    real, more = (
        [
            Image.fromarray(draw(sprites, rng, name, colour))
            for name, colour in zip(names, colours, strict=True)
        ]
        for rng in (np.random.default_rng(2), np.random.default_rng(3))
    )  # fmt: skip
    features, drawn = encoder.features(real), encoder.features(images)
    return {
        "laplacian_variance_against_renders": round(
            float(laplacian_variance(images).mean() / laplacian_variance(real).mean()), 3
        ),
        "frechet_distance_to_renders": round(frechet_distance(drawn, features), 2),
        "frechet_distance_of_two_sets_of_renders": round(frechet_distance(encoder.features(more), features), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=Path, default=PIPELINE)
    parser.add_argument("--output", type=Path, help="where evaluation.json and the grids go; default: the pipeline")
    parser.add_argument("--package", type=Path, help="the npm package (.tgz), to compare with real renders")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="0 is the reported one: choose settings on another")
    args = parser.parse_args()
    output = args.output or args.pipeline
    output.mkdir(parents=True, exist_ok=True)
    result = evaluate(args.pipeline, args.steps, args.guidance, args.count, args.seed)
    images = result.pop("images")
    if args.package:
        missed = result.pop("missed")
        result |= against_renders(images, args.pipeline, args.package) | {"missed": missed}
    grid(images, 20).save(output / "samples.png")
    grid(result.pop("held_out_images"), 20).save(output / "held_out_before.png")
    (output / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "missed"}, indent=1))


if __name__ == "__main__":
    main()

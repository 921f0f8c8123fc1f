"""The acceptance table of the shipped pipeline, by the judge:

    python -m examples.emoji_sd.evaluate               # writes evaluation.json and samples.png beside the pipeline

100 random prompts "a <name> on a <colour> background" with the pipeline's own sampler, and four pictures of each
held-out name.  Goals: the right concept among the judge's first five of all trained ones for at least 80 %, the right
background colour for at least 95 %, and held-out subjects not drawn.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from .export import grid, load, sample
from .judge import Judge, background_colour
from .render import COLOURS, HELD_OUT_CONCEPTS, TRAINED_CONCEPTS, article
from .train import PIPELINE


def hits(scores: torch.Tensor, truth: list[int], k: int) -> float:
    top = scores.argsort(1, descending=True)[:, :k]
    return round(float((top == torch.tensor(truth)[:, None]).any(1).float().mean()), 4)


def evaluate(folder: Path, steps: int = 30, guidance: float = 4.0, count: int = 100, seed: int = 0) -> dict:
    pipeline, judge = load(folder), Judge.load()
    rng = np.random.default_rng(12345)
    trained, held, colours = list(TRAINED_CONCEPTS), list(HELD_OUT_CONCEPTS), list(COLOURS)
    names = [trained[i] for i in rng.choice(len(trained), count, replace=count > len(trained))]
    wanted = [colours[i] for i in rng.integers(len(colours), size=count)]
    prompts = [f"{article(n)} on {article(c)} background" for n, c in zip(names, wanted, strict=True)]
    start = time.time()
    images = sample(pipeline, prompts, seed, steps, guidance)
    seconds = time.time() - start
    scores, truth = judge.concept_scores(images, trained), [trained.index(n) for n in names]
    found = background_colour(images)

    unseen = [name for name in held for _ in range(4)]
    unseen_colours = [colours[i] for i in rng.integers(len(colours), size=len(unseen))]
    unseen_prompts = [f"{article(n)} on {article(c)} background" for n, c in zip(unseen, unseen_colours, strict=True)]
    unseen_images = sample(pipeline, unseen_prompts, seed + 10_000, steps, guidance)
    everything = trained + held
    unseen_scores = judge.concept_scores(unseen_images, everything)
    unseen_truth = [everything.index(n) for n in unseen]
    result = {
        "prompts": count, "sampler_steps": steps, "guidance_scale": guidance,
        "concept_top1": hits(scores, truth, 1), "concept_top5": hits(scores, truth, 5),
        "background_colour": sum(a == b for a, b in zip(found, wanted, strict=True)) / count,
        "seconds_per_image": round(seconds / count, 3),
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=Path, default=PIPELINE)
    parser.add_argument("--output", type=Path, help="where evaluation.json and the grids go; default: the pipeline")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--count", type=int, default=100)
    args = parser.parse_args()
    output = args.output or args.pipeline
    output.mkdir(parents=True, exist_ok=True)
    result = evaluate(args.pipeline, args.steps, args.guidance, args.count)
    grid(result.pop("images"), 10).save(output / "samples.png")
    grid(result.pop("held_out_images"), 20).save(output / "held_out_before.png")
    (output / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "missed"}, indent=1))


if __name__ == "__main__":
    main()

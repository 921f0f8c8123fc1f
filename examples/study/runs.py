# SPDX-License-Identifier: Apache-2.0
"""One run: train an adapter as the example script does, draw with it, and judge."""

from __future__ import annotations

import hashlib
import subprocess
import time
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from examples import dreambooth_kron
from examples.dreambooth import adapters, demo
from examples.dreambooth.arguments import parse_args
from examples.dreambooth.data import image_files, open_image
from examples.dreambooth.evaluate import for_sampling, load_pipeline, sample
from examples.emoji_sd.export import concepts
from examples.emoji_sd.judge import Judge, background_colour
from examples.emoji_sd.render import COLOURS, article
from examples.measure.encoder import Encoder
from examples.measure.pictures import drift

from .plan import Run, Sizes

GUIDANCE = 4.0
SIZE = (64, 64)


@lru_cache(maxsize=1)
def judges() -> tuple[Judge, Encoder]:
    return Judge.load(), Encoder.load()


@lru_cache(maxsize=1)
def fingerprint(pipeline: Path) -> str:
    """The first digits of the hash of all weights of a pipeline."""
    total = hashlib.sha256()
    for path in sorted(pipeline.rglob("*.safetensors")):
        total.update(path.read_bytes())
    return total.hexdigest()[:12]


def versions() -> dict[str, str]:
    root = Path(__file__).resolve().parents[2]
    found = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True)
    return {
        "torch": torch.__version__, "peft": peft.__version__, "diffusers": diffusers.__version__,
        "commit": found.stdout.strip() or "unknown",
    }  # fmt: skip


def unrelated_prompts(pipeline: Path, count: int) -> list[str]:
    """Prompts of other things that the base model draws; the same for every run."""
    rng = np.random.default_rng(4242)
    names = rng.permutation(concepts(pipeline))[:count]
    return [f"{article(str(n))} on {article(str(rng.choice(list(COLOURS))))} background" for n in names]


def draw(pipe: Any, prompts: list[str], first_seed: int, sizes: Sizes) -> list:
    """One picture a prompt, each from a seed of its own."""
    seeds = [first_seed + i for i in range(len(prompts))]
    settings = {"num_inference_steps": sizes.sampler_steps, "guidance_scale": GUIDANCE}
    with for_sampling(pipe):
        return sample(pipe, prompts, seeds, SIZE, batch=28, **settings)


@lru_cache(maxsize=4)
def unrelated_features(pipeline: Path, sizes: Sizes) -> torch.Tensor:
    """What the base model makes of the unrelated prompts, N x 1280."""
    pictures = draw(load_pipeline(str(pipeline)), unrelated_prompts(pipeline, sizes.unrelated), 9000, sizes)
    return judges()[1].features(pictures)


def update_norm(model: torch.nn.Module) -> float:
    """The Frobenius norm of the change of all adapted weights together."""
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    squares = [m.get_delta_weight(n).detach().double().square().sum() for m in layers for n in m.active_adapters]
    return float(torch.stack(squares).sum().sqrt())


def execute(run: Run, folder: Path, pipeline: Path = demo.PIPELINE) -> dict[str, Any]:
    """Train, draw and judge; `folder` holds the training's output and is written over.

    Returns the run's fields with
        subject_right: share of pictures that the judge names after the subject, first of all names
        similarity: mean cosine between the pictures and the instance pictures, by the encoder that is not ours
        background_right: share of pictures with the prompt's background colour
        drift: mean feature distance of the unrelated prompts' pictures from the base model's
        update_norm, parameters, file_bytes, seconds_training (of the process), versions
    """
    flags = [
        "--demo", run.subject, "--output_dir", str(folder), "--seed", str(run.seed), *run.flags,
        "--learning_rate", str(run.learning_rate), "--max_train_steps", str(run.sizes.steps),
        "--train_batch_size", str(run.sizes.batch), "--checkpointing_steps", "1000000", "--export", "none",
        "--report_to", "none", "--pretrained_model_name_or_path", str(pipeline),
    ]  # fmt: skip
    started = time.process_time()
    args = parse_args(flags, demo.settings)
    summary = dreambooth_kron.main(args)
    seconds = time.process_time() - started
    if summary["interrupted"]:
        raise KeyboardInterrupt

    judge, encoder = judges()
    prompts = dict(list(demo.prompts_of(run.subject, args.instance_prompt).items())[: run.sizes.backgrounds])
    pipe = load_pipeline(str(pipeline))
    adapters.load(pipe, folder)
    pictures = draw(pipe, list(prompts.values()), 1000 * (run.seed + 1), run.sizes)
    unrelated = draw(pipe, unrelated_prompts(pipeline, run.sizes.unrelated), 9000, run.sizes)
    concept = demo.subjects()[run.subject]["concept"]
    named = [judge.names[i] == concept for i in judge.concept_scores(pictures).argmax(1).tolist()]
    found = [colour == seen for colour, seen in zip(prompts, background_colour(pictures), strict=True)]
    instances = [open_image(path) for path in image_files(demo.ASSETS / "subjects" / run.subject / "input")]
    return {k: v for k, v in asdict(run).items() if k != "sizes"} | asdict(run.sizes) | {
        "key": run.key(fingerprint(pipeline)),
        "subject_right": sum(named) / len(named),
        "similarity": float(encoder.similarity(pictures, instances).mean()),
        "background_right": sum(found) / len(found),
        "drift": float(drift(unrelated_features(pipeline, run.sizes), encoder.features(unrelated)).mean()),
        "update_norm": update_norm(pipe.unet),
        "parameters": summary["trainable parameters"],
        "file_bytes": summary["adapter file, bytes"],
        "seconds_training": round(seconds, 2),
        "versions": versions(),
    }  # fmt: skip

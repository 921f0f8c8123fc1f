# SPDX-License-Identifier: Apache-2.0
"""The run without arguments: a shipped subject on the shipped pipeline, judged and shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from . import TrainingError, adapters
from .evaluate import for_sampling, labelled_rows, load_pipeline, sample
from .files import aside
from .images import image_files, open_image

ASSETS = Path(__file__).resolve().parents[1] / "assets"
PIPELINE = ASSETS / "emoji-sd"
DEFAULT_SUBJECT = "robot"
IDENTIFIER = "sks"
SEEDS = range(4)
SAMPLER = {"num_inference_steps": 30, "guidance_scale": 4.0}


def subjects() -> dict[str, dict[str, Any]]:
    """{name: class noun, the judge's word, colours of the instance images' backgrounds}."""
    return json.loads((ASSETS / "subjects" / "subjects.json").read_text(encoding="utf-8"))


def settings(subject: str) -> dict[str, Any]:
    """The defaults that --demo sets.

    Raises:
        TrainingError: if there is no such subject.
    """
    known = subjects()
    if subject not in known:
        raise TrainingError(f"--demo {subject}: expected one of the shipped subjects, {', '.join(known)}.")
    return {
        "pretrained_model_name_or_path": str(PIPELINE),
        "instance_data_dir": str(ASSETS / "subjects" / subject),
        "instance_prompt": f"a {IDENTIFIER} {known[subject]['class_noun']}",
        "output_dir": f"output/demo-{subject}",
        "overwrite_output_dir": True,
        "learning_rate": 4e-3,  # the shipped model is small: its layers are 128 and 192 wide
        "lr_scheduler": "cosine",
        "max_train_steps": 400,
        "train_batch_size": 8,
        "repeats": 8,
        "center_crop": True,
        "random_flip": True,
        "cache_latents": True,
        "checkpointing_steps": 100,
        "checkpoints_total_limit": 1,
    }


def prompts_of(subject: str, prompt: str) -> dict[str, str]:
    """{background colour: prompt}, for the colours that no instance image has."""
    from examples.emoji_sd.render import COLOURS, article

    seen = subjects()[subject]["colours"]
    return {colour: f"{prompt} on {article(colour)} background" for colour in COLOURS if colour not in seen}


def judge_and_show(
    subject: str, pipeline: str, instance_images: Path, prompt: str, output: Path, resolution: int | None = None
) -> dict[str, float]:
    """Base model against the adapter saved in `output` on the same prompts and seeds: a table and a grid.

    `resolution`: side of the pictures; None: the pipeline's own.

    Returns {"subject", "background", and the same for the base model}: shares of right images.
    """
    from examples.emoji_sd.judge import Judge, background_colour

    try:
        judge = Judge.load()
    except FileNotFoundError as error:
        raise TrainingError(
            f"The adapter is trained and saved in {output}, but the judge is missing ({error.filename}): take "
            "examples/assets/ from the repository."
        ) from error
    concept = subjects()[subject]["concept"]
    prompts = prompts_of(subject, prompt)
    pairs = [(colour, prompt, seed) for colour, prompt in prompts.items() for seed in SEEDS]
    size = (resolution, resolution)

    images, right = {}, {}
    for kind in ("base", "personalized"):
        pipe = load_pipeline(pipeline)
        if kind == "personalized":
            adapters.load(pipe, output)
        with for_sampling(pipe):
            images[kind] = sample(pipe, [p for _, p, _ in pairs], [s for *_, s in pairs], size, batch=28, **SAMPLER)
        best = judge.concept_scores(images[kind]).argmax(1).tolist()
        found = background_colour(images[kind])
        right[kind] = {
            "subject": [judge.names[i] == concept for i in best],
            "background": [colour == f for (colour, *_), f in zip(pairs, found, strict=True)],
        }

    n = len(SEEDS)
    head = f"{'background':<12}{'base: subject':>15}{'background':>12}{'personalized: subject':>24}{'background':>12}"
    lines = [head]
    for row, colour in enumerate(prompts):
        part = slice(row * n, row * n + n)
        counts = [sum(right[k][what][part]) for k in right for what in right[k]]
        cells = [f"{c}/{n}" for c in counts]
        lines.append(f"{colour:<12}{cells[0]:>15}{cells[1]:>12}{cells[2]:>24}{cells[3]:>12}")
    shares = {f"{k} {what}": sum(v) / len(v) for k in right for what, v in right[k].items()}
    cells = [f"{share:.0%}" for share in shares.values()]
    lines.append(f"{'all':<12}{cells[0]:>15}{cells[1]:>12}{cells[2]:>24}{cells[3]:>12}")
    table = "\n".join(lines)

    instances = [open_image(path) for path in image_files(instance_images)]
    grid = show(instances, prompts, images, output / "grid.png")
    for name, text in (("table.txt", table), ("table.json", json.dumps(shares, indent=1))):
        with aside(output / name) as temporary:
            temporary.write_text(text + "\n")
    print(f"\nBackgrounds that no instance image has, {n} seeds each; a judge that was trained apart says what it sees")
    print(f"(right subject: {concept!r} is its first guess of {len(judge.names)} names):\n\n{table}\n")
    print(f"adapter: {output / 'unet'}")
    print(f"table:   {output / 'table.txt'}")
    print(f"grid:    {grid}   (instance images; then per prompt: base model | personalized model, same seeds)")
    return shares


def show(instances: list[Image.Image], prompts: dict[str, str], images: dict[str, list], path: Path) -> Path:
    """The grid: instance images first, then a row per prompt, base model left, personalized model right."""
    n = len(SEEDS)
    rows = [("instance images", instances[: 2 * n])]
    for row, prompt in enumerate(prompts.values()):
        part = slice(row * n, row * n + n)
        words = prompt.split(" on ")
        rows.append(
            (f"{words[0]}\non {words[-1]}\nbase | personalized", images["base"][part] + images["personalized"][part])
        )
    with aside(path) as temporary:
        labelled_rows(rows).save(temporary)
    return path

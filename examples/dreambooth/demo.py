# SPDX-License-Identifier: Apache-2.0
"""The run without arguments: a shipped subject on the shipped pipeline, KronA beside LoRA, judged and shown."""

from __future__ import annotations

import json
from collections.abc import Mapping
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
# Attention, feed-forward layers and convolutions: this U-Net has no attention where it has the most pixels, and with
# attention alone 64 % of the pictures are right instead of 90 % (docs/evidence.md, "Layers").
TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2",
    "conv1", "conv2", "conv_shortcut",
)  # fmt: skip
# Chosen on some of the subjects, see examples/README.md.
LEARNING_RATES = {"krona": 7e-3, "lora": 1.5e-3}
# With a hundredth of it, which is usual, backgrounds are washed out.  An update takes rate times decay of the weights
# away; LoRA's decay is such that it takes as much.
WEIGHT_DECAYS = {kind: LEARNING_RATES["krona"] / rate for kind, rate in LEARNING_RATES.items()}
BASE = "base model"


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
        "target_modules": list(TARGETS),
        "learning_rate": LEARNING_RATES["krona"],  # the shipped model is small: its layers are 64 to 192 wide
        "adam_weight_decay": WEIGHT_DECAYS["krona"],
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
    subject: str,
    pipeline: str,
    instance_images: Path,
    prompt: str,
    trained: Mapping[str, Mapping[str, Any]],
    output: Path,
    resolution: int | None = None,
) -> dict[str, dict[str, float]]:
    """Base model against adapters on the same prompts and seeds: a table and a grid in `output`.

    `trained`: {what to call it: {"folder": where it is saved, "parameters": their number, "bytes": of the file}}.
    `resolution`: side of the pictures; None: the pipeline's own.

    Returns {"base model" or name: {"subject", "background"}}: shares of right images.
    """
    from examples.emoji_sd.judge import Judge, background_colour

    try:
        judge = Judge.load()
    except FileNotFoundError as error:
        folders = ", ".join(str(one["folder"]) for one in trained.values())
        raise TrainingError(
            f"What was trained is saved in {folders}, but the judge is missing ({error.filename}): take "
            "examples/assets/ from the repository."
        ) from error
    concept = subjects()[subject]["concept"]
    prompts = prompts_of(subject, prompt)
    pairs = [(colour, prompt, seed) for colour, prompt in prompts.items() for seed in SEEDS]
    size = (resolution, resolution)

    images, right = {}, {}
    for name in (BASE, *trained):
        pipe = load_pipeline(pipeline)
        if name != BASE:
            adapters.load(pipe, trained[name]["folder"])
        with for_sampling(pipe):
            images[name] = sample(pipe, [p for _, p, _ in pairs], [s for *_, s in pairs], size, batch=28, **SAMPLER)
        best = judge.concept_scores(images[name]).argmax(1).tolist()
        found = background_colour(images[name])
        right[name] = {
            "subject": [judge.names[i] == concept for i in best],
            "background": [colour == f for (colour, *_), f in zip(pairs, found, strict=True)],
        }
    shares = {name: {what: sum(v) / len(v) for what, v in both.items()} for name, both in right.items()}
    table = in_columns(list(prompts), right, trained)
    instances = [open_image(path) for path in image_files(instance_images)]
    grid = show(instances, list(prompts), prompt, images, trained, output / "grid.png")
    for name, text in (("table.txt", table), ("table.json", json.dumps(shares, indent=1))):
        with aside(output / name) as temporary:
            temporary.write_text(text + "\n")
    print(
        f"\nBackgrounds that no instance image has, {len(SEEDS)} seeds each.  Right subject: {concept!r} is the first"
    )
    print(f"of {len(judge.names)} names for a judge that was trained apart; right background: the border's colour.")
    print(f"\n{table}\n")
    for name, one in trained.items():
        print(f"{name + ':':<10} {one['folder']}")
    print(f"{'table:':<10} {output / 'table.txt'}")
    print(f"{'grid:':<10} {grid}")
    return shares


def in_columns(colours: list[str], right: Mapping[str, Any], trained: Mapping[str, Mapping[str, Any]]) -> str:
    """A row a background, a column each for the base model and what was trained: right subjects, right backgrounds."""
    n, width = len(SEEDS), 26
    head = f"{'background':<12}" + "".join(f"{name:>{width}}" for name in right)
    kinds = f"{'':<12}" + f"{'subject':>{width - 12}}{'background':>12}" * len(right)
    lines = [head, kinds]
    for row, colour in enumerate(colours):
        part = slice(row * n, row * n + n)
        cells = "".join(
            f"{sum(r['subject'][part]):>{width - 14}}/{n}{sum(r['background'][part]):>10}/{n}" for r in right.values()
        )
        lines.append(f"{colour:<12}{cells}")
    whole = len(colours) * n
    cells = "".join(
        f"{sum(r['subject']):>{width - 15}}/{whole}{sum(r['background']):>9}/{whole}" for r in right.values()
    )
    lines.append(f"{'all':<12}{cells}")
    for what in ("parameters", "bytes"):
        numbers = ["" if name == BASE else f"{trained[name][what]:,}" for name in right]
        lines.append(f"{what:<12}" + "".join(f"{number:>{width}}" for number in numbers))
    return "\n".join(lines)


def show(
    instances: list[Image.Image],
    colours: list[str],
    prompt: str,
    images: Mapping[str, list[Image.Image]],
    trained: Mapping[str, Mapping[str, Any]],
    path: Path,
) -> Path:
    """The grid: instance images first, then two rows each for the base model and what was trained, a column a
    background, the same two seeds for all."""
    n = len(SEEDS)
    rows = [(f"pictures to learn from:\n{prompt}", instances[: len(colours)])]
    for name, drawn in images.items():
        size = (
            f"{trained[name]['parameters']:,} parameters\n{trained[name]['bytes'] / 1000:,.0f} kB"
            if name != BASE
            else ""
        )
        for seed in range(2):
            rows.append((f"{name}\n{size}" if seed == 0 else "", [drawn[c * n + seed] for c in range(len(colours))]))
    with aside(path) as temporary:
        labelled_rows(rows).save(temporary)
    return path

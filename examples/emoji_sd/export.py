"""Assemble the parts to a StableDiffusionPipeline folder, fp16 safetensors, and draw with it."""

import copy
import json
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from .unet import build_scheduler

CONCEPTS_FILE = "concepts.json"  # the names that the pipeline has learned


def export(folder: Path, vae, text_encoder, tokenizer, unet, concepts: list[str]) -> None:
    """Write the pipeline and the names of what it draws to a temporary name first, then put it in place of `folder`."""
    pipeline = StableDiffusionPipeline(
        vae=copy.deepcopy(vae), text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=build_scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    pipeline.to(torch.float16).save_pretrained(temporary, safe_serialization=True)
    for path in temporary.glob("*/config.json"):
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)  # where a part was loaded from: a folder of this machine
        if (
            "dtype" in config
        ):  # with none named, from_pretrained takes this for transformers' models, fp32 for diffusers'
            config["dtype"] = "float32"
        path.write_text(json.dumps(config, indent=2) + "\n")
    (temporary / CONCEPTS_FILE).write_text(json.dumps(concepts) + "\n")
    if folder.exists():
        made = ("model_index.json", CONCEPTS_FILE)
        kept = [p for p in folder.iterdir() if p.is_file() and p.name not in made]  # model card, log, grid
        for path in kept:
            shutil.copy2(path, temporary / path.name)
        old = folder.with_name(folder.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
        os.replace(temporary, folder)
        shutil.rmtree(old)
    else:
        os.replace(temporary, folder)


def concepts(folder: Path) -> list[str]:
    """The names that the pipeline in `folder` has learned."""
    return json.loads((Path(folder) / CONCEPTS_FILE).read_text())


def load(folder: Path) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(pipeline, prompts: list[str], seed: int = 0, steps: int = 30, guidance: float = 4.0, batch: int = 25):
    """PIL pictures, one a prompt; each has its own seed, so the batch size changes nothing."""
    images = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(part))]
        images += pipeline(part, num_inference_steps=steps, guidance_scale=guidance, generator=generators).images
    return images


def grid(images: list, columns: int) -> Image.Image:
    arrays = [np.asarray(image) for image in images]
    arrays += [np.full_like(arrays[0], 255)] * (-len(arrays) % columns)
    rows = [np.concatenate(arrays[i : i + columns], 1) for i in range(0, len(arrays), columns)]
    return Image.fromarray(np.concatenate(rows))

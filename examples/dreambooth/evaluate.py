# SPDX-License-Identifier: Apache-2.0
"""Pictures: fixed-seed samples, grids, and what trackers get of them."""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import make_image_grid
from packaging.version import Version
from PIL import Image, ImageDraw, ImageFont

from . import DivergedError, TrainingError, one_line
from .families import family_of
from .files import TEMPORARY, remove, replace_folder
from .quantized import is_quantized

SIDES, AREAS = 16, 64  # times the pipeline's own: more is a slip
# the argument's name in from_pretrained
DTYPE = "dtype" if Version(diffusers.__version__) >= Version("0.42") else "torch_dtype"


def read_index(path: str, revision: str | None = None, cache_dir: str | None = None) -> dict[str, Any]:
    """The model_index.json of a pipeline, which names its class and components.

    Raises:
        TrainingError: if there is none at `path`.
    """
    looks_local = os.path.isdir(path) or path.startswith((".", "/", "~")) or path.count("/") > 1
    if looks_local and not os.path.isfile(os.path.join(path, "model_index.json")):
        what = "has no model_index.json" if os.path.isdir(path) else "does not exist"
        raise TrainingError(f"{path} {what}: expected the folder of a diffusers pipeline, or an id on the Hub.")
    given = {k: v for k, v in (("revision", revision), ("cache_dir", cache_dir)) if v is not None}
    try:
        return dict(DiffusionPipeline.load_config(path, **given))
    except (OSError, ValueError) as error:
        raise TrainingError(f"{path} could not be loaded as a diffusers pipeline: {one_line(error)}") from error


def load_pipeline(
    path: str,
    dtype: torch.dtype = torch.float32,
    *,
    vae_dtype: torch.dtype | None = None,
    quantize: Callable[..., Any] | None = None,
    **kwargs: Any,
) -> Any:
    """A pipeline of one of the known families.

    `vae_dtype`: of its VAE, where that differs. `quantize(denoiser, text encoders)`: the diffusers config by which
    these components are loaded in a few bits.

    Raises:
        TrainingError: if there is none at `path`, it is of another kind, or lacks a component.
    """
    index = read_index(path, kwargs.get("revision"), kwargs.get("cache_dir"))
    family = family_of(index, path)
    kwargs = {k: v for k, v in kwargs.items() if v is not None}
    if "variant" not in kwargs and (variant := only_variant(Path(path))):
        print(f"note: {path} has weights of the variant {variant} only, which are taken.")
        kwargs["variant"] = variant
    if "safety_checker" in index:
        kwargs |= {"safety_checker": None, "requires_safety_checker": False}
    # what was left out on purpose, T5 of SD3 for one, has to be so again
    kwargs |= {name: None for name, part in index.items() if isinstance(part, list) and not any(part)}
    try:
        if quantize is not None:
            encoders = [name for name, part in index.items() if name.startswith("text_encoder") and any(part)]
            kwargs["quantization_config"] = quantize(family.denoiser, encoders)
        # at once in its dtype: a large model would not fit in another one
        kwargs[DTYPE] = {"default": dtype, "vae": vae_dtype or dtype}
        pipe = DiffusionPipeline.from_pretrained(path, **kwargs)
    except (OSError, ValueError, ImportError) as error:  # the last: a component needs a package that is missing
        raise TrainingError(f"{path} could not be loaded as a diffusers pipeline: {one_line(error)}") from error
    for name, model in pipe.components.items():
        if isinstance(model, torch.nn.Module) and not is_quantized(model):
            model.to((vae_dtype or dtype) if name == "vae" else dtype)  # some keep parts in another one
    return pipe


def only_variant(folder: Path) -> str | None:
    """The variant, "fp16" for one, of a local folder's weights where some component has no plain ones."""
    weights = re.compile(
        r"(?:diffusion_pytorch_model|model|pytorch_model)(?:\.(\w+))?(?:-\d+-of-\d+)?\.(?:safetensors|bin)"
    )
    by_folder: dict[Path, set[str | None]] = {}
    for path in (*folder.glob("*"), *folder.glob("*/*")):
        if found := weights.fullmatch(path.name):
            by_folder.setdefault(path.parent, set()).add(found[1])
    return next((min(names) for names in by_folder.values() if None not in names), None)


def base_pipeline(
    path: str,
    vae: str | None = None,
    *,
    revision: str | None = None,
    variant: str | None = None,
    cache_dir: str | None = None,
    dtype: torch.dtype = torch.float32,
    vae_dtype: torch.dtype | None = None,
    quantize: Callable[..., Any] | None = None,
) -> Any:
    """The pipeline at `path`, with the VAE at `vae`, if that is given; see `load_pipeline`.

    Raises:
        TrainingError: if one of them cannot be loaded.
    """
    pipe = load_pipeline(
        path, dtype, vae_dtype=vae_dtype, quantize=quantize, revision=revision, variant=variant, cache_dir=cache_dir
    )
    if vae:
        try:
            pipe.vae = type(pipe.vae).from_pretrained(vae, cache_dir=cache_dir, variant=only_variant(Path(vae)))
            pipe.vae.to(vae_dtype or dtype)
        except (OSError, ValueError, RuntimeError) as error:
            raise TrainingError(
                f"--pretrained_vae_model_name_or_path {vae}: expected the folder of an {type(pipe.vae).__name__}, or "
                f"its id on the Hub: {one_line(error)}"
            ) from error
    return pipe


@contextlib.contextmanager
def for_sampling(pipe: Any) -> Iterator[Any]:
    """Evaluation mode and no progress bar; the modes are put back on exit."""
    modules = [m for m in pipe.components.values() if isinstance(m, torch.nn.Module)]
    training = [m.training for m in modules]
    pipe.set_progress_bar_config(disable=True)
    for module in modules:
        module.eval()
    try:
        yield pipe
    finally:
        for module, was in zip(modules, training, strict=True):
            module.train(was)


def check_area(pipe: Any, usual: int, sides: Mapping[str, int | None]) -> None:
    """That drawing ends: its time grows with the square of the area, and no pipeline draws well far from its own size.

    Args:
        usual: the pipeline's side, in pixels: of 512 it may be asked for 4096 x 4096, of 1024 for 8192 x 8192.
        sides: {flag: pixels}; one is that of a square, and None is `usual`.

    Raises:
        TrainingError: names the flag and the largest size.
    """
    made_for = f"a {type(pipe).__name__} made for {usual} x {usual}"
    for flag, value in sides.items():
        if value is not None and value > SIDES * usual:
            raise TrainingError(f"{flag} {value}: expected at most {SIDES * usual}, for {made_for}.")
    found = [value or usual for value in sides.values()]
    if found[0] * found[-1] > AREAS * usual**2:
        said = " ".join(f"{flag} {value}" for flag, value in zip(sides, found, strict=True))
        side = math.isqrt(AREAS) * usual
        raise TrainingError(
            f"{said}: expected at most {AREAS * usual**2:,} pixels, as {side} x {side}, for {made_for}."
        )


def check_steps(pipe: Any, flag: str, steps: int) -> None:
    """Raises TrainingError if there are fewer time steps."""
    most = pipe.scheduler.config.num_train_timesteps
    if steps > most:
        raise TrainingError(f"{flag} {steps}: expected at most {most}, all time steps that there are.")


@contextlib.contextmanager
def exact_decoding(vae: torch.nn.Module) -> Iterator[list[bool]]:
    """Let the VAE decode in its own dtype and outside of autocast: SDXL's overflows in half precision, to black images.

    Gives a list that has, for every image decoded in the block, whether all of it is finite.
    """
    finite: list[bool] = []
    decode = vae.decode

    def in_its_own_dtype(latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(latents.device.type, enabled=False):
            decoded = decode(latents.to(vae.dtype), *args, **kwargs)
        finite.extend(decoded[0].isfinite().flatten(1).all(1).tolist())
        return decoded

    vae.decode = in_its_own_dtype
    try:
        yield finite
    finally:
        del vae.decode  # the attribute of this object; the class has its own


@torch.no_grad()
def sample(
    pipe: Any,
    prompts: list[str],
    seeds: list[int],
    size: tuple[int | None, int | None],
    batch: int = 4,
    say: Callable[[str], None] | None = None,
    negative_prompt: str | None = None,
    **kwargs: Any,
) -> list[Image.Image | None]:
    """One image per pair of prompt and seed. Each has its own generator, so batches change nothing but rounding.

    Raises:
        DivergedError: if an image is not finite; with `say` that is only said, and the image is None.
    """
    images: list[Image.Image | None] = []
    for start in range(0, len(prompts), batch):
        part = slice(start, start + batch)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[part]]
        with exact_decoding(pipe.vae) as finite:
            per_image = {"prompt": prompts[part], "generator": generators}
            if negative_prompt is not None:
                per_image["negative_prompt"] = [negative_prompt] * len(generators)
            drawn = pipe(**per_image, height=size[0], width=size[1], **kwargs).images
        images += [image if whole else None for image, whole in zip(drawn, finite, strict=True)]
    black = [i for i, image in enumerate(images) if image is None]
    if black:
        first = black[0]
        message = (
            f"{len(black)} of {len(images)} images have values that are not finite, the first with seed "
            f"{seeds[first]} for {prompts[first]!r}, and would be black: not saved. Instead of fp16, try bf16 or fp32."
        )
        if say is None:
            raise DivergedError(message)
        say(f"warning: {message}")
    return images


def validation(
    pipe: Any, prompts: list[str], count: int, seed: int, size: tuple[int, int], autocast: Any = None, **settings: Any
) -> list[Image.Image | None]:
    """`count` images of each prompt, with the same seeds every time; None for one that is not finite, which is said.

    `settings`: more of the pipeline's arguments.
    """
    seeds = [seed + i for _ in prompts for i in range(count)]
    with for_sampling(pipe), autocast or contextlib.nullcontext():
        return sample(pipe, repeat(prompts, count), seeds, size, say=print, **settings)


def repeat(prompts: list[str], times: int) -> list[str]:
    return [prompt for prompt in prompts for _ in range(times)]


def track(accelerator: Any, phase: str, images: list[Image.Image | None], prompts: list[str], step: int) -> None:
    """Hand images to the trackers that show images."""
    prompts = [prompt for image, prompt in zip(images, prompts, strict=True) if image]
    images = [image for image in images if image]
    for tracker in accelerator.trackers if images else ():
        if tracker.name == "tensorboard":
            tracker.writer.add_images(phase, np.stack([np.asarray(i) for i in images]), step, dataformats="NHWC")
        elif tracker.name == "wandb":
            import wandb

            shown = [wandb.Image(image, caption=prompt) for image, prompt in zip(images, prompts, strict=True)]
            tracker.log({phase: shown}, step=step)


def save_images(images: list[Image.Image | None], folder: Path, columns: int) -> Path:
    """The images and their grid in a folder, whole or not at all; returns the grid."""
    new = folder.with_name(f"{TEMPORARY}{folder.name}")
    remove(new)
    new.mkdir(parents=True)
    for i, image in enumerate(images):
        if image:
            image.save(new / f"{i:02d}.png")
    size = next((image.size for image in images if image), (8, 8))
    cells = [image or Image.new("RGB", size, "grey") for image in images]
    make_image_grid(cells, rows=len(cells) // columns, cols=columns).save(new / "grid.png")
    replace_folder(new, folder)
    return folder / "grid.png"


def labelled_rows(rows: list[tuple[str, list[Image.Image]]], side: int = 128, label: int = 170) -> Image.Image:
    """Rows of pictures with a text before each; small pictures are enlarged smoothly."""
    columns = max(len(images) for _, images in rows)
    lines = []
    for text, images in rows:
        line = Image.new("RGB", (label + columns * side, side), "white")
        ImageDraw.Draw(line).multiline_text((6, side // 3), text, fill="black", font=ImageFont.load_default(13))
        for i, image in enumerate(images):
            line.paste(image.resize((side - 2, side - 2), Image.Resampling.BICUBIC), (label + i * side, 1))
        lines.append(line)
    return make_image_grid(lines, rows=len(lines), cols=1)

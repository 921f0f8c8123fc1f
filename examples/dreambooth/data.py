# SPDX-License-Identifier: Apache-2.0
"""Images and captions: read, cropped, put into batches.

Everything random about a sample comes from its number, counted over the whole training and over all processes. So the
data position is one number: a resumed run continues where the other stopped, and several processes together see what
one process with the same global batch sees.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.training_utils import find_nearest_bucket, generate_aspect_ratio_buckets, parse_buckets_string
from PIL import Image, ImageOps
from torch.utils.data import Dataset, Sampler

from . import TrainingError, one_line
from .captions import Captions
from .disk_cache import DiskCache, Stored, of_image
from .images import SUFFIXES, UNREADABLE, alterations, as_rgb, image_files, open_image, read_image

Size = tuple[int, int]  # height, width
Encode = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]  # Family.encode_image
Latents = tuple[torch.Tensor, torch.Tensor, Size]  # mean, standard deviation, corner of the crop
LARGEST = 2**27  # pixels of a resized image before it is cropped; some 400 MB


@dataclass
class Picture:
    """One image with its caption. `latents`: by (size, flip), where cached."""

    load: Callable[[], Image.Image]
    name: str
    caption: str
    size: Size
    bucket: int = 0
    latents: dict[tuple[Size, bool], Latents | Stored] = field(default_factory=dict)


# -- reading ---------------------------------------------------------------------------------------------------------


def read_folder(
    folder: str | Path,
    default_caption: str | None,
    caption_column: str | None = None,
    *,
    captions: bool = True,
    say: Callable[[str], None] = print,
) -> list[Picture]:
    """Images with their captions, or `default_caption`; with `captions=False` all have that.

    What is in the folder and not used, or used in another form than it has, is said once, with a count.
    """
    folder = Path(folder)
    if not folder.exists():
        raise TrainingError(f"{folder} does not exist: --instance_data_dir expects a folder of images, or one image.")
    files = image_files(folder)
    if not files:
        inside = [p.name for p in sorted(folder.iterdir()) if p.is_dir() and image_files(p)]
        hint = f" Its folders {', '.join(inside)} have some: choose one of them." if inside else ""
        raise TrainingError(
            f"{folder} has no images, nor has {folder / 'input'}; expected files ending in "
            f"{', '.join(sorted(SUFFIXES))}.{hint}"
        )
    remarks: dict[str, list[str]] = {}
    written = Captions(files, caption_column) if captions else None
    pictures = []
    for path in files:
        image, altered = read_image(path)
        for what in altered:
            remarks.setdefault(f"images {what}", []).append(path.name)
        caption = (written.of.get(path) if written else None) or default_caption
        pictures.append(Picture(functools.partial(open_image, path), str(path), caption, size_of(image)))
    if written:
        remarks |= written.remarks
        without = [path.name for path in files if path not in written.of]
        if written.used and without and default_caption:
            remarks["images without a caption, which get the prompt for all"] = without
    if folder.is_dir():
        used = {*files, *(written.used if written else ())}
        others = sorted(p for p in files[0].parent.iterdir() if p not in used)
        if files[0].parent != folder:  # the images are those of its `input` folder
            others += sorted(p for p in folder.iterdir() if p != files[0].parent)
        remarks["folders left aside"] = [p.name for p in others if p.is_dir()]
        remarks["other files left aside"] = [p.name for p in others if not p.is_dir()]
    say_remarks(str(folder), remarks, say)
    return check_captions(pictures)


def say_remarks(where: str, remarks: Mapping[str, Sequence[str]], say: Callable[[str], None]) -> None:
    """One line: how many of what, and the first names."""
    parts = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in remarks.items()
        if names
    ]
    if parts:
        say(f"note: {where}: {'; '.join(parts)}.")


@dataclass(frozen=True)
class DatasetImage:
    """Loads an image of a dataset; unlike a function made in place, a worker process can be sent it."""

    dataset: Any
    name: str
    column: str
    index: int

    def read(self) -> tuple[Image.Image, list[str]]:
        try:
            image = self.dataset[self.index][self.column]
            if isinstance(image, Image.Image):
                return as_rgb(image), alterations(image)
        except UNREADABLE as error:
            raise TrainingError(
                f"{self.name}[{self.index}] cannot be read as an image ({error}). Replace it, or remove it from the "
                "dataset."
            ) from error
        raise TrainingError(f"Column {self.column!r} holds {type(image).__name__}, not images; set --image_column.")

    def __call__(self) -> Image.Image:
        return self.read()[0]


def read_dataset(
    name: str,
    *,
    config: str | None = None,
    split: str = "train",
    cache_dir: str | None = None,
    image_column: str = "image",
    caption_column: str | None = None,
    default_caption: str | None = None,
    say: Callable[[str], None] = print,
) -> list[Picture]:
    """Images and captions of a dataset on the Hub or on disk."""
    try:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise TrainingError(
            f"--dataset_name needs a package that is missing ({error}): pip install datasets"
        ) from error

    try:
        data = load_dataset(name, config, split=split, cache_dir=cache_dir)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise TrainingError(
            f"--dataset_name {name} (split {split!r}) could not be loaded: {one_line(error)}. Expected an id on the "
            "Hub or a folder, and one of its splits in --dataset_split."
        ) from error
    for flag, column in (("image_column", image_column), ("caption_column", caption_column)):
        if column is not None and column not in data.column_names:
            raise TrainingError(f"--{flag} {column!r}: the dataset's columns are {', '.join(data.column_names)}.")
    pictures: list[Picture] = []
    remarks: dict[str, list[str]] = {}
    captions = data[caption_column] if caption_column else [None] * len(data)
    for i, caption in enumerate(captions):
        load = DatasetImage(data, name, image_column, i)
        image, altered = load.read()
        for what in altered:
            remarks.setdefault(f"images {what}", []).append(f"[{i}]")
        if not isinstance(caption, str | None):
            raise TrainingError(f"{name}[{i}]: --caption_column {caption_column!r} is {caption!r}, not a text.")
        pictures.append(Picture(load, f"{name}[{i}]", caption or default_caption, size_of(image)))
    if not pictures:
        raise TrainingError(f"--dataset_name {name}: split {split!r} is empty.")
    say_remarks(name, remarks, say)
    return check_captions(pictures)


def check_captions(pictures: list[Picture]) -> list[Picture]:
    for picture in pictures:
        if not picture.caption:
            raise TrainingError(
                f"{picture.name} has no caption. Give --instance_prompt for all images, a .txt file beside the image, "
                "a metadata.jsonl, or --caption_column."
            )
    return pictures


def size_of(image: Image.Image) -> Size:
    return image.height, image.width


# -- shapes ----------------------------------------------------------------------------------------------------------


def choose_buckets(text: str | None, resolution: int, multiple: int) -> list[Size]:
    """The shapes (height, width) that images are brought to: the square, a list, or a ladder of aspect ratios.

    `multiple`: what the pipeline needs sides to be a multiple of.
    """
    if text is None:
        buckets = [(resolution, resolution)]
    elif text == "auto":
        buckets = generate_aspect_ratio_buckets(resolution, divisibility=multiple)
    else:
        try:
            buckets = parse_buckets_string(text)
        except ValueError as error:
            raise TrainingError(
                f'--aspect_ratio_buckets {text!r}: {error} Expected "auto" or e.g. "768,512;512,768".'
            ) from error
    for bucket in buckets:
        if bucket[0] % multiple or bucket[1] % multiple:
            raise TrainingError(
                f"Image size {bucket[0]}x{bucket[1]}: this pipeline needs both sides to be multiples of {multiple}; "
                "set --resolution or --aspect_ratio_buckets accordingly."
            )
    return buckets


def enlarged(pictures: Sequence[Picture], buckets: Sequence[Size]) -> list[str]:
    """Names of the pictures that are smaller than the shape that they are brought to."""
    return [
        Path(p.name).name for p in pictures if any(own < to for own, to in zip(p.size, buckets[p.bucket], strict=True))
    ]


def fit(
    image: Image.Image, size: Size, corner: tuple[float, float] | None, flip: bool, resample: str
) -> tuple[torch.Tensor, Size]:
    """Resize to cover `size` and crop. `corner`: where, as fractions (None: the centre).

    Returns the pixels, 3 x height x width from -1 to 1, and the crop's top left corner in the resized image.
    """
    height, width = size
    scale = max(height / image.height, width / image.width)
    covering = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    free = covering[1] - height, covering[0] - width
    top, left = (
        (round(f / 2) for f in free)
        if corner is None
        else (int(c * (f + 1)) for c, f in zip(corner, free, strict=True))
    )
    filter_ = Image.Resampling[resample.upper()]
    if covering[0] * covering[1] <= LARGEST:
        image = image.resize(covering, filter_)
        image = ImageOps.mirror(image) if flip else image
        image = image.crop((left, top, left + width, top + height))
    else:  # a long strip: only the part that is wanted
        x = covering[0] - left - width if flip else left
        box = (x / covering[0], top / covering[1], (x + width) / covering[0], (top + height) / covering[1])
        sides = image.width, image.height
        image = image.resize(
            (width, height), filter_, tuple(min(f * s, s) for f, s in zip(box, sides * 2, strict=True))
        )
        image = ImageOps.mirror(image) if flip else image
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 127.5 - 1
    return pixels, (top, left)


# -- samples ---------------------------------------------------------------------------------------------------------


def sample_rng(seed: int, number: int, purpose: int) -> np.random.Generator:
    """The random generator of one sample for one purpose."""
    return np.random.default_rng([seed, number, purpose])


def torch_rng(seed: int, number: int, purpose: int) -> torch.Generator:
    """The same for torch, on the CPU, so that it does not depend on the device."""
    key = np.random.SeedSequence([seed, number, purpose]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(key & np.uint64(2**63 - 1)))


AUGMENT, NOISE, CLASS_AUGMENT, CLASS_NOISE, DROPOUT, ORDER, CACHE = range(7)


class DreamBoothDataset(Dataset):
    """Samples by (index of the picture, number of the sample). `interpolation`: for resizing, a name of PIL's."""

    def __init__(
        self,
        pictures: list[Picture],
        buckets: list[Size],
        class_pictures: Sequence[Picture] = (),
        *,
        seed: int = 0,
        center_crop: bool = False,
        random_flip: bool = False,
        caption_dropout: float = 0.0,
        interpolation: str = "lanczos",
    ):
        self.pictures, self.class_pictures, self.buckets = pictures, list(class_pictures), buckets
        self.seed, self.center_crop, self.random_flip = seed, center_crop, random_flip
        self.caption_dropout, self.interpolation = caption_dropout, interpolation
        shapes = list(buckets)
        for picture in pictures:
            picture.bucket = find_nearest_bucket(*picture.size, shapes)

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        index, number = key
        picture = self.pictures[index]
        rng = sample_rng(self.seed, number, AUGMENT)
        sample = {"instance": self.view(picture, self.buckets[picture.bucket], rng)}
        sample["instance"]["noise_key"] = (number, NOISE)
        if rng.random() < self.caption_dropout:
            sample["instance"]["caption"] = ""
        if self.class_pictures:
            rng = sample_rng(self.seed, number, CLASS_AUGMENT)
            chosen = self.class_pictures[rng.integers(len(self.class_pictures))]
            sample["class"] = self.view(chosen, self.buckets[picture.bucket], rng)
            sample["class"]["noise_key"] = (number, CLASS_NOISE)
        return sample

    def view(self, picture: Picture, size: Size, rng: np.random.Generator) -> dict[str, Any]:
        corner = None if self.center_crop else tuple(rng.random(2))
        flip = bool(self.random_flip and rng.random() < 0.5)
        view = {"caption": picture.caption, "original_size": picture.size, "target_size": size}
        if picture.latents:
            found = picture.latents[size, flip]
            if isinstance(found, Stored):
                kept = found.read()
                found = kept["mean"], kept["std"], tuple(kept["crop"].tolist())
            view["mean"], view["std"], view["crop"] = found
        else:
            view["pixels"], view["crop"] = fit(picture.load(), size, corner, flip, self.interpolation)
        return view

    @torch.no_grad()
    def cache_latents(self, encode: Encode, progress: Callable, disk: DiskCache | None = None) -> None:
        """Encode every picture (and its mirror image, if images are flipped) once; random crops stay as drawn here.

        `disk`: where they are kept, if not in memory.
        """
        used = {self.buckets[picture.bucket] for picture in self.pictures}
        wanted = [(p, {self.buckets[p.bucket]}) for p in self.pictures] + [(p, used) for p in self.class_pictures]
        flips = (False, True) if self.random_flip else (False,)
        for i, (picture, sizes) in enumerate(progress(wanted)):
            corner = None if self.center_crop else tuple(sample_rng(self.seed, i, CACHE).random(2))
            image = picture.load()
            for size, flip in itertools.product(sizes, flips):
                key = (of_image(image), size, flip, corner, self.interpolation) if disk else ()
                found = disk.get(*key) if disk else None
                if found is None:
                    pixels, crop = fit(image, size, corner, flip, self.interpolation)
                    mean, std = encode(pixels[None])
                    found = mean[0].cpu(), std[0].cpu(), crop
                    if disk:
                        found = disk.put({"mean": mean[0], "std": std[0], "crop": torch.tensor(crop)}, *key)
                picture.latents[size, flip] = found


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Instances first, then the class images, so that one forward pass serves both."""
    views = [s["instance"] for s in samples] + [s["class"] for s in samples if "class" in s]
    tensors = {k: torch.stack([v[k] for v in views]) for k in ("pixels", "mean", "std") if k in views[0]}
    lists = {k: [v[k] for v in views] for k in ("caption", "original_size", "crop", "target_size", "noise_key")}
    return tensors | lists


@torch.no_grad()
def latents_of(batch: dict[str, Any], encode: Encode, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of the latents, cached or computed."""
    mean, std = (batch["mean"], batch["std"]) if "mean" in batch else encode(batch["pixels"])
    return mean.to(device), std.to(device)


class Batches(Sampler):
    """The batches of one process, from micro-step `start` to micro-step `stop`.

    A global batch is what all processes take in one micro-step; all of it has one shape. The last batch of a shape in
    an epoch is filled up with pictures of the same shape.
    """

    def __init__(
        self, dataset: DreamBoothDataset, batch_size: int, process: int, processes: int, repeats: int, seed: int
    ):
        self.batch_size, self.process, self.seed, self.repeats = batch_size, process, seed, repeats
        self.global_batch = batch_size * processes
        self.groups: dict[int, list[int]] = {}
        for index, picture in enumerate(dataset.pictures):
            self.groups.setdefault(picture.bucket, []).append(index)
        self.per_epoch = sum(math.ceil(len(g) * repeats / self.global_batch) for g in self.groups.values())
        self.start, self.stop = 0, 0
        self._epoch: tuple[int, list[list[int]]] | None = None

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for micro_step in range(self.start, self.stop):
            epoch, position = divmod(micro_step, self.per_epoch)
            indices = self.epoch(epoch)[position]
            first = self.process * self.batch_size
            numbers = range(micro_step * self.global_batch, (micro_step + 1) * self.global_batch)
            yield list(zip(indices, numbers, strict=True))[first : first + self.batch_size]

    def epoch(self, epoch: int) -> list[list[int]]:
        """The global batches of an epoch, in order."""
        if self._epoch is None or self._epoch[0] != epoch:
            rng, batches = sample_rng(self.seed, epoch, ORDER), []
            for group in self.groups.values():
                wanted = math.ceil(len(group) * self.repeats / self.global_batch) * self.global_batch
                rounds = math.ceil(wanted / len(group))
                order = np.concatenate([rng.permutation(group) for _ in range(rounds)])[:wanted]
                batches += order.reshape(-1, self.global_batch).tolist()
            if len(self.groups) > 1:  # with one shape the order is random already, whatever the batch size
                batches = [batches[i] for i in rng.permutation(len(batches))]
            self._epoch = epoch, batches
        return self._epoch[1]

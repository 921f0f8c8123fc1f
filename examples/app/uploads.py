# SPDX-License-Identifier: Apache-2.0
"""Pictures that a visitor uploads: checked, then copied into a folder of their own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from examples.dreambooth import TrainingError
from examples.dreambooth.data import UNREADABLE, open_image

MAX_PICTURES = 8
MAX_BYTES = 20 * 2**20  # of one file
MAX_PIXELS = 50_000_000  # of one picture, as its header says
MIN_SIDE = 32


def take(files: Sequence[str | Path], folder: Path) -> list[Path]:
    """Check all pictures, then write them as RGB PNGs into `folder` (new or empty); returns their paths.

    Raises:
        TrainingError: if there are none or more than `MAX_PICTURES`, or one is too large, too small or no picture.
            Nothing is written then.
    """
    if not 1 <= len(files) <= MAX_PICTURES:
        raise TrainingError(f"Expected 1 to {MAX_PICTURES} pictures, got {len(files)}.")
    pictures = [_checked(Path(file)) for file in files]
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, picture in enumerate(pictures):
        paths.append(folder / f"{number:02d}.png")
        picture.save(paths[-1])
    return paths


def is_picture(path: Path) -> bool:
    """Whether the file's header is a picture's; no pixels are read."""
    try:
        with Image.open(path):
            return True
    except UNREADABLE:
        return False


def _checked(path: Path) -> Image.Image:
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise TrainingError(
            f"{path.name} has {size / 2**20:.0f} MiB; expected at most {MAX_BYTES >> 20} MiB a picture."
        )
    try:
        with Image.open(path) as header:  # reads no pixels yet
            width, height = header.size
    except UNREADABLE as error:
        raise TrainingError(f"{path.name} is no picture that can be read: expected PNG, JPEG or WebP.") from error
    if width * height > MAX_PIXELS:
        raise TrainingError(
            f"{path.name} is {width} x {height} pixels; expected at most {MAX_PIXELS // 10**6} million. Scale it down."
        )
    if min(width, height) < MIN_SIDE:
        raise TrainingError(f"{path.name} is {width} x {height} pixels; expected at least {MIN_SIDE} on each side.")
    return open_image(path)

# SPDX-License-Identifier: Apache-2.0
"""Image files of every kind as RGB with 8 bits: right, or refused by name."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from . import TrainingError

with contextlib.suppress(ImportError):  # optional: how PIL reads the photos of newer telephones
    import pillow_heif

    pillow_heif.register_heif_opener()

# what counts as an image: those that PIL cannot read (yet) are refused, never left out
SUFFIXES = frozenset((
    ".apng", ".avif", ".bmp", ".dib", ".gif", ".heic", ".heif", ".hif", ".ico", ".j2k", ".jfif", ".jp2", ".jpe",
    ".jpeg", ".jpg", ".jpx", ".jxl", ".mpo", ".pbm", ".pcx", ".pfm", ".pgm", ".png", ".pnm", ".ppm", ".psd", ".qoi",
    ".sgi", ".tga", ".tif", ".tiff", ".webp",
))  # fmt: skip
# a camera's raw files are TIFFs to PIL, which would take the small preview in them
RAW = frozenset((".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".rw2"))
PLUGINS = {".heic": "pillow-heif", ".heif": "pillow-heif", ".hif": "pillow-heif", ".jxl": "pillow-jxl-plugin"}
# what PIL raises for files that are no images, are cut off, or are larger than its limit
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)
BRIGHT = 32  # of floats up to 255: a picture whose brightest point is below that is hardly one
PLAIN = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")  # modes whose colours RGB holds as they are


def open_image(path: Path) -> Image.Image:
    """The image as RGB, upright, transparent parts white.

    Raises:
        TrainingError: names a file that is no image.
    """
    return read_image(path)[0]


def read_image(path: Path) -> tuple[Image.Image, list[str]]:
    """`open_image`, and what was altered on the way (see `alterations`)."""
    try:
        if path.suffix.lower() in RAW:
            raise ValueError("a camera's raw file; convert it to PNG or JPEG")
        with Image.open(path) as image:
            return as_rgb(image), alterations(image)
    except UNREADABLE as error:
        plugin = PLUGINS.get(path.suffix.lower())
        advice = (
            f"pip install {plugin}, or convert it to PNG or JPEG."
            if plugin
            else "Replace it, or remove it from the folder."
        )
        raise TrainingError(f"{path} cannot be read as an image ({error}). {advice}") from error


def alterations(image: Image.Image) -> list[str]:
    """What `as_rgb` changes about an opened image beyond its storage, as phrases for a message."""
    found = []
    if getattr(image, "n_frames", 1) > 1:
        found.append("with several frames, of which the first is used")
    if image.getexif().get(0x0112, 1) in range(2, 9):
        found.append("turned upright as their EXIF data say")
    if image.has_transparency_data and image.convert("RGBA").getextrema()[3][0] < 255:
        found.append("with transparent parts, which become white")
    if is_deep(image):
        found.append("with more than 8 bits a channel, scaled to 8")
    elif image.mode not in PLAIN:
        found.append(f"converted from {image.mode} to RGB")
    return found


def as_rgb(image: Image.Image) -> Image.Image:
    """The image as RGB, upright, transparent parts white, its first frame.

    Raises:
        ValueError: if its values are of no range that is known.
    """
    image = ImageOps.exif_transpose(image)
    if is_deep(image):
        image = eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def is_deep(image: Image.Image) -> bool:
    """Whether PIL's own conversion to RGB would cut the values off at 255."""
    return image.mode.startswith(("I", "F"))


def eight_bits(image: Image.Image) -> Image.Image:
    """Grey with 16 or 32 bits, whole numbers or floats, with 8: which range it has follows from the largest value."""
    values = np.asarray(image).astype(np.float64)
    low, high = values.min(), values.max()
    between = image.mode == "F" and 1 < high < BRIGHT  # light beyond white, or a picture that is nearly black
    if not (np.isfinite(values).all() and 0 <= low and high <= 65535) or between:
        raise ValueError(f"its values go from {low:g} to {high:g}; expected 0 to 1, 255 or 65535: save it with 8 bits")
    if image.mode.startswith("I;16") or high > 255:
        values = values // 257 if image.mode.startswith("I") else np.rint(values / 257)
    elif image.mode == "F":
        values = np.rint(values * 255 if high <= 1 else values)
    return Image.fromarray(values.astype(np.uint8))


def image_files(folder: Path) -> list[Path]:
    """The images of a folder: those in it or, if there are none, those in its `input` folder.

    Other folders, `generated` above all, are left alone.
    """
    if folder.is_file():
        return [folder]
    for place in (folder, folder / "input"):
        found = sorted(p for p in place.glob("*") if is_image(p))
        if found:
            return found
    return []


def is_image(path: Path) -> bool:
    """By name: also what turns out to be broken, so that it is refused and not left out."""
    return path.suffix.lower() in SUFFIXES | RAW and not path.name.startswith(".") and not path.is_dir()

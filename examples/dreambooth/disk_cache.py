# SPDX-License-Identifier: Apache-2.0
"""`--cache_to_disk`: what frozen models made of images and prompts, in files instead of memory, and for later runs."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from . import TrainingError
from .files import TEMPORARY

SAMPLED = 16  # numbers at both ends of every weight that a model is told by


@dataclass(frozen=True)
class Stored:
    """Tensors in a file, read when they are needed."""

    path: Path

    def read(self) -> dict[str, torch.Tensor]:
        try:
            return load_file(self.path)
        except (OSError, SafetensorError) as error:
            raise TrainingError(f"{self.path} cannot be read ({error}): delete it, and it is made again.") from error


class DiskCache:
    """Tensors by what they follow from: another model, precision, image or setting is another file.

    `folder`: made if it is missing. `models`: those that compute them. `settings`: whatever else they depend on.
    """

    def __init__(self, folder: str | Path, models: Iterable[nn.Module], *settings: Any):
        self.folder = Path(folder)
        self.mark = fingerprint(models) + repr(settings)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainingError(
                f"--cache_to_disk {folder}: expected a folder, which cannot be made: {error}."
            ) from error

    def path(self, *key: Any) -> Path:
        return self.folder / f"{hashlib.sha256((self.mark + repr(key)).encode()).hexdigest()[:40]}.safetensors"

    def get(self, *key: Any) -> Stored | None:
        path = self.path(*key)
        return Stored(path) if path.is_file() else None

    def put(self, tensors: Mapping[str, torch.Tensor], *key: Any) -> Stored:
        """Write them, whole or not at all; processes that do the same at once do not meet."""
        path = self.path(*key)
        temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
        try:
            save_file({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, temporary)
            os.replace(temporary, path)
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            raise TrainingError(
                f"--cache_to_disk {self.folder} cannot be written ({error}): free some space."
            ) from error
        return Stored(path)


def fingerprint(models: Iterable[nn.Module]) -> str:
    """By the ends of every weight, its name, shape and dtype: quick, and another training changes some of them."""
    digest = hashlib.sha256()
    for model in models:
        for name, tensor in model.state_dict().items():
            if isinstance(tensor, torch.Tensor):
                flat = tensor.detach().flatten()
                ends = torch.cat([flat[:SAMPLED], flat[-SAMPLED:]]).cpu().contiguous()
                digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
                digest.update(ends.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def of_image(image: Image.Image) -> str:
    """An image's content."""
    return hashlib.sha256(f"{image.mode}{image.size}".encode() + image.tobytes()).hexdigest()

# SPDX-License-Identifier: Apache-2.0
"""The base pipeline and its adapters: counted, loaded, drawn with."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from examples.dreambooth import TrainingError, adapters
from examples.dreambooth.arguments import adapter_config, parse_args
from examples.dreambooth.evaluate import for_sampling, load_pipeline, sample

from .training import targets

MAX_SIDE = 1024  # of pictures that the page draws
MAX_STEPS = 100


class Counter:
    """Trainable parameters of an adapter, from the shapes alone: no weights are loaded."""

    def __init__(self, pipeline: str):
        self.targets = targets(pipeline)
        self.lock = threading.Lock()  # the page asks while a training is being started
        with torch.device("meta"):  # of this thread alone; accelerate's init_empty_weights is everybody's
            self.unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(pipeline, subfolder="unet"))

    def count(self, kind: str, a_out: int, a_in: int, rank: int) -> int:
        """How many parameters the training of `examples.app.training` would train.

        Raises:
            TrainingError: if the settings are not allowed.
        """
        flags = ["--adapter_type", kind, "--rank", str(rank), *self.targets]
        if kind == "krona":
            flags += ["--krona_a_out", str(a_out), "--krona_a_in", str(a_in)]
        args = parse_args([*flags, "--instance_data_dir", ".", "--instance_prompt", "x",
                           "--pretrained_model_name_or_path", "x"])  # fmt: skip
        with self.lock:
            try:
                with torch.device("meta"):
                    self.unet.add_adapter(adapter_config(args, "unet"), "counted")
                return adapters.trainable(self.unet) - self._frozen()
            except (ValueError, RuntimeError) as error:
                raise TrainingError(str(error)) from error
            finally:
                if "counted" in getattr(self.unet, "peft_config", {}):
                    self.unet.delete_adapters("counted")

    def _frozen(self) -> int:
        """Base parameters that count as trainable: a fresh model's are, until the first adapter is added."""
        own = (p for n, p in self.unet.named_parameters() if "counted" not in n)
        return sum(p.numel() for p in own if p.requires_grad)


class Studio:
    """Draws with one base pipeline and any of the adapters found for it. One drawing at a time."""

    def __init__(self, pipeline: str):
        self.path = pipeline
        self.pipe: Any = None
        self.loaded: dict[Path, tuple[str, float]] = {}  # folder -> (adapter's name, time of its file)
        self.lock = threading.Lock()

    def draw(
        self, prompt: str, seed: int, weights: Sequence[tuple[Path, float]], *, steps: int, guidance: float,
        side: int | None = None,
    ) -> tuple[Image.Image, Image.Image]:  # fmt: skip
        """(base model's picture, the adapters' picture) of one prompt and seed.

        Args:
            weights: (adapter's folder, strength) pairs; strengths may be negative. side: of the square, in pixels.

        Raises:
            TrainingError: if the prompt is empty, a number is out of range, or an adapter does not fit.
        """
        if not prompt.strip():
            raise TrainingError("The prompt is empty: say what to draw.")
        if not 1 <= steps <= MAX_STEPS:
            raise TrainingError(f"Expected 1 to {MAX_STEPS} steps of the sampler, got {steps}.")
        if side is not None and (side % 8 or not 8 <= side <= MAX_SIDE):
            raise TrainingError(f"Expected a side of 8 to {MAX_SIDE} pixels, a multiple of 8; got {side}.")
        with self.lock, torch.no_grad():
            if self.pipe is None:
                self.pipe = load_pipeline(self.path)
                self.pipe.to("cuda" if torch.cuda.is_available() else "cpu")
            names = [self._adapter(folder) for folder, _ in weights]
            settings = {"num_inference_steps": steps, "guidance_scale": guidance}
            with for_sampling(self.pipe):
                self._use([], [])
                (base,) = sample(self.pipe, [prompt], [seed], (side, side), **settings)
                if not weights:
                    return base, base
                self._use(names, [weight for _, weight in weights])
                (adapted,) = sample(self.pipe, [prompt], [seed], (side, side), **settings)
        return base, adapted

    def _use(self, names: list[str], weights: list[float]) -> None:
        for component in ("unet", "text_encoder", "text_encoder_2"):
            model = getattr(self.pipe, component, None)
            known = getattr(model, "peft_config", {})
            own = [(n, w) for n, w in zip(names, weights, strict=True) if n in known]
            if not known:
                continue
            if not own:
                model.disable_adapters()
                continue
            model.enable_adapters()
            if component == "unet":
                model.set_adapters([n for n, _ in own], [w for _, w in own])
            else:
                model.set_adapter([n for n, _ in own])

    def _adapter(self, folder: Path) -> str:
        """Load an adapter, or load it anew if its file has changed; returns its name."""
        files = sorted(folder.glob("*/adapter_model.safetensors"))
        if not files:
            raise TrainingError(f"{folder} holds no adapter: expected folders such as unet/ in it.")
        changed = max(file.stat().st_mtime for file in files)
        name, before = self.loaded.get(folder, (f"adapter_{len(self.loaded)}", None))
        if before != changed:
            if before is not None:
                for component in ("unet", "text_encoder", "text_encoder_2"):
                    model = getattr(self.pipe, component, None)
                    if name in getattr(model, "peft_config", {}):
                        model.delete_adapters(name)
                del self.loaded[folder]
                name = f"{name}_"
            adapters.load(self.pipe, folder, adapter_name=name)
            self.loaded[folder] = name, changed
        return name

# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are whole or not there: written under another name, then renamed."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from . import TrainingError

STATE = "training_state.json"
TEMPORARY = ".tmp-"  # names that start so are unfinished and never read
# what decides over the weights; a resumed run that differs here is not the run that was stopped
FINGERPRINT = (
    "pretrained_model_name_or_path", "instance_data_dir", "dataset_name", "instance_prompt", "adapter_type", "seed",
    "train_batch_size", "gradient_accumulation_steps", "learning_rate", "text_encoder_lr", "lr_scheduler", "optimizer",
    "mixed_precision", "resolution", "with_prior_preservation", "snr_gamma", "noise_offset", "caption_dropout",
    "random_flip", "center_crop", "cache_latents", "repeats",
)  # fmt: skip


def is_write_error(error: BaseException) -> bool:
    """Whether a file could not be written (disk full, quota, permissions), as the libraries below report it."""
    return isinstance(error, (OSError, SafetensorError)) or (
        (isinstance(error, RuntimeError) and "PytorchStreamWriter" in str(error)) or "iostream error" in str(error)
    )


def replace_folder(source: Path, target: Path) -> None:
    """Put a finished folder in its place; what was there goes only after."""
    old = target.with_name(f"{TEMPORARY}old-{target.name}")
    remove(old)
    if target.exists():
        os.replace(target, old)
    os.replace(source, target)
    remove(old)


def remove(folder: Path) -> None:
    """Delete a folder; renamed first, so that a half deleted one does not look like a whole one."""
    if not folder.exists():
        return
    if not folder.name.startswith(TEMPORARY):
        hidden = folder.with_name(f"{TEMPORARY}delete-{folder.name}")
        if hidden.exists():
            shutil.rmtree(hidden)
        os.replace(folder, hidden)
        folder = hidden
    shutil.rmtree(folder)


def clean(output: Path) -> None:
    """Remove what a killed run left half written. A folder that was being replaced gets its old content back."""
    for path in output.glob(f"{TEMPORARY}*"):
        original = output / path.name.removeprefix(f"{TEMPORARY}old-")
        if path.name.startswith(f"{TEMPORARY}old-") and not original.exists():
            os.replace(path, original)
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def checkpoints(output: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    found = [(int(m[1]), p) for p in output.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", p.name))]
    return [path for _, path in sorted(found) if (path / STATE).is_file()]


class Checkpoints:
    """Saves, rotates and restores the training state of an accelerator."""

    def __init__(self, accelerator: Any, output: Path, args: Any):
        self.accelerator, self.output, self.args = accelerator, output, args
        self.saved_step: int | None = None

    def fingerprint(self) -> dict[str, Any]:
        found = {name: getattr(self.args, name) for name in FINGERPRINT}
        return found | {"processes": self.accelerator.num_processes}

    def save(self, step: int, also: Callable[[Path], None] | None = None) -> Path | None:
        """Save the state after `step` updates; `also(folder)` may add files. Returns the folder.

        If the disk is full (or the like) a message is printed, nothing half written is left, None is returned.
        """
        if self.saved_step == step:
            return self.output / f"checkpoint-{step}"
        final = self.output / f"checkpoint-{step}"
        temporary = self.output / f"{TEMPORARY}{final.name}"
        main, problem = self.accelerator.is_main_process, None
        try:
            if main:
                remove(temporary)
                temporary.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            self.accelerator.save_state(str(temporary))
            if main:
                if also:
                    also(temporary)
                state = {"step": step, "settings": self.fingerprint()}
                (temporary / STATE).write_text(json.dumps(state, indent=1, default=str))
            self.accelerator.wait_for_everyone()
            if main:
                replace_folder(temporary, final)
        except Exception as error:
            if not is_write_error(error):
                raise
            problem = error
        if problem is not None:
            if self.accelerator.num_processes > 1:
                # the others wait at a barrier for this process: all must stop
                raise TrainingError(self.write_message(final, problem)) from problem
            shutil.rmtree(temporary, ignore_errors=True)
            self.accelerator.print(self.write_message(final, problem) + " Training goes on.")
            return None
        self.saved_step = step
        if main:
            self.rotate()
        self.accelerator.wait_for_everyone()
        return final

    def write_message(self, path: Path, error: BaseException) -> str:
        kept = checkpoints(self.output)
        where = f"The newest whole checkpoint is {kept[-1]}." if kept else "There is no whole checkpoint yet."
        return f"{path} could not be written ({error}): free some disk space. Nothing half written was left. {where}"

    def rotate(self) -> None:
        limit = self.args.checkpoints_total_limit
        if limit is not None:
            for old in checkpoints(self.output)[:-limit]:
                remove(old)

    def find(self, wanted: str | None) -> Path | None:
        """The checkpoint to resume from; None: start anew.

        Raises:
            TrainingError: if `wanted` is no checkpoint, or if there are checkpoints that a new run would mix with.
        """
        here = checkpoints(self.output)
        if wanted is None:
            if here and not self.args.overwrite_output_dir:
                raise TrainingError(
                    f"{self.output} has checkpoints of another run (newest: {here[-1].name}). Go on with it by "
                    "--resume_from_checkpoint latest, choose another --output_dir, or delete them by "
                    "--overwrite_output_dir."
                )
            self.accelerator.wait_for_everyone()  # every process has looked
            if self.accelerator.is_main_process:
                for old in here:
                    remove(old)
            return None
        if wanted == "latest":
            if not here:
                self.accelerator.print(f"No checkpoint in {self.output}: starting from the beginning.")
                return None
            return here[-1]
        for path in (Path(wanted), self.output / Path(wanted).name):
            if (path / STATE).is_file():
                return path
        names = ", ".join(p.name for p in here) or "none"
        raise TrainingError(
            f"--resume_from_checkpoint {wanted}: not a whole checkpoint (no {STATE} in it). In {self.output}: {names}."
        )

    def resume(self, wanted: str | None) -> int:
        """Restore a checkpoint; returns the number of updates done so far."""
        path = self.find(wanted)
        if path is None:
            return 0
        state = json.loads((path / STATE).read_text())
        now = self.fingerprint()
        before = {k: v for k, v in state["settings"].items() if str(now.get(k)) != str(v)}
        if before:
            changes = ", ".join(f"{k}: {v!r} -> {now.get(k)!r}" for k, v in before.items())
            self.accelerator.print(f"warning: resuming with other settings, so not the same run ({changes}).")
        try:
            self.accelerator.load_state(str(path))
        except (FileNotFoundError, RuntimeError, ValueError, KeyError) as error:
            raise TrainingError(f"{path} cannot be restored with these flags: {error}") from error
        self.accelerator.print(f"Resumed from {path}, after {state['step']} updates.")
        self.saved_step = state["step"]
        return state["step"]

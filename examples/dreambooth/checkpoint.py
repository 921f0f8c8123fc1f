# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: whole or not there, checked before they are used."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError
from safetensors.torch import load_file

from . import TrainingError, one_line, sharded
from .files import TEMPORARY, remove, replace_folder

STATE = "training_state.json"
CHECKSUMS = "checksums.json"  # {file: [bytes, SHA-256]} of everything else in the checkpoint
READ = (".bin", ".distcp", ".json", ".pkl", ".pt", ".safetensors")  # endings of what a resumed run may read
ABANDONED = "abandoned-"  # a checkpoint that was newer than the one that a run went on from
# what has no part in the weights; in everything else a resumed run must be the run that was stopped
FREE = frozenset((
    "output_dir", "overwrite_output_dir", "logging_dir", "report_to", "validation_prompt", "num_validation_images",
    "validation_epochs", "validation_steps", "validation_inference_steps", "validation_guidance_scale", "export",
    "output_kohya_format", "push_to_hub", "hub_model_id", "hub_token", "checkpointing_steps",
    "checkpoints_total_limit", "resume_from_checkpoint", "dataloader_num_workers", "cache_dir", "local_rank", "demo",
    "config", "cache_to_disk",
))  # fmt: skip
# with another value the saved weights would load but mean something else, or the optimizer's state would not fit
FIXED = ("adapter_type", "alpha", "scaling", "layout", "optimizer", "use_8bit_adam")
LENGTH = ("max_train_steps", "num_train_epochs")
ENDLESS = ("constant", "constant_with_warmup", "piecewise_constant")  # schedules that do not look at the length


def is_write_error(error: BaseException) -> bool:
    """Whether a file could not be written (disk full, quota, permissions), as the libraries below report it."""
    # torch.save reports a full disk as such, or only that its file (inline_container.cc) ended at the wrong place
    words = ("PytorchStreamWriter", "inline_container", "iostream error")
    return isinstance(error, (OSError, SafetensorError)) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


def numbered(output: Path) -> list[Path]:
    """What has the name of a checkpoint, oldest first."""
    found = [(int(m[1]), p) for p in output.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", p.name))]
    return [path for _, path in sorted(found)]


def was_saved(path: Path) -> bool:
    """Whether it is a checkpoint, damaged since or not: one of these two may have gone."""
    return (path / STATE).is_file() or (path / CHECKSUMS).is_file()


def checkpoints(output: Path) -> list[Path]:
    """Checkpoints that were whole when they were saved, oldest first."""
    return [path for path in numbered(output) if was_saved(path)]


def read_state(path: Path) -> dict[str, Any]:
    """{"step", "settings"} of a checkpoint.

    Raises:
        ValueError, KeyError, TypeError: if its file is not as `Checkpoints.save` writes it, which `damage` tells.
    """
    state = json.loads((path / STATE).read_text(encoding="utf-8"))
    if type(state["step"]) is not int or state["step"] < 0:
        raise ValueError(f"step {state['step']!r}")
    return {"step": state["step"], "settings": dict(state["settings"])}


def write_checksums(folder: Path) -> None:
    noted = json.dumps({name: checksum(folder / name) for name in files_of(folder)}, indent=1)
    (folder / CHECKSUMS).write_text(noted, encoding="utf-8")


def files_of(folder: Path) -> list[str]:
    """All files in a checkpoint but the checksums."""
    found = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file())
    return [name for name in found if name != CHECKSUMS]


def checksum(path: Path) -> list:
    with path.open("rb") as file:
        return [path.stat().st_size, sha256(file)]


def sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):  # hashlib.file_digest is of Python 3.11
        digest.update(block)
    return digest.hexdigest()


def damage(folder: Path) -> str | None:
    """Why nothing can be resumed from a checkpoint, as a sentence; None if all of it is as it was saved, and finite."""
    try:
        noted = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        expected = {name: (int(size), str(digest)) for name, (size, digest) in noted.items()}
    except FileNotFoundError:
        return f"{folder / CHECKSUMS} is missing, by which the other files would be checked"
    except (OSError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        return f"{folder / CHECKSUMS} is damaged ({error!r})"
    path = folder
    try:
        for name, (size, digest) in expected.items():
            path = folder / name
            if not path.is_file():
                return f"{path} is damaged (the file is missing)"
            found = checksum(path)
            if found[0] != size:
                return f"{path} is damaged ({found[0]:,} bytes; {size:,} were saved)"
            if found[1] != digest:
                return f"{path} is damaged (its content is not what was saved: the SHA-256 sums differ)"
        for name in files_of(folder):
            path = folder / name
            if name not in expected and path.suffix in READ:
                return f"{path} is not one of the files that were saved ({CHECKSUMS} does not have it)"
            if path.name == "adapter_model.safetensors" and not all(
                t.isfinite().all() for t in load_file(path).values()
            ):
                return f"{path} holds NaN or infinite values (the training had diverged)"
        path = folder / STATE
        read_state(folder)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        return f"{path} is damaged ({error!r})"
    return None


class Checkpoints:
    """Saves, rotates and restores the training state of an accelerator.

    `settings`: the run's flags, by which a resumed run is compared. `limit`: how many checkpoints are kept.
    `overwrite`: a new run deletes those of another.
    """

    def __init__(
        self,
        accelerator: Any,
        output: Path,
        settings: Mapping[str, Any],
        limit: int | None = None,
        overwrite: bool = False,
    ):
        self.accelerator, self.output, self.settings = accelerator, output, settings
        self.limit, self.overwrite = limit, overwrite
        self.saved_step: int | None = None
        self.abandoned: list[Path] = []

    def fingerprint(self) -> dict[str, Any]:
        found = {name: value for name, value in self.settings.items() if name not in FREE}
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
                self.set_aside()
                remove(temporary)
                temporary.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            with sharded.without_the_base(self.accelerator, saving=True) as more:
                self.accelerator.save_state(str(temporary), **more)
            if main:
                if also:
                    also(temporary)
                state = {"step": step, "settings": self.fingerprint()}
                (temporary / STATE).write_text(json.dumps(state, indent=1, default=str))
                write_checksums(temporary)
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
            self.rotate(final)
        self.accelerator.wait_for_everyone()
        return final

    def write_message(self, path: Path, error: BaseException) -> str:
        kept = checkpoints(self.output)
        where = f"The newest whole checkpoint is {kept[-1]}." if kept else "There is no whole checkpoint yet."
        return f"{path} could not be written ({error}): free some disk space. Nothing half written was left. {where}"

    def rotate(self, just_saved: Path) -> None:
        if self.limit is not None:
            for old in checkpoints(self.output)[: -self.limit]:
                if old != just_saved:
                    remove(old)

    def set_aside(self) -> None:
        """Rename the checkpoints of the way that this run has left, before it saves anything of its own."""
        while self.abandoned:
            old = self.abandoned.pop()
            new, number = old.with_name(f"{ABANDONED}{old.name}"), 2
            while new.exists():  # set aside before, on another way
                new, number = old.with_name(f"{ABANDONED}{number}-{old.name}"), number + 1
            os.replace(old, new)

    def find(self, wanted: str | None) -> Path | None:
        """The checkpoint to resume from; None: start anew.

        Raises:
            TrainingError: if `wanted` is no checkpoint, or a damaged one, or one of other settings, or if there are
                checkpoints that a new run would mix with.
        """
        path = self.named(wanted)
        problem = damage(path) if path else None
        if path and problem:
            others = (p for p in reversed(checkpoints(path.parent)) if p.name != path.name)
            whole = next((p for p in others if not damage(p)), None)
            advice = (
                "choose another --output_dir, or drop --resume_from_checkpoint and start anew with "
                "--overwrite_output_dir; no other is whole"
            )
            if whole:
                flag = f"--resume_from_checkpoint {whole.name if self.has(whole) else whole}"
                advice = f"the newest whole one is taken by {flag}"
            raise TrainingError(f"{problem}: resume from another checkpoint ({advice}).")
        if path:
            self.compare(path, read_state(path)["settings"])
        if not (path and self.has(path)) and (here := checkpoints(self.output)) and not self.overwrite:
            raise TrainingError(
                f"{self.output} has checkpoints of another run (newest: {here[-1].name}). Go on with it by "
                "--resume_from_checkpoint latest, choose another --output_dir, or delete them by "
                "--overwrite_output_dir."
            )
        return path

    def has(self, path: Path) -> bool:
        """Whether it is of this run, by where it lies."""
        return path.resolve().parent == self.output.resolve()

    def named(self, wanted: str | None) -> Path | None:
        """The checkpoint of that name, whether damaged or not."""
        if wanted is None:
            return None
        here = checkpoints(self.output)
        if wanted == "latest":
            if others := [p.name for p in numbered(self.output) if p not in here]:
                self.accelerator.print(
                    f"note: {', '.join(others)} in {self.output}: passed over, no checkpoint (neither {STATE} nor "
                    f"{CHECKSUMS} in it)."
                )
            if not here:
                self.accelerator.print(f"No checkpoint in {self.output}: starting from the beginning.")
                return None
            return here[-1]
        for path in (Path(wanted), self.output / Path(wanted).name):
            if was_saved(path):
                return path
        names = ", ".join(p.name for p in here) or "none"
        raise TrainingError(
            f"--resume_from_checkpoint {wanted}: not a whole checkpoint (no {STATE} in it). In {self.output}: {names}."
        )

    def start_anew(self) -> None:
        """Without the checkpoints of another run, which --overwrite_output_dir removes."""
        self.accelerator.wait_for_everyone()  # every process has looked
        if self.overwrite and self.accelerator.is_main_process:
            for old in (*checkpoints(self.output), *self.set_aside_before()):
                remove(old)

    def set_aside_before(self) -> list[Path]:
        """The checkpoints that `set_aside` has renamed; nothing else that may have such a name."""
        name = re.compile(rf"{ABANDONED}(\d+-)?checkpoint-\d+")
        found = sorted(self.output.glob(f"{ABANDONED}*"))
        return [path for path in found if name.fullmatch(path.name) and (path / STATE).is_file()]

    def resume(self, path: Path | None) -> int:
        """Restore the checkpoint that `find` gave; returns the number of updates done so far.

        Raises:
            TrainingError: if it is of an adapter or an optimizer that the flags do not describe.
        """
        if path is None:
            self.start_anew()
            return 0
        state = read_state(path)
        try:
            with sharded.without_the_base(self.accelerator, saving=False) as more:
                self.accelerator.load_state(str(path), **more)
        except (
            OSError,
            RuntimeError,
            ValueError,
            KeyError,
            EOFError,
            pickle.UnpicklingError,
            SafetensorError,
        ) as error:
            raise TrainingError(
                f"{path} cannot be restored with these flags: {one_line(error)}. Resume with the flags of that run, "
                "or from another checkpoint if a file of this one is damaged."
            ) from error
        self.accelerator.print(f"Resumed from {path}, after {state['step']} updates.")
        if not self.has(path):
            self.start_anew()
        else:
            # one that was set aside is a branch of its own: a checkpoint of the same step is not it
            its_own = path.name == f"checkpoint-{state['step']}"
            self.saved_step = state["step"] if its_own else None
            after = state["step"] + its_own
            newer = [p for p in checkpoints(self.output) if int(p.name.partition("-")[2]) >= after]
            if newer:
                self.accelerator.print(
                    f"{', '.join(p.name for p in newer)} came after it on a way that this run leaves: renamed to "
                    f"{ABANDONED}... at the next save; delete them if they are not needed."
                )
            self.abandoned = newer
        return state["step"]

    def compare(self, path: Path, before: dict[str, Any]) -> None:
        """Say which settings are not those of the checkpoint.

        Raises:
            TrainingError: if one of them makes another thing of the saved weights or of the optimizer's state.
        """
        now = self.fingerprint()
        free = FREE | (set(LENGTH) if self.settings.get("lr_scheduler") in ENDLESS else set())

        def text(name: str, value: Any) -> str:
            return str(value).lower() if name == "optimizer" else str(value)  # whose names may be in any case

        changed = {k: v for k, v in before.items() if k not in free and text(k, now.get(k)) != text(k, v)}
        fixed = [k for k in FIXED if k in changed]
        if fixed:
            raise TrainingError(
                f"{path} was trained with {', '.join(f'--{k} {changed[k]}' for k in fixed)}; received "
                f"{', '.join(f'--{k} {now.get(k)}' for k in fixed)}. Resume with the same, or choose another "
                "--output_dir."
            )
        if changed:
            changes = ", ".join(f"{k}: {v!r} -> {now.get(k)!r}" for k, v in changed.items())
            self.accelerator.print(
                f"warning: resuming with other settings, so not the same run ({changes}). Learning rates, betas and "
                "weight decay stay those of the checkpoint."
            )

# SPDX-License-Identifier: Apache-2.0
"""One training: the example script as a process of its own, followed by its progress bar, stopped by a signal."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from examples.dreambooth import demo

SCRIPT = Path(__file__).resolve().parents[1] / "dreambooth_kron.py"
# tqdm's line: "Steps:  50%|####  | 5/10 [00:01<00:01, 3.21it/s, loss=0.1234, lr=1.0e-03]"
PROGRESS = re.compile(r"^Steps:.*\| (\d+)/(\d+) \[.*loss=([-+.\dA-Za-z]+)")
INTERRUPTED = 130


def is_shipped(pipeline: str) -> bool:
    return Path(pipeline).resolve() == demo.PIPELINE.resolve()


def targets(pipeline: str) -> list[str]:
    """The flag for the layers to adapt: the demo's on the shipped pipeline, the script's own on others."""
    return ["--target_modules", *demo.TARGETS] if is_shipped(pipeline) else []


@dataclass(frozen=True)
class Settings:
    """What is trained, how, and where to.

    `pictures`: folder of 1 to 8 pictures. `noun`: what the subject is. `kind`: "krona", "lora" or "lokr". `a_out`,
    `a_in`: KronA's factors. `rank`: KronA's terms, else the rank. `previews`: a picture every so many updates; 0: none.
    """

    pipeline: str
    pictures: Path
    noun: str
    output: Path
    kind: str = "krona"
    a_out: int = 64
    a_in: int = 4
    rank: int = 1
    steps: int = 400
    learning_rate: float = demo.LEARNING_RATES["krona"]
    seed: int = 0
    previews: int = 100

    @property
    def prompt(self) -> str:
        return f"a {demo.IDENTIFIER} {self.noun}"

    def command(self, resume: bool) -> list[str]:
        flags = {
            "pretrained_model_name_or_path": self.pipeline,
            "instance_data_dir": self.pictures,
            "instance_prompt": self.prompt,
            "output_dir": self.output,
            "adapter_type": self.kind,
            "rank": self.rank,
            "learning_rate": self.learning_rate,
            "max_train_steps": self.steps,
            "lr_scheduler": "cosine",
            "seed": self.seed,
            "checkpointing_steps": 100,
            "checkpoints_total_limit": 1,
            "report_to": "none",
            "export": "none",  # the page's own tab offers every format
        }
        switches = ["center_crop", "random_flip", "cache_latents"]
        if self.kind == "krona":
            flags |= {"krona_a_out": self.a_out, "krona_a_in": self.a_in}
        if is_shipped(self.pipeline):  # small pictures: many at once
            decay = demo.WEIGHT_DECAYS.get(self.kind, demo.WEIGHT_DECAYS["krona"])
            flags |= {"train_batch_size": 8, "repeats": 8, "adam_weight_decay": decay}
        if self.previews:
            flags |= {"validation_prompt": self.prompt, "validation_steps": self.previews, "num_validation_images": 2}
        if resume:
            flags["resume_from_checkpoint"] = "latest"
        else:
            switches.append("overwrite_output_dir")
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))] + targets(self.pipeline)
        return [sys.executable, str(SCRIPT), *words, *(f"--{name}" for name in switches)]


@dataclass
class Training:
    """A running or ended training.

    `losses`: {update: loss}. `log`: the last lines that are no progress. `code`: the exit code, None while it runs.
    """

    settings: Settings
    losses: dict[int, float] = field(default_factory=dict)
    log: deque[str] = field(default_factory=lambda: deque(maxlen=40))
    code: int | None = None
    _process: subprocess.Popen | None = None

    def follow(self, resume: bool = False) -> Iterator[Training]:
        """Start, and give itself after every update and line until the process has ended.

        Closing the iterator early (the browser has gone) stops the training as `stop` does.
        """
        self._process = subprocess.Popen(
            self.settings.command(resume), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            encoding="utf-8", errors="replace", env={**os.environ, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,  # a Ctrl-C in the server's terminal reaches the server, which then stops this
        )  # fmt: skip
        try:
            for line in self._process.stdout:  # text mode: tqdm's carriage returns end lines as well
                self.read(line.strip())
                yield self
            self.code = self._process.wait()
            yield self
        finally:
            self.stop()
            self.code = self._process.wait()
            self._process.stdout.close()

    def read(self, line: str) -> None:
        """Take one line of the script's output."""
        found = PROGRESS.match(line)
        if found:
            self.losses[int(found[1])] = float(found[3])
        elif line and not re.match(r"^[\w .]+:\s+\d+%\|", line):  # other progress bars
            self.log.append(line)

    def stop(self) -> None:
        """End after the update at hand, with a checkpoint and the adapter so far."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)

    @property
    def step(self) -> int:
        return max(self.losses, default=0)

    def state(self) -> str:
        """One line for a person."""
        done, total = self.step, self.settings.steps
        if self.code is None:
            return f"Training: update {done} of {total}." if done else "Starting: the models are being loaded."
        if self.code == 0:
            return f"Done: {total} updates. The adapter is in {self.settings.output}."
        if self.code == INTERRUPTED:
            return f"Stopped at update {done} of {total}; «Go on» continues from there."
        for line in reversed(self.log):
            if "error: " in line:
                return f"error: {line.partition('error: ')[2]}"
        return f"error: the training ended with exit code {self.code}; open «What the training prints»."

    def previews(self) -> list[tuple[Path, str]]:
        """(picture, label) of the preview pictures so far, newest first."""
        folders = (self.settings.output / "validation").glob("*-*")
        dated = sorted(((int(f.name.rpartition("-")[2]), f) for f in folders), reverse=True)
        return [(path, f"update {at}") for at, folder in dated for path in sorted(folder.glob("[0-9][0-9].png"))]

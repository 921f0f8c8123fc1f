# SPDX-License-Identifier: Apache-2.0
"""examples/dreambooth_kron.py end to end on tiny random pipelines."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, safe_open

pytest.importorskip("diffusers")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import dreambooth_pipelines as tiny
from accelerate.state import AcceleratorState, PartialState

from examples import dreambooth_kron
from examples.dreambooth import TrainingError, checkpoint
from examples.dreambooth.arguments import parse_args

SCRIPT = Path(dreambooth_kron.__file__)


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory):
    return tiny.build(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory):
    return tiny.build(tmp_path_factory.mktemp("sdxl"), "sdxl")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    return tiny.images(tmp_path_factory.mktemp("pictures") / "input").parent


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    yield
    AcceleratorState._reset_state(True)
    PartialState._reset_state()


def arguments(pipeline, pictures, output, *more):
    return [
        "--pretrained_model_name_or_path", str(pipeline), "--instance_data_dir", str(pictures),
        "--instance_prompt", "a sks dog", "--output_dir", str(output), "--max_train_steps", "2",
        "--train_batch_size", "1", "--report_to", "none", "--export", "none", *map(str, more),
    ]  # fmt: skip


def train(*args):
    return dreambooth_kron.main(parse_args(arguments(*args)))


def weights(output):
    files = sorted(Path(output).glob("*/adapter_model.safetensors"))
    return {f"{f.parent.name}.{k}": v for f in files for k, v in load_file(f).items()}


def differences(one, other):
    assert one.keys() == other.keys() and one
    return [k for k in one if not torch.equal(one[k], other[k])]


# -- resume ----------------------------------------------------------------------------------------------------------

RESUME = ["--max_train_steps", 6, "--checkpointing_steps", 2, "--gradient_accumulation_steps", 2, "--random_flip",
          "--caption_dropout", 0.3, "--noise_offset", 0.1, "--adapter_dropout", 0.2, "--module_dropout", 0.1,
          "--lr_scheduler", "cosine", "--learning_rate", 1e-2]  # fmt: skip

KILL = """
import os, signal, sys
sys.path.insert(0, {root!r})
import torch; torch.set_num_threads(1)
from accelerate import Accelerator
from examples import dreambooth_kron
calls = 0
def kill_at(cls, name, at):
    original = getattr(cls, name)
    def call(*args, **kwargs):
        global calls
        calls += 1
        result = original(*args, **kwargs)
        if calls == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(cls, name, call)
kill_at(*{what})
sys.exit(dreambooth_kron.run(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def uninterrupted(tiny_sd, pictures, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole")
    train(tiny_sd, pictures, output, *RESUME)
    AcceleratorState._reset_state(True)
    return weights(output)


@pytest.mark.parametrize(
    ("what", "left"),
    [
        # the 9th of 12 micro-steps: in the middle of update 5, its gradient half accumulated
        ("(Accelerator, 'backward', 9)", ["checkpoint-2", "checkpoint-4"]),
        # the second save: all files of checkpoint-4 written, not yet renamed
        ("(Accelerator, 'save_state', 2)", [".tmp-checkpoint-4", "checkpoint-2"]),
    ],
    ids=["in a step", "in a save"],
)
def test_a_killed_run_resumes_exactly(tiny_sd, pictures, tmp_path, uninterrupted, what, left):
    program = KILL.format(root=str(SCRIPT.parents[1]), what=what)
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments(tiny_sd, pictures, tmp_path, *RESUME)], capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert sorted(p.name for p in tmp_path.glob("*checkpoint-*")) == left
    train(tiny_sd, pictures, tmp_path, *RESUME, "--resume_from_checkpoint", "latest")
    assert differences(weights(tmp_path), uninterrupted) == []
    assert not list(tmp_path.glob(".tmp-*"))


def test_resume_is_sensitive(tiny_sd, pictures, tmp_path, uninterrupted):
    """The comparison above can fail: another seed gives other weights everywhere."""
    train(tiny_sd, pictures, tmp_path, *RESUME, "--seed", 1)
    assert len(differences(weights(tmp_path), uninterrupted)) == len(uninterrupted)

# SPDX-License-Identifier: Apache-2.0
"""examples/dreambooth_kron.py with a model that is spread over two processes, which talk over gloo."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("diffusers")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import dreambooth_pipelines as tiny
from accelerate.state import AcceleratorState, PartialState

from examples import dreambooth_kron
from examples.dreambooth.arguments import parse_args

ROOT = Path(__file__).resolve().parents[1]
# sums of some thousand terms in another order, three times
ROUNDING = {name: 2**12 * torch.finfo(getattr(torch, name)).eps for name in ("float64", "float32")}
deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")


@pytest.mark.parametrize(
    ("config", "inner"),
    [
        ("fsdp", "float64"),
        pytest.param("deepspeed_zero2", "float32", marks=deepspeed),  # its optimizer's own copy of the weights is fp32
        pytest.param("deepspeed_zero3", "float32", marks=deepspeed),
    ],
)
def test_spread_over_two_processes(tmp_path, monkeypatch, config, inner):
    """The weights of one process with the same global batch; saved without the base; resumed exactly."""
    pipeline, pictures = tiny.build(tmp_path / "sd"), tiny.images(tmp_path / "pictures")

    def arguments(output, *more):
        return [
            "--pretrained_model_name_or_path", str(pipeline), "--instance_data_dir", str(pictures), "--instance_prompt",
            "a sks dog", "--output_dir", str(tmp_path / output), "--max_train_steps", "3", "--checkpointing_steps", "2",
            "--train_batch_size", "1", "--learning_rate", "1e-3", "--report_to", "none", "--export", "none",
            "--mixed_precision", "no", "--validation_prompt", "x", "--num_validation_images", "1",
            "--validation_steps", "1", "--validation_inference_steps", "1", *more,
        ]  # fmt: skip

    runs = [arguments("two"), arguments("again", "--resume_from_checkpoint", str(tmp_path / "two" / "checkpoint-2"))]
    launch = [
        sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0", "--config_file",
        str(ROOT / "examples" / "configs" / f"{config}.yaml"), str(ROOT / "tests" / "dreambooth_on_cpus.py"),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    environment |= {"ACCELERATE_USE_CPU": "true"} if config == "fsdp" else {}
    done = subprocess.run([*launch, json.dumps(runs)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    ran = [tmp_path / output / f"process-{number}.txt" for output in ("two", "again") for number in range(2)]
    assert {note.read_text() for note in ran} == {config.partition("_")[0].upper()}
    assert "validation images are made after the training only" in done.stdout or config == "deepspeed_zero2"

    tiny.in_float64(monkeypatch.setattr)
    dreambooth_kron.main(parse_args(arguments("one", "--train_batch_size", "2")))
    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    one, two, again = (
        load_file(tmp_path / output / "unet" / "adapter_model.safetensors") for output in ("one", "two", "again")
    )
    assert one.keys() == two.keys() == again.keys() and len(one) > 20
    largest = max(weight.abs().max() for weight in one.values())
    assert max(weight.abs().max() for name, weight in one.items() if name.endswith("krona_B")) > 1e-3  # it moved
    for name, weight in one.items():
        assert torch.equal(two[name], again[name]), name
        assert (two[name] - weight).abs().max() <= ROUNDING[inner] * largest, name
    saved = tmp_path / "two" / "checkpoint-2"
    base = sum(p.stat().st_size for p in (pipeline / "unet").iterdir())
    assert sum(p.stat().st_size for p in saved.rglob("*") if p.is_file()) < base

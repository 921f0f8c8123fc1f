# SPDX-License-Identifier: Apache-2.0
"""dreambooth_kron.py --cache_to_disk: the same training, from files that are named after what they follow from."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

pytest.importorskip("diffusers")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import dreambooth_pipelines as tiny
from accelerate.state import AcceleratorState, PartialState

from examples import dreambooth_kron
from examples.dreambooth import TrainingError, disk_cache
from examples.dreambooth.arguments import parse_args
from examples.dreambooth.families.stable_diffusion import StableDiffusion


@pytest.fixture
def run(tmp_path):
    pipeline, pictures = tiny.build(tmp_path / "sd"), tiny.images(tmp_path / "pictures", 2)

    def train(output, *more):
        dreambooth_kron.main(parse_args([
            "--pretrained_model_name_or_path", str(pipeline), "--instance_data_dir", str(pictures), "--instance_prompt",
            "a sks dog", "--output_dir", str(tmp_path / output), "--max_train_steps", "2", "--train_batch_size", "1",
            "--report_to", "none", "--export", "none", "--caption_dropout", "0.5", "--learning_rate", "1e-2",
            "--cache_latents", *map(str, more),
        ]))  # fmt: skip
        AcceleratorState._reset_state(True)
        PartialState._reset_state()
        return load_file(tmp_path / output / "unet" / "adapter_model.safetensors")

    return train


def test_the_same_training_and_nothing_encoded_twice(run, tmp_path, monkeypatch, capsys):
    whole, disk = run("memory"), tmp_path / "cache"
    counted = [line for line in capsys.readouterr().out.splitlines() if "latents" in line]
    first = run("first", "--cache_to_disk", disk)
    assert len(counted) == 1 and "text_encoder" not in counted[0] and "vae" not in counted[0]  # nothing asks for them
    assert "latents 0." in counted[0] and "latents 0." not in capsys.readouterr().out  # they are not in memory
    made = sorted(p.name for p in disk.iterdir())
    assert len(made) == 4 and not any(name.startswith(".tmp") for name in made)  # two prompts, two images

    def encode(*_):
        raise AssertionError("encoded again")

    with monkeypatch.context() as patch:
        patch.setattr(StableDiffusion, "encode_image", encode)
        patch.setattr(StableDiffusion, "encode_prompt", encode)
        again = run("again", "--cache_to_disk", disk)
    for other in (first, again):
        assert whole.keys() == other.keys() and all(torch.equal(whole[name], other[name]) for name in whole)
    run("flipped", "--cache_to_disk", disk, "--random_flip", "--image_interpolation_mode", "nearest")
    assert len(list(disk.iterdir())) == 4 + 4  # another resampling, both ways round


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 9), nn.BatchNorm1d(9))


def changed(change):
    other = model()
    with torch.no_grad():
        change(other)
    return other


@pytest.mark.parametrize(
    ("models", "settings", "key"),
    [
        ([changed(lambda m: m[0].weight[0, 0].add_(1e-3))], ("SD", 77), ("a dog",)),
        ([changed(lambda m: m[0].weight[-1, -1].add_(1e-3))], ("SD", 77), ("a dog",)),
        ([changed(lambda m: m[1].running_mean.add_(1))], ("SD", 77), ("a dog",)),
        ([changed(lambda m: m.to(torch.bfloat16))], ("SD", 77), ("a dog",)),
        ([model(), model()], ("SD", 77), ("a dog",)),
        ([model()], ("SD", 78), ("a dog",)),
        ([model()], ("SD", 77), ("a cat",)),
        ([model()], ("SD", 77), ("a dog", True)),
    ],
)
def test_what_it_follows_from(tmp_path, models, settings, key):
    first = disk_cache.DiskCache(tmp_path, [model()], "SD", 77)
    tensors = {"hidden": torch.arange(6.0, dtype=torch.bfloat16).reshape(2, 3).T}
    first.put(tensors, "a dog")
    assert torch.equal(
        disk_cache.DiskCache(tmp_path, [model()], "SD", 77).get("a dog").read()["hidden"], tensors["hidden"]
    )
    assert disk_cache.DiskCache(tmp_path, models, *settings).get(*key) is None


def test_images_by_their_content():
    image = Image.new("RGB", (3, 2), "red")
    other = image.copy()
    other.putpixel((2, 1), (255, 0, 1))
    assert disk_cache.of_image(image) == disk_cache.of_image(image.copy())
    assert len({disk_cache.of_image(i) for i in (image, other, image.transpose(Image.Transpose.ROTATE_90))}) == 3


def test_mistakes(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match=r"--cache_to_disk .*file: expected a folder, which cannot be made"):
        disk_cache.DiskCache(tmp_path / "file", [])
    cache = disk_cache.DiskCache(tmp_path / "cache", [])
    stored = cache.put({"x": torch.zeros(3)}, 1)
    stored.path.write_bytes(stored.path.read_bytes()[:-5])
    with pytest.raises(
        TrainingError, match=rf"{re.escape(str(stored.path))} cannot be read .*: delete it, and it is made"
    ):
        cache.get(1).read()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(TrainingError, match=r"--cache_to_disk .*cache cannot be written .*No space left"):
        cache.put({"x": torch.zeros(3)}, 2)
    assert cache.get(2) is None and list((tmp_path / "cache").iterdir()) == [stored.path]

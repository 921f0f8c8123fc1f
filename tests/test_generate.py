# SPDX-License-Identifier: Apache-2.0
"""examples/generate.py on tiny random pipelines."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import diffusers
import dreambooth_pipelines as tiny
from PIL import Image

from examples import generate
from peft_krona import KronAConfig
from peft_krona.pipelines import add_krona, save_krona_weights


def trained(pipeline: Path, folder: Path) -> Path:
    """An adapter that changes the images."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(pipeline)
    config = KronAConfig(a_out=8, a_in=4, init_weights=False)
    for model in add_krona(pipe, config, text_encoder_config=config).values():
        model.name_or_path = None
        model.peft_config["default"].base_model_name_or_path = str(pipeline)
    save_krona_weights(pipe, folder)
    return folder


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    pipeline = tiny.build(tmp_path_factory.mktemp("sd"))
    return pipeline, trained(pipeline, tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    pipeline = tiny.build(tmp_path_factory.mktemp("sdxl"), "sdxl")
    return pipeline, trained(pipeline, tmp_path_factory.mktemp("adapter-xl"))


def draw(output, *args):
    parser = generate.build_parser()
    files = generate.main(
        parser.parse_args([*map(str, args), "--num_inference_steps", "2", "--output_dir", str(output)])
    )
    return {f.name: np.asarray(Image.open(f)).astype(int) for f in files}


def test_every_prompt_and_seed_and_the_comparison(sd, tmp_path, capsys):
    _, adapter = sd
    images = draw(tmp_path, "--adapter", adapter, "--prompt", "A dog!", "two cats", "--seed", 0, 7, "--compare",
                  "--negative_prompt", "rain")  # fmt: skip
    names = [f"{p}-{s}-{k}.png" for k in ("base", "adapter") for p in ("a-dog", "two-cats") for s in (0, 7)]
    assert list(images) == [*names, "grid.png"]
    assert images["grid.png"].shape == (4 * 32, 2 * 32, 3)  # base above adapter, for both prompts
    assert (images["a-dog-0-base.png"] != images["a-dog-0-adapter.png"]).any()
    assert (images["a-dog-0-base.png"] != images["a-dog-7-base.png"]).any()
    assert "strength 1" in capsys.readouterr().out
    # an image depends on its prompt and seed alone
    alone = draw(
        tmp_path / "alone", "--adapter", adapter, "--prompt", "two cats", "--seed", 7, "--negative_prompt", "rain"
    )
    assert abs(alone["two-cats-7-adapter.png"] - images["two-cats-7-adapter.png"]).max() <= 1


def test_scale_and_merging(sd, tmp_path):
    pipeline, adapter = sd
    common = ["--pretrained_model_name_or_path", pipeline, "--prompt", "x"]
    base = draw(tmp_path / "b", *common)["x-0-base.png"]
    nothing = draw(tmp_path / "0", *common, "--adapter", adapter, "--scale", 0)["x-0-adapter.png"]
    plain = draw(tmp_path / "1", *common, "--adapter", adapter, "--scale", 0.5)["x-0-adapter.png"]
    merged = draw(tmp_path / "m", *common, "--adapter", adapter, "--scale", 0.5, "--merged")["x-0-adapter.png"]
    assert (base == nothing).all()
    assert (base != plain).any()
    assert abs(plain - merged).max() <= 1


def test_sdxl_with_a_refiner(sdxl, tmp_path):
    pipeline, adapter = sdxl
    base = diffusers.StableDiffusionXLPipeline.from_pretrained(pipeline)
    torch.manual_seed(1)
    unet = diffusers.UNet2DConditionModel.from_config(
        base.unet.config, cross_attention_dim=tiny.TEXT, projection_class_embeddings_input_dim=5 * 8 + tiny.TEXT
    )
    refiner = diffusers.StableDiffusionXLImg2ImgPipeline(
        vae=base.vae, text_encoder=None, tokenizer=None, text_encoder_2=base.text_encoder_2,
        tokenizer_2=base.tokenizer_2,
        unet=unet, scheduler=base.scheduler, requires_aesthetics_score=True,
    )  # fmt: skip
    refiner.save_pretrained(tmp_path / "refiner")
    common = ["--adapter", adapter, "--prompt", "x"]
    plain = draw(tmp_path / "plain", *common)["x-0-adapter.png"]
    refined = draw(tmp_path / "refined", *common, "--refiner", tmp_path / "refiner", "--refiner_start", 0.5)
    assert plain.shape == refined["x-0-adapter.png"].shape == (32, 32, 3)
    assert (plain != refined["x-0-adapter.png"]).any()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--adapter", "{tmp}/none"], "does not name the one it was trained on"),
        (["--adapter", "{tmp}/none", "--pretrained_model_name_or_path", "{sd}"], "none could not be loaded"),
        (
            ["--adapter", "{xl}", "--pretrained_model_name_or_path", "{sd}"],
            "could not be loaded into StableDiffusionPipe",
        ),
        (["--pretrained_model_name_or_path", "{tmp}/none"], "none does not exist: expected the folder of a diffusers"),
        (["--adapter", "{adapter}", "--refiner", "{sd}"], "--refiner is for SDXL"),
    ],
)
def test_mistakes(sd, sdxl, tmp_path, capsys, args, message):
    args = [a.format(tmp=tmp_path, sd=sd[0], adapter=sd[1], xl=sdxl[1]) for a in args]
    assert generate.run([*args, "--prompt", "x", "--output_dir", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit, match="0"):
        generate.run(["--help"])
    assert "--refiner_start" in capsys.readouterr().out

# SPDX-License-Identifier: Apache-2.0
"""examples/generate.py on tiny random pipelines."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import diffusers
import dreambooth_pipelines as tiny
from peft import LoraConfig
from PIL import Image

from examples import dreambooth_kron, generate
from peft_krona import KronAConfig
from peft_krona.convert import BASES, export, read_adapter
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
    names = [f"{p}-{s}-{k}.png" for k in ("base", "adapter") for p in ("01-a-dog", "02-two-cats") for s in (0, 7)]
    assert list(images) == [*names, "grid.png"]
    assert images["grid.png"].shape == (4 * 32, 2 * 32, 3)  # base above adapter, for both prompts
    assert (images["01-a-dog-0-base.png"] != images["01-a-dog-0-adapter.png"]).any()
    assert (images["01-a-dog-0-base.png"] != images["01-a-dog-7-base.png"]).any()
    assert "strength 1" in capsys.readouterr().out
    # an image depends on its prompt and seed alone
    alone = draw(
        tmp_path / "alone", "--adapter", adapter, "--prompt", "two cats", "--seed", 7, "--negative_prompt", "rain"
    )
    assert abs(alone["01-two-cats-7-adapter.png"] - images["02-two-cats-7-adapter.png"]).max() <= 1


def test_scale_and_merging(sd, tmp_path):
    pipeline, adapter = sd
    common = ["--pretrained_model_name_or_path", pipeline, "--prompt", "x"]
    base = draw(tmp_path / "b", *common)["01-x-0-base.png"]
    nothing = draw(tmp_path / "0", *common, "--adapter", adapter, "--scale", 0)["01-x-0-adapter.png"]
    plain = draw(tmp_path / "1", *common, "--adapter", adapter, "--scale", 0.5)["01-x-0-adapter.png"]
    merged = draw(tmp_path / "m", *common, "--adapter", adapter, "--scale", 0.5, "--merged")["01-x-0-adapter.png"]
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
    plain = draw(tmp_path / "plain", *common)["01-x-0-adapter.png"]
    refined = draw(tmp_path / "refined", *common, "--refiner", tmp_path / "refiner", "--refiner_start", 0.5)
    assert plain.shape == refined["01-x-0-adapter.png"].shape == (32, 32, 3)
    assert (plain != refined["01-x-0-adapter.png"]).any()


def test_prompts_never_share_a_file(sd, tmp_path):
    """Scripts without Latin letters, a long common beginning, no words at all, the same prompt twice."""
    prompts = ["猫", "犬", "a " * 40 + "cat", "a " * 40 + "dog", "!?", "犬"]
    images = draw(tmp_path, "--pretrained_model_name_or_path", sd[0], "--prompt", *prompts, "--height", 16,
                  "--width", 16, "--batch_size", 6)  # fmt: skip
    assert len(images) == len(prompts) + 1 == len(list(tmp_path.iterdir()))
    assert list(images)[:2] == ["01-猫-0-base.png", "02-犬-0-base.png"] and "05-prompt-0-base.png" in images
    assert max(len(f.name.encode()) for f in tmp_path.iterdir()) < 200
    assert len(generate.slug("\U00020000" * 100).encode()) < 200


@pytest.fixture(scope="module")
def lora(sd, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    LoraConfig(target_modules=["to_q"], base_model_name_or_path=str(sd[0])).save_pretrained(folder / "unet")
    return folder


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--adapter", "{tmp}/none"], "--adapter {tmp}/none does not exist: expected a trained adapter's folder or"),
        (["--adapter", "{tmp}/none", "--pretrained_model_name_or_path", "{sd}"], "none does not exist: expected"),
        (["--adapter", "user/name"], "No base model: --adapter user/name is not on this disk; give --pretrained"),
        (["--adapter", "{tmp}/nameless"], "nameless does not name the one it was trained on; give --pretrained"),
        (["--adapter", "{tmp}/broken"], "unet/adapter_config.json is no config of an adapter: Expecting"),
        (
            ["--adapter", "{tmp}/empty", "--pretrained_model_name_or_path", "{sd}"],
            "with peft_type in it, got {{}}. Save",
        ),
        ([], "No base model: give --pretrained_model_name_or_path, or --adapter with one that names it."),
        (
            ["--adapter", "{xl}", "--pretrained_model_name_or_path", "{sd}"],
            "could not be loaded into StableDiffusionPipe",
        ),
        (["--pretrained_model_name_or_path", "{tmp}/none"], "none does not exist: expected the folder of a diffusers"),
        (["--adapter", "{adapter}", "--refiner", "{sd}"], "--refiner is for SDXL"),
        (["--adapter", "{lora}", "--merged", "--compare"], "--merged is for KronA; --adapter {lora} is of type LORA."),
        (["--adapter", "{adapter}", "--height", "100000"], "--height 100000: expected at most 512, for a StableDiff"),
        (["--adapter", "{adapter}", "--width", "520"], "--width 520: expected at most 512, for a StableDiffusionPip"),
        (
            ["--adapter", "{adapter}", "--height", "512", "--width", "136"],
            "--height 512 --width 136: expected at most 65,536 pixels, as 256 x 256, for a StableDiffusionPipe",
        ),
        (
            ["--adapter", "{adapter}", "--num_inference_steps", "1001"],
            "--num_inference_steps 1001: expected at most 1000",
        ),
        (["--adapter", "{adapter}", "--output_dir", "{tmp}/file"], "--output_dir {tmp}/file: expected a folder to"),
        (["--adapter", "{adapter}", "--output_dir", "{tmp}/file/x"], "--output_dir {tmp}/file/x: expected a folder to"),
    ],
)
def test_mistakes(sd, sdxl, lora, tmp_path, monkeypatch, capsys, args, message):
    """Each is told in one line before anything is drawn."""
    monkeypatch.setattr(generate, "draw", lambda *_: pytest.fail("drew images"))
    (tmp_path / "file").touch()
    for name, text in (("broken", "{"), ("empty", "{}"), ("nameless", '{"peft_type": "KRONA"}')):
        (tmp_path / name / "unet").mkdir(parents=True)
        (tmp_path / name / "unet" / "adapter_config.json").write_text(text)
    names = {"tmp": tmp_path, "sd": sd[0], "adapter": sd[1], "xl": sdxl[1], "lora": lora}
    args = ["--output_dir", "{tmp}/out", *args, "--prompt", "x"]
    assert generate.run([a.format(**names) for a in args]) == 2
    *_, last = capsys.readouterr().err.splitlines()  # before it, progress bars of loading
    assert last.startswith("error: ") and message.format(**names) in last
    assert not list(tmp_path.glob("out/*"))


def test_sizes_that_people_draw():
    """Eight times the side of what the pipeline was made for; panoramas."""
    pipe = SimpleNamespace(scheduler=diffusers.DDIMScheduler())
    for usual, height, width in ((512, 4096, 4096), (512, 512, 8192), (1024, 4096, 4096), (1024, 8192, 8192)):
        generate.check_area(pipe, usual, {"--height": height, "--width": width})
    generate.check_steps(pipe, "--num_inference_steps", 1000)


@pytest.mark.parametrize("error", [MemoryError("9 TiB"), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9")])
def test_too_little_memory_is_told_in_one_line(monkeypatch, capsys, error):
    def main(args):
        raise error

    monkeypatch.setattr(dreambooth_kron, "main", main)
    assert dreambooth_kron.run(["--demo", "dog"]) == 2
    assert "9" in (said := capsys.readouterr().err) and "error: not enough memory (" in said
    assert "try --gradient_checkpointing, --train_batch_size 1" in said
    monkeypatch.setattr(generate, "main", main)
    assert generate.run(["--prompt", "x"]) == 2
    assert "9" in (said := capsys.readouterr().err) and said.startswith("error: not enough memory (")
    assert "try a smaller --height and --width, --batch_size 1" in said
    error = RuntimeError("a fault of ours")
    with pytest.raises(RuntimeError, match="a fault of ours"):
        generate.run(["--prompt", "x"])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--batch_size", "0"], "--batch_size: expected an integer of at least 1, received '0'"),
        (["--batch_size", "-1"], "--batch_size: expected an integer of at least 1, received '-1'"),
        (["--num_inference_steps", "0"], "--num_inference_steps: expected an integer of at least 1, received '0'"),
        (["--seed", "1", "-1"], "--seed: expected an integer from 0 to 2**64 - 1, received '-1'"),
        (["--seed", str(2**64)], "--seed: expected an integer from 0 to 2**64 - 1, received '18446744073709551616'"),
        (["--device", "foo"], "--device: expected a device such as cpu or cuda:0, received 'foo' (Expected one of"),
    ],
)
def test_values_that_no_flag_takes(args, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        generate.build_parser().parse_args(["--prompt", "x", *args])
    assert message in capsys.readouterr().err


def test_the_base_model_is_found_beside_every_form_of_an_adapter(sd, tmp_path):
    pipeline, adapter = sd
    file = export(read_adapter(adapter), tmp_path / "one", "lora", base_model=BASES["sd15"]).files[0]
    for path in (adapter, adapter / "unet", file):
        configs = generate.adapter_configs(str(path))
        assert generate.base_model(str(path), configs) == str(pipeline)
    assert generate.build_parser().parse_args(["--prompt", "x", "--seed", str(2**64 - 1)]).seed == [2**64 - 1]


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit, match="0"):
        generate.run(["--help"])
    assert "--refiner_start" in capsys.readouterr().out

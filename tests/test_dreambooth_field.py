# SPDX-License-Identifier: Apache-2.0
"""What people's folders, flags and machines bring: pictures and captions of every kind, black pictures, interrupts."""

from __future__ import annotations

import json
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rounding import HALF
from safetensors.torch import save_file

pytest.importorskip("diffusers")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import diffusers
import dreambooth_pipelines as tiny
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from PIL import Image

from examples import dreambooth_kron, generate
from examples.dreambooth import TrainingError, checkpoint, data, evaluate, images, interrupts, optim
from examples.dreambooth.arguments import parse_args
from examples.dreambooth.class_images import make_class_images
from examples.dreambooth.families import known
from examples.dreambooth.prompts import say_cut

ROOT = Path(dreambooth_kron.__file__).resolve().parents[1]
BASIC = ["--pretrained_model_name_or_path", "p", "--instance_data_dir", "d", "--instance_prompt", "a sks dog"]


@pytest.fixture(scope="module")
def tiny_sdxl(tmp_path_factory):
    return tiny.build(tmp_path_factory.mktemp("sdxl"), "sdxl")


@pytest.fixture
def accelerator():
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(True)
    PartialState._reset_state()


def read(folder, prompt="default", **more):
    """{name: caption} and what was said."""
    said = []
    pictures = data.read_folder(folder, prompt, say=said.append, **more)
    assert len(said) <= 1
    return {Path(p.name).name: p.caption for p in pictures}, "".join(said)


# -- captions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "captions", "said"),
    [
        ({}, {}, ""),
        ({"0.caption": "c"}, {"0.png": "c"}, "2 images without a caption, which get the prompt for all (1.png, 2.png)"),
        ({"0.TXT": "c", "1.CAPTION": "d", "2.txt": "e"}, {"0.png": "c", "1.png": "d", "2.png": "e"}, ""),
        ({"0.png.txt": "c", "1.png.caption": "d", "2.txt": "e"}, {"0.png": "c", "1.png": "d", "2.png": "e"}, ""),
        ({"0.txt": "c", "0.caption": "d"}, {"0.png": "c"}, "1 captions for images that have another caption (0.cap"),
        ({"0.txt": " \n", "0.caption": "d"}, {"0.png": "d"}, "1 captions without text (0.txt)"),
        ({"9.txt": "c"}, {}, "1 captions for images that are not there (9.txt)"),
        (
            {"metadata.jsonl": '{"file_name": "./0.png", "text": "c"}\n\n{"file_name": "x/7.png", "text": "d"}'},
            {"0.png": "c"},
            "1 rows of metadata.jsonl for images that are not there (x/7.png)",
        ),
        ({"metadata.csv": 'file_name,text\n.\\0.png,"c, d"\n1.png,'}, {"0.png": "c, d"}, "2 images without a caption"),
        ({"metadata.jsonl": '{"file_name": "0.png", "prompt": "c"}'}, {"0.png": "c"}, "2 images without"),
        (
            {"metadata.jsonl": '{"file_name": "0.png", "text": "c"}\n{"file_name": "0.png", "text": "d"}'},
            {"0.png": "d"},
            "1 rows of metadata.jsonl for an image that has another, of which the last is used (0.png)",
        ),
        (
            {"metadata.jsonl": '{"file_name": "0.png", "text": "c"}', "metadata.csv": "", "0.txt": "d"},
            {"0.png": "c"},
            "1 captions for images that have another caption (0.txt); 2 images without a caption, which get the prompt "
            "for all (1.png, 2.png); 1 other files left aside (metadata.csv)",
        ),
        ({"notes.md": "", ".DS_Store": "", "old/9.png": ""}, {}, "1 folders left aside (old); 2 other files"),
        ({"metadata.csv": 'file_name,text\n0.png,"c\nd, e"\n'}, {"0.png": "c\nd, e"}, "2 images without a caption"),
        ({"metadata.csv": 'file_name, text\n0.png, "c, d"\n'}, {"0.png": "c, d"}, "2 images without a caption"),
        ({"metadata.csv": "file_name,text\n0.png\n"}, {}, "3 images without a caption"),
        ({"metadata.csv": ""}, {}, "3 images without a caption, which get the prompt for all (0.png, 1.png, 2.png)"),
        ({"metadata.csv": "file_name,text\n"}, {}, "3 images without a caption"),
        ({"metadata.jsonl": '{"file_name": "0.png", "text": null}'}, {}, "3 images without a caption"),
        ({"metadata.jsonl": '{"file_name": "0.png", "text": " \\n"}', "0.txt": "c"}, {"0.png": "c"}, "2 images w"),
        ({"metadata.jsonl": '{"file_name": "0.png", "text": " c "}'}, {"0.png": "c"}, "2 images without"),
        ({"metadata.jsonl": '{"file_name": "0.png", "text": "c\u2028d\x85e"}'}, {"0.png": "c\u2028d\x85e"}, "2 ima"),
        ({"0.txt/x.txt": "c"}, {}, "1 folders left aside (0.txt)"),
    ],
)  # fmt: skip
def test_captions_of_every_spelling(tmp_path, files, captions, said):
    tiny.images(tmp_path)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    found, line = read(tmp_path)
    assert found == {"0.png": "default", "1.png": "default", "2.png": "default"} | captions
    assert said in line and bool(said) == bool(line)
    assert line.count("\n") == 0


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"0.caption": b"\xfc"}, r"0\.caption is not UTF-8 text.*: save it as UTF-8"),
        ({"metadata.csv": b"file,text\n0.png,c"}, r"metadata\.csv, line 2: expected file_name and 'text' \(found 'fi"),
        ({"metadata.jsonl": b'{"file_name": "0.png", "words": "c"}'}, r"\(found 'file_name', 'words'\); choose an"),
        ({"metadata.jsonl": b'{"file_name": "0.png"'}, r"metadata\.jsonl, line 1: expected a JSON object"),
        ({"metadata.csv": b"file_name,text\n0.png,a dog, red, big\n"}, r"line 2: expected 2 fields .* found 4\. Put a"),
        ({"metadata.csv": b'file_name,text\n0.png,"a dog\n1.png,b\n'}, r"not a table of comma-.*Are its quotes closed"),
        ({"metadata.csv": b"file_name,text\n0.png," + b"x" * 200_000}, r"not a table of comma-.*field larger"),
        ({"metadata.jsonl": b"[" * 100_000}, r"metadata\.jsonl, line 1: expected a JSON object"),
        ({"metadata.jsonl": b"[1]"}, r"metadata\.jsonl, line 1: expected a JSON object with file_name, found \[1\]"),
    ],
)  # fmt: skip
def test_captions_that_no_one_can_use(tmp_path, files, message):
    tiny.images(tmp_path, 1)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(TrainingError, match=message):
        data.read_folder(tmp_path, "default")
    # a class folder's captions are not used, so they are no error
    assert read(tmp_path, "a dog", captions=False)[0] == {"0.png": "a dog"}


def test_the_input_folders_neighbours_are_named(tmp_path):
    tiny.images(tmp_path / "input", 1)
    tiny.images(tmp_path / "generated", 1)
    (tmp_path / "notes.txt").touch()
    assert "1 folders left aside (generated); 1 other files left aside (notes.txt)" in read(tmp_path)[1]


# -- pictures --------------------------------------------------------------------------------------------------------

RAMP = np.arange(0, 256, 17, dtype=np.uint8).reshape(4, 4)
RGBA = np.dstack([RAMP, RAMP, RAMP, np.where(RAMP > 100, 255, 0)]).astype(np.uint8)


def saved(path, array, **more):
    Image.fromarray(array).save(path, **more)


def animated(path):
    frames = [Image.fromarray(RAMP), Image.fromarray(255 - RAMP)]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def rotated(path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(RAMP).copy()).save(path, exif=exif)


def palette(path):
    image = Image.fromarray(RAMP).convert("P")
    image.save(path, transparency=0)


def grey(array):
    return np.repeat(array[..., None], 3, 2).astype(int)


@pytest.mark.parametrize(
    ("name", "write", "expected", "said"),
    [
        *((f"a.{s}", lambda p: saved(p, RAMP, format="PNG"), grey(RAMP), "") for s in ("jfif", "JPE", "heic", "mpo")),
        ("a.avif", lambda p: saved(p, np.repeat(RAMP[..., None], 3, 2), quality=100), grey(RAMP), ""),
        ("a.tif", lambda p: saved(p, (RAMP / 255).astype(np.float32)), grey(RAMP), "1 images with more than 8 bits"),
        ("a.tif", lambda p: saved(p, RAMP.astype(np.float32)), grey(RAMP), "more than 8 bits a channel, scaled to 8"),
        ("a.tif", lambda p: saved(p, RAMP.astype(np.float32) * 257), grey(RAMP), "more than 8 bits"),
        ("a.tif", lambda p: saved(p, RAMP.astype(np.int32) * 257), grey(RAMP), "more than 8 bits"),
        ("a.png", lambda p: saved(p, RAMP.astype(np.uint16) * 257), grey(RAMP), "more than 8 bits"),
        ("a.png", animated, grey(RAMP), "1 images with several frames, of which the first is used (a.png)"),
        ("a.png", lambda p: saved(p, RGBA), grey(np.where(RAMP > 100, RAMP, 255)), "parts, which become white"),
        ("a.png", lambda p: saved(p, np.dstack([RGBA[..., :3], RAMP * 0 + 255])), grey(RAMP), ""),
        ("a.png", palette, grey(np.where(RAMP > 0, RAMP, 255)), "with transparent parts"),
        ("a.png", rotated, grey(RAMP), "turned upright as their EXIF data say"),
        ("a.tif", lambda p: Image.new("CMYK", (4, 4)).save(p), grey(RAMP * 0 + 255), "from CMYK"),
        ("a.png", lambda p: saved(p, RAMP[:1, :1]), grey(RAMP[:1, :1]), ""),
    ],
)  # fmt: skip
def test_images_of_every_kind(tmp_path, name, write, expected, said):
    write(tmp_path / name)
    _, line = read(tmp_path)
    found = np.asarray(images.open_image(tmp_path / name)).astype(int)
    assert found.shape == expected.shape and abs(found - expected).max() <= (3 if name.endswith("avif") else 0)
    assert said in line and bool(said) == bool(line), line


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.png", b"", r"a\.png cannot be read as an image .*remove it from the folder"),
        (
            "a.heic",
            b"\0\0\0\x18ftypheic",
            r"a\.heic cannot be read as an image .*pip install pillow-heif, or con",
        ),
        ("a.DNG", b"II*\0", r"a\.DNG cannot be read as an image \(a camera's raw file; convert"),
        ("a.jpg", None, r"a\.jpg cannot be read as an image"),  # cut off
        ("a.tif", np.array([[-1.0, 2.0]], np.float32), r"its values go from -1 to 2; expected 0 to 1, 255 or 65535"),
        ("a.tif", np.array([[0, 1.02]], np.float32), r"its values go from 0 to 1\.02; expected 0 to 1"),  # beyond white
        ("a.tif", np.array([[0, 9.5]], np.float32), r"its values go from 0 to 9\.5; expected 0 to 1"),
        ("a.tif", np.array([[0, np.nan]], np.float32), r"its values go from nan to nan"),
        ("a.tif", np.array([[0, 70000]], np.int32), r"its values go from 0 to 70000; expected"),
    ],
)
def test_images_that_are_refused_by_name(tmp_path, name, content, message):
    tiny.images(tmp_path, 1)
    if isinstance(content, np.ndarray):
        saved(tmp_path / name, content)
    elif content is None:
        saved(tmp_path / name, np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:900])
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(TrainingError, match=message):
        data.read_folder(tmp_path, "default")


def test_a_long_strip_is_cropped_before_it_grows(monkeypatch):
    """20,000 pixels wide and one high would become 10,240,000 wide; the part that is wanted is the same."""
    row = np.repeat(np.arange(20_000)[None, :, None] * 255 // 20_000, 3, 2).astype(np.uint8)
    strip, size = Image.fromarray(row), (512, 512)
    pixels, (top, left) = data.fit(strip, size, (0.5, 0.25), False, "bilinear")
    assert top == 0 and abs(left - 0.25 * (10_240_000 - 512)) <= 1
    assert pixels.shape == (3, 512, 512) and abs((pixels.mean() + 1) * 127.5 - 0.25 * 255) < 1
    small = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 90, 3), np.uint8))
    for flip in (False, True):
        whole, corner = data.fit(small, (32, 32), (0.3, 0.6), flip, "nearest")
        with monkeypatch.context() as patch:
            patch.setattr(data, "LARGEST", 0)
            part, same = data.fit(small, (32, 32), (0.3, 0.6), flip, "nearest")
        assert corner == same and (whole != part).float().mean() < 0.2  # nearest neighbours, to half a pixel


def test_pictures_smaller_than_their_shape_are_named(tmp_path):
    tiny.images(tmp_path, 1, (8, 40))
    pictures = data.read_folder(tmp_path, "x")
    data.DreamBoothDataset(pictures, [(32, 32)])
    assert data.enlarged(pictures, [(32, 32)]) == ["0.png"]


def test_datasets_go_to_worker_processes(tmp_path):
    """Windows, macOS and Python 3.14 send them pickled."""
    hf = pytest.importorskip("datasets")
    tiny.images(tmp_path, 2)
    rows = hf.Dataset.from_dict({"image": [str(tmp_path / "0.png")]}).cast_column("image", hf.Image())
    of_dataset = data.Picture(data.DatasetImage(rows, "d", "image", 0), "d[0]", "x", (40, 40))
    pictures = [*data.read_folder(tmp_path, "x"), of_dataset]
    dataset = data.DreamBoothDataset(pictures, [(32, 32)], pictures[:1])
    for index in (0, 1, 2, 3):
        if index == 3:  # with cached latents
            for picture in pictures:
                picture.latents = {((32, 32), False): (torch.ones(1), torch.ones(1), (0, 0))}
        sent = pickle.loads(pickle.dumps(dataset))
        index %= 3
        one, other = (data.collate([d[index, 5]]) for d in (dataset, sent))
        assert one.keys() == other.keys()
        assert all(torch.equal(v, other[k]) if isinstance(v, torch.Tensor) else v == other[k] for k, v in one.items())
    pickle.dumps((data.collate, interrupts.left_to_the_main_process))


# -- prompts and flags -----------------------------------------------------------------------------------------------


def test_cut_prompts_are_named(tiny_sdxl):
    pipe = diffusers.DiffusionPipeline.from_pretrained(tiny_sdxl)
    windows, said = known()[type(pipe).__name__](pipe).windows(), []
    long = "abcdefghijklmnopqrstuvwxyz"  # a letter a token, 24 tokens with both ends
    say_cut(windows, ["a dog", long, long + "!", ""], said.append)
    (line,) = said
    assert line.startswith("warning: 2 prompts are longer") and line.endswith("loses its end 'wxyz'.")
    say_cut(windows, ["a dog", "abcdefghijklmnopqrstuv"], said.append)
    assert len(said) == 1


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--lr_warmup_steps", "5"], "--lr_warmup_steps has no effect: only with --lr_scheduler linear"),
        (["--lr_warmup_steps", "5", "--lr_scheduler", "cosine"], None),
        (["--lr_warmup_steps", "5", "--optimizer", "schedulefree"], None),
        (["--lr_num_cycles", "2", "--lr_scheduler", "cosine"], "--lr_num_cycles has no effect: only with --lr_sch"),
        (["--lr_power", "2"], "--lr_power has no effect: only with --lr_scheduler polynomial"),
        (["--lr_step_rules", "1:2,3"], "--lr_step_rules has no effect: only with --lr_scheduler piecewise_constant"),
        (["--num_class_images", "5"], "--num_class_images has no effect: only with --with_prior_preservation"),
        (["--image_column", "x", "--dataset_split", "y"], "--dataset_split, --image_column has no effect: only"),
        (["--num_train_epochs", "2", "--max_train_steps", "5"], "--num_train_epochs has no effect: --max_train_"),
        (["--num_train_epochs", "2"], None),
        (["--prodigy_beta3", "0.9"], "--prodigy_beta3 has no effect: only with --optimizer prodigy"),
        (["--validation_steps", "2"], "--validation_steps has no effect: only with --validation_prompt"),
        (["--validation_steps", "2", "--validation_epochs", "3", "--validation_prompt", "x"], "--validation_epochs"),
        (["--hub_token", "x"], "--hub_token has no effect: only with --push_to_hub"),
        (["--report_to", "none", "--logging_dir", "x"], "--logging_dir has no effect"),
    ],
)  # fmt: skip
def test_flags_without_effect_in_the_chosen_setting(capsys, more, said):
    parse_args([*BASIC, *more])
    printed = capsys.readouterr().out
    assert (f"warning: {said}" in printed) if said else printed == ""


def test_adams_flags_with_an_optimizer_that_takes_none(capsys):
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "weight_decay": 0.5}]
    optim.build_optimizer(groups, "Rprop", 1e-3, betas=(0.8, 0.9), eps=1e-3)
    assert (
        "--adam_beta1 and --adam_beta2, --adam_epsilon, --adam_weight_decay has no effect: Rprop"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize("flag", ["learning_rate", "prior_loss_weight", "validation_guidance_scale", "lr_power"])
def test_numbers_that_are_not_finite(flag):
    with pytest.raises(TrainingError, match=f"--{flag} inf: expected a finite number"):
        parse_args([*BASIC, f"--{flag}", "inf"])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--height", "0"], "--height: expected an integer of at least 1, received '0'"),
        (["--width", "-8"], "--width: expected an integer of at least 1, received '-8'"),
        (["--guidance_scale", "nan"], "--guidance_scale: expected a finite number, received 'nan'"),
        (["--scale", "inf"], "--scale: expected a finite number, received 'inf'"),
        (["--refiner_start", "1.5"], "--refiner_start: expected a number between 0 and 1, received '1.5'"),
    ],
)
def test_what_generate_cannot_draw(args, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        generate.build_parser().parse_args(["--prompt", "x", *args])
    assert message in capsys.readouterr().err


def test_generate_never_draws_another_size(tiny_sdxl, tmp_path, capsys):
    common = ["--pretrained_model_name_or_path", str(tiny_sdxl), "--prompt", "x" * 40, "--output_dir", str(tmp_path)]
    assert generate.run([*common, "--height", "50"]) == 2
    assert "--height 50: a StableDiffusionXLPipeline makes multiples of 8; give 48 or 56." in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# -- precision and files ---------------------------------------------------------------------------------------------


def overflowing(pipe):
    """A VAE like SDXL's: right in fp32, infinite in fp16 in the middle of the decoder."""
    pipe.vae.register_to_config(force_upcast=True)
    with torch.no_grad():
        pipe.vae.decoder.conv_in.weight.mul_(1e5)
        pipe.vae.decoder.conv_in.bias.mul_(1e5)
    return pipe


def test_validation_pictures_are_not_black_in_half_precision(tiny_sdxl, capsys):
    pipe = overflowing(diffusers.DiffusionPipeline.from_pretrained(tiny_sdxl))
    settings = {"num_inference_steps": 1, "output_type": "np"}
    exact = evaluate.validation(pipe, ["x"], 1, 0, (32, 32), **settings)[0]
    half = evaluate.validation(pipe, ["x"], 1, 0, (32, 32), torch.autocast("cpu", torch.float16), **settings)[0]
    assert half.std() > 0.01 and abs(half - exact).max() <= 64 * HALF
    assert "decode" not in vars(pipe.vae)

    pipe.vae.decoder.conv_out.bias.data.fill_(float("nan"))
    assert evaluate.validation(pipe, ["x"], 1, 0, (32, 32), **settings) == [None]
    assert "1 of 1 images have values that are not finite, the first with seed 0 for 'x'" in capsys.readouterr().out
    with pytest.raises(TrainingError, match="would be black: not saved"):
        evaluate.sample(pipe, ["x"], [0], (32, 32), **settings)


def test_pictures_that_are_not_finite_are_not_saved(tmp_path):
    evaluate.save_images([None, Image.new("RGB", (8, 8))], tmp_path / "v", 2)
    assert sorted(p.name for p in (tmp_path / "v").iterdir()) == ["01.png", "grid.png"]
    assert Image.open(tmp_path / "v" / "grid.png").size == (16, 8)


def test_class_images_in_half_precision_leave_the_base_as_it_is(tiny_sdxl, tmp_path, accelerator):
    loaded = []

    def load(dtype):
        loaded.append(evaluate.base_pipeline(str(tiny_sdxl), dtype=dtype))
        return loaded[-1]

    make_class_images(load, tmp_path, "a dog", 1, (16, 16), accelerator, precision="bf16")
    make_class_images(load, tmp_path, "a dog", 1, (16, 16), accelerator, precision="bf16")  # it is there
    assert [p.name for p in tmp_path.iterdir()] == ["class-00000.png"]
    assert [pipe.unet.dtype for pipe in loaded] == [torch.bfloat16]  # of its own, not the one that is trained


def test_folders_of_one_variant(tmp_path, capsys):
    tiny.build(tmp_path / "plain")
    assert evaluate.only_variant(tmp_path / "plain") is None
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "plain").to(torch.float16)
    pipe.save_pretrained(tmp_path / "half", variant="fp16")
    pipe.save_pretrained(tmp_path / "plain", variant="fp16")
    loaded = evaluate.load_pipeline(str(tmp_path / "half"))
    assert "has weights of the variant fp16 only, which are taken" in capsys.readouterr().out
    assert torch.equal(loaded.unet.conv_in.weight, pipe.unet.conv_in.weight.float())
    both = evaluate.load_pipeline(str(tmp_path / "plain"))
    assert capsys.readouterr().out == "" and not torch.equal(both.unet.conv_in.weight, loaded.unet.conv_in.weight)


# -- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    output = tmp_path_factory.mktemp("saved")
    for step in (1, 2):
        folder = output / f"checkpoint-{step}"
        (folder / "unet").mkdir(parents=True)
        (folder / checkpoint.STATE).write_text(json.dumps({"step": step, "settings": {}}))
        (folder / "optimizer.bin").write_bytes(bytes(range(200)))
        save_file({"A": torch.ones(50)}, folder / "unet" / "adapter_model.safetensors")
        checkpoint.write_checksums(folder)
    return output


def flip(path):
    content = bytearray(path.read_bytes())
    content[50:114] = bytes(b ^ 255 for b in content[50:114])
    path.write_bytes(content)


def diverged(path):
    save_file({"A": torch.tensor([1.0, torch.nan])}, path)
    checkpoint.write_checksums(path.parents[1])


def no_step(path):
    path.write_text('{"step": -1, "settings": {}}')
    checkpoint.write_checksums(path.parent)


@pytest.mark.parametrize("wanted", ["latest", "checkpoint-2"])
@pytest.mark.parametrize(
    ("name", "damaging", "message"),
    [
        ("unet/adapter_model.safetensors", flip, r"is damaged \(its content is not what was saved: the SHA-256 "),
        ("optimizer.bin", lambda p: p.write_bytes(b""), r"optimizer\.bin is damaged \(0 bytes; 200 were saved\)"),
        ("optimizer.bin", lambda p: p.unlink(), r"optimizer\.bin is damaged \(the file is missing\)"),
        ("training_state.json", lambda p: p.write_text("{}"), r"training_state\.json is damaged \(2 bytes; "),
        ("training_state.json", lambda p: p.unlink(), r"training_state\.json is damaged \(the file is missing\)"),
        ("training_state.json", no_step, r"training_state\.json is damaged \(ValueError\('step -1'\)\)"),
        ("checksums.json", lambda p: p.write_text("{"), r"checksums\.json is damaged \(JSONDecodeError"),
        ("checksums.json", lambda p: p.write_text("[]"), r"checksums\.json is damaged \(AttributeError"),
        ("checksums.json", lambda p: p.unlink(), r"checksums\.json is missing"),
        ("checksums.json", lambda p: p.write_text("{}"), r"optimizer\.bin is not one of the files that were saved"),
        ("custom_checkpoint_1.pkl", lambda p: p.touch(), r"_1\.pkl is not one of the files that were saved \("),
        ("unet/adapter_model.safetensors", diverged, r"adapter_model\.safetensors holds NaN or infinite values"),
    ],
)  # fmt: skip
def test_a_damaged_checkpoint_is_never_resumed(tmp_path, accelerator, two_checkpoints, wanted, name, damaging, message):
    shutil.copytree(two_checkpoints, tmp_path, dirs_exist_ok=True)
    run = checkpoint.Checkpoints(accelerator, tmp_path, {})
    assert run.find(wanted) == tmp_path / "checkpoint-2"
    damaging(tmp_path / "checkpoint-2" / name)
    with pytest.raises(TrainingError, match=message) as raised:
        run.find(wanted)
    assert "the newest whole one is taken by --resume_from_checkpoint checkpoint-1)" in str(raised.value)
    assert run.find("checkpoint-1") == tmp_path / "checkpoint-1"
    flip(tmp_path / "checkpoint-1" / "optimizer.bin")
    with pytest.raises(TrainingError, match=r"start anew with --overwrite_output_dir; no other is whole"):
        run.find("checkpoint-1")


def test_what_is_no_part_of_a_checkpoint_is_left_alone(tmp_path, accelerator, two_checkpoints, capsys):
    shutil.copytree(two_checkpoints, tmp_path, dirs_exist_ok=True)
    for name in ("checkpoint-2/notes.txt", "checkpoint-2/.DS_Store", "checkpoint-3/pytorch_lora_weights.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert checkpoint.Checkpoints(accelerator, tmp_path, {}).find("latest") == tmp_path / "checkpoint-2"
    assert "note: checkpoint-3 in " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "name", "message"),
    [
        ({}, "checkpoint-2/optimizer.bin", r"--resume_from_checkpoint {there}/checkpoint-1\)"),  # none of this folder's
        ({"optimizer": "SGD"}, None, r"was trained with --optimizer AdamW; received --optimizer SGD"),
    ],
)
def test_nothing_is_removed_for_a_checkpoint_that_cannot_be_resumed(
    tmp_path, accelerator, two_checkpoints, settings, name, message
):
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        shutil.copytree(two_checkpoints, folder)
    (there / "checkpoint-2" / checkpoint.STATE).write_text('{"step": 2, "settings": {"optimizer": "AdamW"}}')
    checkpoint.write_checksums(there / "checkpoint-2")
    if name:
        flip(there / name)
    run = checkpoint.Checkpoints(accelerator, here, {"optimizer": "adamw"} | settings, overwrite=True)
    with pytest.raises(TrainingError, match=message.format(there=there)):
        run.find(str(there / "checkpoint-2"))
    assert [path.name for path in checkpoint.checkpoints(here)] == ["checkpoint-1", "checkpoint-2"]


# -- interrupts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("script", ["dreambooth_kron.py", "generate.py"])
def test_interrupted_while_importing(script, number):
    """The signal comes when the first large library is asked for, before it is there."""
    program = (
        f"import os, runpy, sys; sys.argv = ['x', '--prompt', 'x']\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == 'torch': os.kill(os.getpid(), {int(number)})\n"
        "sys.meta_path.insert(0, Finder())\n"
        f"runpy.run_path({str(ROOT / 'examples' / script)!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, interrupts.MESSAGE + "\n"), done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_a_signal_does(number, capsys):
    state, steps = interrupts.Interrupts(), []
    with pytest.raises(KeyboardInterrupt), state.handled():
        signal.raise_signal(number)
        steps.append("not reached")
    with state.handled():
        with state.deferred():
            signal.raise_signal(number)
            steps.append("ends")
        with state.deferred(second_ends=False):
            signal.raise_signal(number)
            steps.append("ends too")
        with pytest.raises(KeyboardInterrupt), state.deferred():
            signal.raise_signal(number)  # again
            steps.append("not reached")
        with pytest.raises(KeyboardInterrupt):
            state.check()
        state.take_back.append(lambda: steps.append("taken back"))
        assert state.ended() == 130
    assert steps == ["ends", "ends too", "taken back"] and capsys.readouterr().err == interrupts.MESSAGE + "\n"
    assert signal.getsignal(number) not in (state.on_signal, signal.SIG_IGN)
    state.check()  # nothing of it is left for what runs next in the process


@pytest.fixture(scope="module")
def tiny_sd(tmp_path_factory):
    return tiny.build(tmp_path_factory.mktemp("sd"))


@pytest.mark.parametrize(
    ("number", "where", "left"),
    [
        (signal.SIGTERM, "evaluate.base_pipeline", []),
        (signal.SIGINT, "objective.loss_of", ["checkpoint-1", "unet"]),
        (signal.SIGTERM, "adapters.save", ["checkpoint-1", "unet"]),  # saved whole, then the end
        (signal.SIGINT, "card.write_card", ["checkpoint-1", "unet"]),
    ],
)
def test_interrupted_before_in_and_after_the_loop(tiny_sd, tmp_path, capsys, monkeypatch, number, where, left):
    module, name = where.split(".")
    module = getattr(dreambooth_kron, module)
    original = getattr(module, name)
    calls = []

    def interrupted(*args, **kwargs):
        calls.append(name)
        # the first save is the checkpoint's, inside the loop
        if name != "save" or len(calls) == 2:
            signal.raise_signal(number)
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, interrupted)
    pictures = tiny.images(tmp_path / "pictures", 1)
    args = ["--pretrained_model_name_or_path", str(tiny_sd), "--instance_data_dir", str(pictures), "--instance_prompt",
            "x", "--output_dir", str(tmp_path / "out"), "--max_train_steps", "1", "--train_batch_size", "1",
            "--report_to", "none", "--export", "none", "--checkpointing_steps", "1"]  # fmt: skip
    try:
        assert dreambooth_kron.run(args) == 130
    finally:
        AcceleratorState._reset_state(True)
        PartialState._reset_state()
    assert capsys.readouterr().err.splitlines()[-1] == interrupts.MESSAGE
    assert sorted(p.name for p in (tmp_path / "out").glob("*")) == left
    assert not [p for p in tmp_path.rglob("*") if p.name.startswith(".tmp")]


def test_generate_interrupted_while_it_saves(tiny_sd, tmp_path, capsys, monkeypatch):
    save = Image.Image.save

    def interrupted(self, path, **more):
        save(self, path, **more)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Image.Image, "save", interrupted)
    args = ["--pretrained_model_name_or_path", str(tiny_sd), "--prompt", "x", "--num_inference_steps", "1"]
    assert generate.run([*args, "--output_dir", str(tmp_path)]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == interrupts.MESSAGE
    assert list(tmp_path.iterdir()) == []

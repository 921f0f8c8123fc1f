# SPDX-License-Identifier: Apache-2.0
"""What stands behind the page: uploads, the training's command and progress, counts, drawing. No browser, no Gradio."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image

from examples.app import models, takeaway, training, uploads
from examples.dreambooth import TrainingError, demo
from examples.dreambooth.adapters import trainable
from examples.dreambooth.arguments import adapter_config, parse_args


def picture(path, size=(64, 48), mode="RGB"):
    Image.new(mode, size, 1 if mode == "1" else None).save(path)
    return path


def test_uploads_are_copied_as_rgb(tmp_path):
    files = [picture(tmp_path / "a.png"), picture(tmp_path / "b.jpg"), picture(tmp_path / "c.png", mode="RGBA")]
    taken = uploads.take(files, tmp_path / "taken")
    assert [p.name for p in taken] == ["00.png", "01.png", "02.png"]
    assert all(Image.open(p).mode == "RGB" and Image.open(p).size == (64, 48) for p in taken)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda d: [], "Expected 1 to 8 pictures, got 0"),
        (lambda d: [picture(d / f"{i}.png") for i in range(9)], "Expected 1 to 8 pictures, got 9"),
        (lambda d: [picture(d / "tiny.png", (31, 400))], "tiny.png is 31 x 400 pixels; expected at least 32"),
        (lambda d: [picture(d / "wide.png", (60_000, 1000), "1")], "expected at most 50 million"),
        (lambda d: [write(d / "text.png", b"hello")], "text.png is no picture"),
        (lambda d: [write(d / "empty.jpg", b"")], "empty.jpg is no picture"),
        (lambda d: [write(d / "cut.png", picture(d / "x.png", (600, 600)).read_bytes()[:200])], "cut.png"),
        (lambda d: [write(d / "large.png", b"\0" * (uploads.MAX_BYTES + 1))], "expected at most 20 MiB"),
    ],
)
def test_uploads_that_are_refused(tmp_path, make, words):
    with pytest.raises(TrainingError, match=words):
        uploads.take(make(tmp_path), tmp_path / "taken")
    assert not (tmp_path / "taken").exists()


def write(path, content):
    path.write_bytes(content)
    return path


def settings(tmp_path, **changes):
    return training.Settings(str(demo.PIPELINE), tmp_path, "animal", tmp_path / "out", steps=10, **changes)


@pytest.mark.parametrize("kind, resume", itertools.product(("krona", "lora", "lokr"), (False, True)))
def test_the_command_is_one_that_the_script_takes(tmp_path, kind, resume):
    picture(tmp_path / "a.png")
    run = settings(tmp_path, kind=kind, a_in=8, rank=2)
    args = parse_args(run.command(resume)[2:])
    assert (args.adapter_type, args.rank, args.instance_prompt, args.max_train_steps) == (kind, 2, "a sks animal", 10)
    assert args.krona_a_in == (8 if kind == "krona" else 4)
    assert (args.resume_from_checkpoint == "latest") == resume
    assert args.overwrite_output_dir == (not resume)


def test_progress_is_read_from_the_bar(tmp_path):
    run = training.Training(settings(tmp_path))
    for line in (
        "Latents: 100%|####| 5/5 [00:00<00:00, 50.1it/s]",
        "StableDiffusionPipeline: 5 images, 0 class images, 1 shape(s)",
        "Steps:   0%|          | 0/10 [00:00<?, ?it/s]",
        "Steps:  10%|#         | 1/10 [00:00<00:03, 2.7it/s, loss=0.1234, lr=1.5e-02]",
        "Steps:  20%|##        | 2/10 [00:00<00:03, 2.7it/s, loss=2e-3, lr=1.5e-02]",
    ):
        run.read(line)
    assert run.losses == {1: 0.1234, 2: 0.002}
    assert list(run.log) == ["StableDiffusionPipeline: 5 images, 0 class images, 1 shape(s)"]
    assert run.state() == "Training: update 2 of 10."
    run.code = training.INTERRUPTED
    assert "Stopped at update 2 of 10" in run.state()
    run.log.append("error: the disk is full")
    run.code = 2
    assert run.state() == "error: the disk is full"
    run.log.clear()
    assert "exit code 2" in run.state()


def test_a_mistake_of_the_script_reaches_the_page(tmp_path):
    run = training.Training(settings(tmp_path / "no pictures"))
    last = list(run.follow())[-1]
    assert last.code == 2
    assert last.state().startswith("error:") and "no pictures" in last.state()


@pytest.fixture(scope="module")
def counter():
    return models.Counter(str(demo.PIPELINE))


@pytest.mark.parametrize("kind, a_in, rank", [("krona", 4, 1), ("krona", 8, 2), ("lora", 4, 4), ("lokr", 4, 4)])
def test_the_count_is_what_is_trained(counter, kind, a_in, rank):
    from diffusers import UNet2DConditionModel

    flags = ["--krona_a_in", str(a_in)] if kind == "krona" else []
    args = parse_args(
        ["--adapter_type", kind, "--rank", str(rank), "--instance_data_dir", ".", "--instance_prompt", "x", *flags,
         "--pretrained_model_name_or_path", "x", "--target_modules", *demo.TARGETS]
    )  # fmt: skip
    unet = UNet2DConditionModel.from_pretrained(demo.PIPELINE, subfolder="unet").requires_grad_(False)
    unet.add_adapter(adapter_config(args, "unet"))
    for _ in range(2):  # the counter is left as it was
        assert counter.count(kind, 64, a_in, rank) == trainable(unet)


def test_two_counts_at_once(counter):
    """The page asks for one while a training that is being started asks for another."""
    with ThreadPoolExecutor(4) as pool:
        counts = list(pool.map(lambda a_in: counter.count("krona", 64, a_in, 1), [4, 8] * 3))
    assert counts == [counter.count("krona", 64, 4, 1), counter.count("krona", 64, 8, 1)] * 3


@pytest.mark.parametrize("a_out, a_in, rank", [(0, 4, 1), (64, -1, 1), (64, 4, 0)])
def test_factors_that_are_refused(counter, a_out, a_in, rank):
    with pytest.raises((TrainingError, SystemExit)):
        counter.count("krona", a_out, a_in, rank)
    assert counter.count("krona", 64, 4, 1) == 66_992


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A folder with an adapter that changes what is drawn."""
    from diffusers import StableDiffusionPipeline

    from peft_krona import KronAConfig
    from peft_krona.pipelines import add_krona, save_krona_weights

    pipe = StableDiffusionPipeline.from_pretrained(demo.PIPELINE)
    torch.manual_seed(0)
    add_krona(pipe, KronAConfig(init_weights=False))
    folder = tmp_path_factory.mktemp("adapters") / "one"
    save_krona_weights(pipe, folder)
    return folder


def test_drawing(adapter, tmp_path):
    studio = models.Studio(str(demo.PIPELINE))
    how = {"steps": 1, "guidance": 1.0}
    base, same = studio.draw("a dog", 0, [], **how)
    assert base.tobytes() == same.tobytes()
    base_again, other = studio.draw("a dog", 0, [(adapter, 0.5)], **how)
    assert base_again.tobytes() == base.tobytes() != other.tobytes()
    _, none = studio.draw("a dog", 0, [(adapter, 0.0)], **how)
    assert none.tobytes() == base.tobytes()
    for words, bad in (
        ("prompt is empty", {"prompt": " "}), ("1 to 100 steps", {"steps": 0}), ("multiple of 8", {"side": 60}),
        ("holds no adapter", {"weights": [(tmp_path, 1.0)]}),
    ):  # fmt: skip
        with pytest.raises(TrainingError, match=words):
            studio.draw(**{"prompt": "a dog", "seed": 0, "weights": [], **how, **bad})


def test_what_was_learned_and_what_to_take(adapter, tmp_path):
    text = takeaway.learned(adapter, str(demo.PIPELINE), tmp_path / "learned.png")
    assert "56 layers" in text and (tmp_path / "learned.png").stat().st_size > 10_000
    files, words = takeaway.export(adapter, str(demo.PIPELINE), "ComfyUI", tmp_path / "one.safetensors")
    assert [f.name for f in files] == ["one.safetensors"] and "ComfyUI/models/loras" in words
    with pytest.raises(TrainingError, match=r"nothing"):
        takeaway.export(tmp_path / "nothing", str(demo.PIPELINE), "ComfyUI", tmp_path / "two.safetensors")

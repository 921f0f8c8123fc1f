# SPDX-License-Identifier: Apache-2.0
"""The code that makes the shipped pipeline: exact resume, what each stage trains, the gate, the exported folder."""

import copy
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from torch import nn
from torch.nn.functional import mse_loss

pytest.importorskip("pytorch_optimizer")

from examples.emoji_sd import clip, evaluate, export, gate, train, unet, vae
from examples.emoji_sd.loop import Loop, adamw, soap
from examples.emoji_sd.render import DRAWN_CONCEPTS, HELD_OUT_CONCEPTS, TRAINED_CONCEPTS
from examples.emoji_sd.text import build_tokenizer, tokenize


class Killed(Exception):
    pass


def tiny_loop(folder: Path, optimizer, steps=40, **kwargs) -> tuple[Loop, object]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.GroupNorm(2, 6), nn.GELU(), nn.Flatten(), nn.Linear(24, 3))
    loop = Loop("tiny", folder, model, optimizer(list(model.parameters()), 1e-2), steps, warmup=5, ema=0.9, **kwargs)

    def loss(step):
        x = torch.randn(4, 2, 4, 4)
        value = mse_loss(model(x), x.mean((2, 3)) @ torch.ones(2, 3))
        return value, {"loss": value}

    return loop, loss


@pytest.mark.parametrize("optimizer", [adamw, soap])
@pytest.mark.parametrize("saved_at", [3, 21, 39])  # in the warm-up, between two of SOAP's bases, before the last step
def test_a_killed_run_ends_as_an_unbroken_one(tmp_path, optimizer, saved_at):
    (tmp_path / "whole").mkdir()
    (tmp_path / "broken").mkdir()
    whole, loss = tiny_loop(tmp_path / "whole", optimizer)
    whole.run(loss)

    broken, loss = tiny_loop(tmp_path / "broken", optimizer)

    def killed(step):
        if step == saved_at:
            broken.save()
        if step == min(saved_at + 2, 39):  # what came after the save is lost
            raise Killed
        return loss(step)

    with pytest.raises(Killed):
        broken.run(killed)
    again, loss = tiny_loop(tmp_path / "broken", optimizer)
    assert again.step == saved_at
    again.run(loss)
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[key]), key
    for key, value in whole.averaged().items():
        assert torch.equal(value, again.averaged()[key]), key
    assert whole.schedule.get_last_lr() == again.schedule.get_last_lr()


def test_a_deadline_ends_a_piece_and_bends_nothing(tmp_path):
    loop, loss = tiny_loop(tmp_path, adamw, deadline=1.0)  # long past
    assert not loop.run(loss).finished
    assert loop.step == 0
    again, loss = tiny_loop(tmp_path, adamw)
    assert again.run(loss).finished
    assert again.schedule.get_last_lr() == [pytest.approx(0, abs=1e-12)]


def test_another_number_of_steps_is_refused(tmp_path):
    loop, loss = tiny_loop(tmp_path, adamw)
    loop.run(loss)
    with pytest.raises(ValueError, match="of a run of 40 tiny steps, not 50"):
        tiny_loop(tmp_path, adamw, steps=50)


def test_average(tmp_path):
    """Its decay is min(0.9, (1 + k) / (10 + k)) at update k; followed here in float64.  The weights stay."""
    loop, loss = tiny_loop(tmp_path, adamw, steps=12)
    key = "4.weight"
    expected = loop.model.state_dict()[key].double().clone()

    def followed(step):
        nonlocal expected
        if step:
            decay = min(0.9, step / (9 + step))
            expected = decay * expected + (1 - decay) * loop.model.state_dict()[key].double()
        return loss(step)

    loop.run(followed)
    decay = min(0.9, 12 / 21)
    last = loop.model.state_dict()[key].clone()
    expected = decay * expected + (1 - decay) * last.double()
    # each of 12 float32 updates errs by a few roundings of numbers below 1
    assert (loop.averaged()[key].double() - expected).abs().max() <= 12 * 4 * torch.finfo(torch.float32).eps
    assert torch.equal(loop.model.state_dict()[key], last)


def test_the_decoder_is_trained_alone(tmp_path):
    torch.manual_seed(0)
    autoencoder = vae.build()
    before = copy.deepcopy(autoencoder.state_dict())
    images = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)
    assert vae.train_decoder(tmp_path, autoencoder, images, steps=2)  # the first has a learning rate of 0
    changed = {k.split(".")[0] for k, v in autoencoder.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"decoder", "post_quant_conv"}


def test_the_pipeline_loads_and_draws(tmp_path):
    """What the stages build, exported untrained: plain diffusers loads it; attention suits adapters in blocks of 64."""
    tokenizer = build_tokenizer(tmp_path / "tokenizer")
    text, autoencoder = clip.build_text_encoder(tokenizer), vae.build()
    images = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    latents = vae.encode(autoencoder, images)
    assert latents[0].shape == (4, vae.CHANNELS, 16, 16)
    assert clip.LatentEncoder(vae.CHANNELS)(latents[0].float()).shape == (4, clip.WIDTH)
    ids = tokenize(tokenizer, ["a cat", "a red bus", "two pears", "a drum"])[:, None]
    loop = unet.train(tmp_path, latents, torch.ones(len(latents[0])), text, ids, ids[0, 0], steps=1)
    assert loop.finished

    model = unet.build(16, vae.CHANNELS, text.config.hidden_size)
    model.load_state_dict(unet.split(loop.averaged())[0])
    linears = [m for n, m in model.named_modules() if n.endswith(("to_q", "to_k", "to_v", "to_out.0"))]
    assert all(m.in_features % 64 == 0 and m.out_features % 64 == 0 for m in linears)
    weights = {k: v.clone() for k, v in autoencoder.state_dict().items()}
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "README.md").write_text("kept")
    export.export(tmp_path / "pipeline", autoencoder, text, tokenizer, model, ["cat", "bus"])
    assert all(torch.equal(v, weights[k]) for k, v in autoencoder.state_dict().items())
    assert export.concepts(tmp_path / "pipeline") == ["cat", "bus"]
    assert (tmp_path / "pipeline" / "README.md").read_text() == "kept"
    assert sum(p.stat().st_size for p in (tmp_path / "pipeline").rglob("*") if p.is_file()) <= 40e6
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "pipeline", torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a cat", num_inference_steps=1).images[0].size == (64, 64)


def test_the_shipped_autoencoder_passes_the_gate(tmp_path):
    found = gate.check(vae.load(train.PIPELINE / "vae"))
    assert found["passes"], found
    AutoencoderKL(latent_channels=16).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"latent channels are .* 16"):
        vae.load(tmp_path)


class Fake:
    """An autoencoder whose latents are the picture, blurred or not."""

    def __init__(self, blur: int):
        self.blur = blur

    def encode(self, x):
        x = nn.functional.avg_pool2d(x, self.blur, 1, self.blur // 2, count_include_pad=False)
        return type("", (), {"latent_dist": type("", (), {"mean": x})})

    def decode(self, z):
        return type("", (), {"sample": z})


def test_gate():
    same, blurred = gate.check(Fake(1)), gate.check(Fake(3))
    assert same == {"pictures": 75, "psnr": np.inf, "sharpness": 1.0, "passes": True}
    assert blurred["psnr"] < gate.PSNR and blurred["sharpness"] < gate.SHARPNESS
    assert not blurred["passes"]


def test_drawn_concepts():
    """Every class noun of a subject has a drawn concept: it is what an identifier is bound to."""
    classes = Counter(category for _, category in DRAWN_CONCEPTS.values())
    assert {category for _, category in HELD_OUT_CONCEPTS.values()} <= set(classes)
    assert len(DRAWN_CONCEPTS) == 75
    assert not set(DRAWN_CONCEPTS) & set(HELD_OUT_CONCEPTS)


def test_prompts_to_evaluate_name_what_was_learned(tmp_path):
    (tmp_path / "concepts.json").write_text(json.dumps(["cat", "apple"]))
    names, colours = evaluate.choose(tmp_path, 5)
    assert Counter(names).most_common(1)[0][1] == 3 and len(colours) == 5  # as often as each other, as far as it goes
    assert evaluate.prompt("apple", "orange") == "an apple on an orange background"
    assert set(export.concepts(train.PIPELINE)) <= set(TRAINED_CONCEPTS)


def test_common_scenes_come_three_times_as_often():
    common = ("a bear on a green background", "an elephant", "a photo of a leftover on an orange background")
    others = (
        "a small cat on a red background", "a bear on a green background on the left", "two pears",
        "a bird on a striped red background", "a large corn", "a doughnut on a gradient green background",
    )  # fmt: skip
    assert {train.weight(c) for c in common} == {3.0} and {train.weight(c) for c in others} == {1.0}

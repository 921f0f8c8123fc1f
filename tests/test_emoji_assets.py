"""The shipped pipeline, subjects and judge: they load offline, and they are what the documentation says."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline

from examples.emoji_sd.judge import Judge, background_colour
from examples.emoji_sd.render import COLOURS, HELD_OUT_CONCEPTS, LAYOUTS, TRAINED_CONCEPTS, background, caption, draw

ASSETS = Path(__file__).resolve().parent.parent / "examples" / "assets"
SUBJECTS = json.loads((ASSETS / "subjects" / "subjects.json").read_text())


def pictures(subject: str) -> list[Image.Image]:
    return [Image.open(path).convert("RGB") for path in sorted((ASSETS / "subjects" / subject / "input").glob("*.png"))]


@pytest.fixture(scope="module")
def pipeline():
    loaded = StableDiffusionPipeline.from_pretrained(ASSETS / "emoji-sd", torch_dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def judge():
    return Judge.load()


def test_pipeline_draws(pipeline):
    def draw_one():
        options = {"generator": torch.Generator().manual_seed(0), "output_type": "np"}
        return pipeline("a cat on a teal background", num_inference_steps=4, **options).images

    image = draw_one()
    assert image.shape == (1, 64, 64, 3)
    assert np.isfinite(image).all()
    assert np.array_equal(image, draw_one())


def test_pipeline_is_small():
    assert sum(path.stat().st_size for path in (ASSETS / "emoji-sd").rglob("*") if path.is_file()) <= 40e6


def test_attention_widths_are_multiples_of_64(pipeline):
    linears = [m for n, m in pipeline.unet.named_modules() if n.endswith(("to_q", "to_k", "to_v", "to_out.0"))]
    assert linears
    assert all(m.in_features % 64 == 0 and m.out_features % 64 == 0 for m in linears)


def test_scheduler_serves_training(pipeline):
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    assert scheduler.config.prediction_type == "v_prediction"
    x = torch.randn(2, 8, 16, 16)
    assert torch.isfinite(scheduler.get_velocity(x, x, torch.tensor([0, 999]))).all()


def test_round_trip(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    again = StableDiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    one, two = (
        p("a bell", num_inference_steps=2, generator=torch.Generator().manual_seed(1), output_type="np").images
        for p in (pipeline, again)
    )
    assert np.array_equal(one, two)


@pytest.mark.parametrize("text", ["a photo of sks teapot", "an extraordinary zebra, 42 times!", "naïve café"])
def test_tokenizer_round_trips(pipeline, text):
    ids = pipeline.tokenizer(text).input_ids
    decoded = pipeline.tokenizer.decode(ids, skip_special_tokens=True)
    assert decoded.replace(" ", "") == text.replace(" ", "")
    assert ids[0] == pipeline.tokenizer.bos_token_id
    assert ids[-1] == pipeline.tokenizer.eos_token_id


def test_words_are_single_tokens(pipeline):
    for word in ("sks", "teapot", "teal", *(n for n in TRAINED_CONCEPTS if " " not in n)):
        assert len(pipeline.tokenizer(word).input_ids) == 3, word


def test_subjects():
    assert len(SUBJECTS) >= 12
    for key, subject in SUBJECTS.items():
        assert subject["class_noun"]
        assert subject["concept"] in HELD_OUT_CONCEPTS
        images = pictures(key)
        assert len(images) == 5
        assert all(image.size == (64, 64) for image in images)
        assert len({image.tobytes() for image in images}) == 5
    assert not {s["concept"] for s in SUBJECTS.values()} & set(TRAINED_CONCEPTS)
    assert not {file for file, _ in HELD_OUT_CONCEPTS.values()} & {file for file, _ in TRAINED_CONCEPTS.values()}


def test_judge_knows_the_subjects(judge):
    right = total = 0
    for key, subject in SUBJECTS.items():
        scores = judge.concept_scores(pictures(key))
        right += int((scores.argmax(1) == judge.names.index(subject["concept"])).sum())
        total += len(scores)
    assert right / total >= 0.9


def test_judge_tells_subjects_apart(judge):
    one, other = pictures("teapot"), pictures("guitar")
    for similarity in (judge.image_similarity, judge.subject_similarity):
        assert similarity(one, one).mean() > similarity(one, other).mean() + 0.2
    with pytest.raises(ValueError, match="no word"):
        judge.concept_scores(one, ["xyzzy"])
    with pytest.raises(TypeError, match="PIL"):
        judge.embed_images([np.zeros((64, 64, 3))])


@pytest.mark.parametrize("style", ["plain", "gradient", "striped"])
def test_background_colour(style):
    rng = np.random.default_rng(0)
    assert background_colour([background(rng, colour, style) for colour in COLOURS]) == list(COLOURS)


def test_renderer_is_deterministic():
    sprite = {"cat": Image.radial_gradient("L").convert("RGBA").resize((128, 128))}
    for layout in LAYOUTS:
        one, two = (draw(sprite, np.random.default_rng(3), "cat", "teal", "striped", layout) for _ in range(2))
        assert one.shape == (64, 64, 3)
        assert np.array_equal(one, two)
    with pytest.raises(ValueError, match="layout"):
        draw(sprite, np.random.default_rng(0), "cat", "teal", "plain", "upside down")
    with pytest.raises(ValueError, match="style"):
        background(np.random.default_rng(0), "teal", "dotted")
    texts = [caption(np.random.default_rng(i), "cat", "teal", "striped", "two") for i in range(20)]
    assert any("two cats on a striped teal background" in text for text in texts)

# SPDX-License-Identifier: Apache-2.0
"""examples/configs: every preset is read by the script, fits its family, and states the memory that is counted."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("diffusers")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.dreambooth.arguments import check_family, parse_args
from examples.dreambooth.families import known
from examples.dreambooth.quantized import read_settings

CONFIGS = Path(__file__).resolve().parents[1] / "examples" / "configs"
_spec = importlib.util.spec_from_file_location("configs_memory", CONFIGS / "memory.py")
memory = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(memory)

FAMILIES = {
    "sd15": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline", "sd35_medium": "StableDiffusion3Pipeline",
    "flux1_dev": "FluxPipeline", "flux2_klein": "Flux2KleinPipeline", "qwen_image": "QwenImagePipeline",
    "z_image": "ZImagePipeline", "krea2": "Krea2Pipeline",
}  # fmt: skip


def test_every_family_has_a_preset():
    presets = {path.stem for path in CONFIGS.glob("*.yaml") if "distributed_type" not in path.read_text()}
    assert presets == set(FAMILIES) == set(memory.MODELS)
    assert {known()[name].title.split()[0] for name in FAMILIES.values()} == {
        f.title.split()[0] for f in known().values()
    }


@pytest.mark.parametrize("preset", FAMILIES)
def test_a_preset(preset, capsys):
    path = CONFIGS / f"{preset}.yaml"
    args = parse_args(["--config", str(path), "--instance_data_dir", "d", "--instance_prompt", "a sks dog"])
    check_family(args, known()[FAMILIES[preset]])
    assert capsys.readouterr().out == ""  # no flag without effect
    assert args.resolution in (512, 1024) and args.gradient_checkpointing and args.cache_latents
    head = " ".join(line.removeprefix("# ") for line in path.read_text().splitlines() if line.startswith("#"))
    assert memory.count(preset) in re.sub(r"\s+", " ", head)
    assert f"--config examples/configs/{path.name}" in head and "Not run on real weights here" in head


def test_the_quantization_file():
    assert read_settings(str(CONFIGS / "nf4.json")) == {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}

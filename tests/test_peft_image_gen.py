# SPDX-License-Identifier: Apache-2.0
"""The experiments for PEFT's image generation benchmark: they load as it loads them, hit what it means, and train.

What the benchmark does is read from its run.py and utils.py at PEFT's commit 5d602fd (2026-08-21).
"""

import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from adapted import krona_layers
from peft import PeftConfig, get_peft_model
from test_suggest import KLEIN, klein
from tiny import tiny_denoiser

from peft_krona import suggest_factors

FOLDER = Path(__file__).parents[1] / "benchmarks" / "peft_image_gen"
EXPERIMENTS = sorted((FOLDER / "experiments" / "krona").iterdir())
# {folder: a_out, a_in, r, parameters of the real model}
WANTED = {
    "flux2-klein-64x64-r1": (64, 64, 1, 1_041_920),
    "flux2-klein-64x64-r4": (64, 64, 4, 4_167_680),
    "flux2-klein-64x16-r1": (64, 16, 1, 2_938_880),
}


def targets(name: str) -> bool:
    """Whether the other methods' experiments there adapt a layer: names as in lora/flux2-klein-default."""
    return any(name.endswith(f".{ending}") for ending in KLEIN)


def test_there_are_these():
    assert {path.name for path in EXPERIMENTS} == set(WANTED)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.name)
def test_an_experiment_loads_hits_its_layers_and_trains(path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = PeftConfig.from_pretrained(str(path))
    assert (config.a_out, config.a_in, config.r) == WANTED[path.name][:3]
    assert (config.scaling, config.alpha, config.target_modules) == ("alpha", 1.0, set(KLEIN))
    settings = json.loads((path / "training_params.json").read_text())
    assert settings == {"optimizer_kwargs": {"lr": 1e-3, "weight_decay": 1e-4}}
    logged = {k: list(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    assert json.loads(json.dumps(logged))["peft_type"] == "KRONA"  # as its log_results writes it

    torch.manual_seed(0)
    base = tiny_denoiser("Flux2Transformer2DModel")
    wanted = {name for name, module in base.named_modules() if isinstance(module, torch.nn.Linear) and targets(name)}
    base.enable_gradient_checkpointing()
    model = get_peft_model(base, config, autocast_adapter_dtype=True).train()
    assert {name.removeprefix("base_model.model.") for name in krona_layers(model)} == wanted and len(wanted) == 26
    optimizer = torch.optim.AdamW(model.parameters(), **settings["optimizer_kwargs"])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ids = torch.cartesian_prod(torch.tensor([0]), torch.arange(4), torch.arange(4), torch.tensor([0]))
    text_ids = torch.cartesian_prod(torch.tensor([0]), torch.tensor([0]), torch.tensor([0]), torch.arange(5))
    latents, noise = torch.randn(2, 16, 16), torch.randn(2, 16, 16)
    sigma = torch.tensor([0.3, 0.8])[:, None, None]
    predicted = model(
        hidden_states=(1 - sigma) * latents + sigma * noise,
        timestep=sigma.flatten(),
        guidance=None,
        encoder_hidden_states=torch.randn(2, 5, 32),
        txt_ids=text_ids.expand(2, -1, -1),
        img_ids=ids.expand(2, -1, -1),
        return_dict=False,
    )[0][:, :16]
    loss = (predicted.float() - (noise - latents)).square().mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    factors = {name for name in before if "krona_" in name}
    assert loss.isfinite() and changed and changed <= factors
    assert {name for name in factors if "krona_B" in name} <= changed  # A has no gradient while B is 0


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.name)
def test_counts_of_the_readme_are_those_of_the_real_model(path):
    a_out, a_in, r, parameters = WANTED[path.name]
    plan = suggest_factors(klein(), parameters, target_modules=KLEIN, a_out=a_out, r=r)
    assert plan.layers == 80 == sum(targets(n) for n, m in klein().named_modules() if isinstance(m, torch.nn.Linear))
    assert (plan.chosen.a_in, plan.chosen.parameters) == (a_in, parameters)
    size = f"{plan.chosen.file_bytes['fp32'] / 1e6:.2f} MB"
    row = f"| `krona/{path.name}` | {a_out}, {a_in}, {r} | {parameters:,} | {size} | 1e-3 |"
    assert row in (FOLDER / "README.md").read_text(), row


def test_its_commands_name_what_is_there():
    text = (FOLDER / "README.md").read_text()
    run = re.search(r"^python -m peft_krona run run\.py -v experiments/(\S+)$", text, re.MULTILINE)
    assert run and (FOLDER / "experiments" / run[1] / "adapter_config.json").is_file()
    assert "PATH/TO/peft-krona/benchmarks/peft_image_gen/experiments/krona experiments/" in text

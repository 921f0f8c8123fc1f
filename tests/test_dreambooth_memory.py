# SPDX-License-Identifier: Apache-2.0
"""What examples/dreambooth_kron.py counts before a run, against what is there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.dreambooth import memory, optim


def layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(96, 96), nn.Linear(96, 16), nn.Linear(16, 3, bias=False))


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("AdamW", {}),
        ("AdamW", {"eight_bit": True}),
        ("prodigy", {}),
        ("schedulefree", {}),
        ("SGD", {}),
        ("SGD", {"more": ["momentum=0.9"]}),
        ("RMSprop", {}),
        ("Adafactor", {}),
    ],
    ids=str,
)
def test_the_optimizers_state_is_what_was_counted(name, more):
    package = {"prodigy": "prodigyopt", "schedulefree": "schedulefree"}.get(name, "torch")
    pytest.importorskip("bitsandbytes" if more.get("eight_bit") else package)
    model = layers()
    trained = list(model.parameters())
    optimizer = optim.build_optimizer([{"params": trained, "lr": 1e-3, "weight_decay": 0.0}], name, 1e-3, **more)
    counted = memory.state_size(optimizer, trained)
    optim.set_train_mode(optimizer, True)
    model(torch.randn(4, 96)).square().sum().backward()
    optimizer.step()
    found = memory.measured_state(optimizer)
    if name == "Adafactor":
        assert counted is None
    elif more.get("eight_bit"):  # and the maps of its blocks, 2 x 1 KiB and a scale per 256 numbers a tensor
        assert (
            counted
            <= found
            <= counted + sum(2 * (1024 + p.numel() / 256 * 4 + 4) for p in trained if p.numel() >= 4096)
        )
    else:
        assert counted == found


def test_everything_is_counted_once():
    model, other = layers(), nn.BatchNorm1d(5).to(torch.bfloat16)
    adapter = [model[2].weight]
    optimizer = torch.optim.AdamW(adapter)
    caches = {"latents": [{(8, 8): (torch.zeros(4, 8, 8), torch.zeros(4, 8, 8), (0, 0))}], "none": {}}
    found = memory.estimate({"unet": model, "vae": other}, adapter, optimizer, caches)
    frozen = 4 * (96 * 96 + 96 + 96 * 16 + 16)
    assert found == {
        "cpu": {"unet": frozen, "vae": 2 * 4 * 5 + 8, "adapter": 4 * 48, "gradients": 4 * 48, "optimizer": 8 * 48,
                "latents": 2 * 4 * 256},
    }  # fmt: skip


def test_what_is_said():
    lines = memory.described(
        {"cpu": {"vae": 320 * 2**20}, "cuda": {"unet": 2**31, "adapter": 2**19, "optimizer": None}}
    )
    assert lines == [
        "memory on cuda, counted: 2,048 MiB (unet 2,048 MiB, adapter 0.5 MiB, optimizer not known)",
        "memory on cpu, counted: 320 MiB (vae 320 MiB)",
    ]
    assert memory.peak() > 2**20

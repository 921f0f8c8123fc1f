# SPDX-License-Identifier: Apache-2.0
"""The sweep of learning rates: what it trains is KronA, it resumes, and what it says follows from its file."""

import json
import math
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch import nn

from benchmarks import learning_rates as sweep
from benchmarks import unet_learning_rates as unet_sweep
from benchmarks.learning_rates import RATES, SCHEMES, Shape
from peft_krona import KronAConfig
from peft_krona.config import scaling_factor
from peft_krona.ops.reference import delta_weight_loop

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("shape", [Shape(12, 4, 3, 2), Shape(12, 2, 6, 1), Shape(12, 6, 2, 3)], ids=str)
def test_the_product_is_that_of_the_adapter(shape):
    A = torch.randn(2, shape.r, shape.a_out, shape.a_in, dtype=torch.float64)
    B = torch.randn(2, shape.r, shape.b_out, shape.b_in, dtype=torch.float64)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    wanted = torch.stack([x[i] @ delta_weight_loop(A[i], B[i]).T for i in range(2)])
    torch.testing.assert_close(sweep.product(x, A, B), wanted)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *((name, {"scaling": name}) for name in ("alpha", "rank", "rslora")),
        ("cdka", {"scaling": "cdka", "init_weights": "cdka"}),
        ("kaiming", {"init_weights": "kaiming"}),
    ],
)
def test_a_scheme_is_the_setting_of_its_name(name, settings):
    shape = Shape(1024, 64, 16, 4)
    layer = get_peft_model(
        nn.Sequential(nn.Linear(1024, 1024)), KronAConfig(target_modules=["0"], a_out=64, a_in=16, r=4, **settings)
    ).base_model.model[0]
    scheme = SCHEMES[name]
    for factor, std in ((layer.krona_A["default"], scheme.std_a), (layer.krona_B["default"], scheme.std_b)):
        assert factor.std().item() == pytest.approx(std(shape), rel=0.05)  # thousands of draws
    assert layer.scaling["default"] == scheme.s(shape)
    assert scaling_factor(settings.get("scaling", "alpha"), 1.0, 4, 16) == scheme.s(shape)


def test_adam_is_torch_s():
    p = torch.randn(2, 3, 4, dtype=torch.float64)
    own, theirs = p.clone(), [row.clone().requires_grad_() for row in p]
    rates = torch.tensor([0.1, 0.01], dtype=torch.float64)
    mine = sweep.Adam([own], [rates])
    optimizers = [torch.optim.Adam([row], lr=rate.item()) for row, rate in zip(theirs, rates, strict=True)]
    for _ in range(4):
        gradient = torch.randn_like(p)
        mine.step((gradient,))
        for row, g, optimizer in zip(theirs, gradient, optimizers, strict=True):
            row.grad = g
            optimizer.step()
    torch.testing.assert_close(own, torch.stack([row.detach() for row in theirs]))


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(sweep, "SHAPES", (Shape(8, 4, 2, 1), Shape(8, 4, 2, 2), Shape(16, 4, 2, 1, 3)))
    monkeypatch.setattr(sweep, "SEEDS", (0,))


def test_it_goes_on_where_it_was(tiny, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out.json"
    arguments = ["--out", str(out), "--steps", "3", "--tokens", "4"]
    assert sweep.main([*arguments, "--schemes", "alpha", "--widest", "8"]) == 0
    first = json.loads(out.read_text())["rows"]
    assert [row["shape"] for row in first] == [[8, 4, 2, 1, 1], [8, 4, 2, 2, 1]]
    assert sweep.main([*arguments, "--schemes", "alpha", "cdka", "--plot", str(tmp_path / "out.png")]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert rows[:2] == first and len(rows) == 6 and not list(tmp_path.glob("*.tmp"))
    assert all(len(row["losses"]) == len(RATES) and min(filter(None, row["losses"])) < 1 for row in rows)
    assert "| cdka | " in capsys.readouterr().out and (tmp_path / "out.png").stat().st_size > 1000
    monkeypatch.setattr(sweep, "losses", None)  # nothing is left to do
    assert sweep.main([*arguments, "--schemes", "alpha", "cdka"]) == 0
    assert sweep.main(["--out", str(out), "--steps", "4"]) == 1
    assert f"{out} has other settings: [3, 4, " in capsys.readouterr().out


def planted(shape: Shape) -> list[float]:
    """Losses whose best rate is 2^-9 * width^-0.5 * a_out^0.25 * r^-0.1."""
    best = -9 + math.log2(shape.width) * -0.5 + math.log2(shape.a_out) * 0.25 + math.log2(shape.r) * -0.1 + 5
    return [0.5 + 0.01 * (math.log2(rate) - best) ** 2 for rate in RATES]


def test_the_table_says_what_was_planted():
    found = {"alpha": {shape: planted(shape) for shape in sweep.SHAPES}}
    for layers in (1, 3):
        fitted = sweep.exponents(found["alpha"], layers)
        if layers == 1:
            assert fitted == pytest.approx({"width": -0.5, "a_out": 0.25, "a_in": 0.0, "r": -0.1}, abs=1e-6)
    assert sweep.best(planted(sweep.BASE)) == pytest.approx(-4 + 9 * -0.5 + 6 * 0.25)
    assert sweep.lost([1.0, 0.75, 0.5, math.inf]) == [1.0, 0.5, 0.0, 1.0]
    assert "-0.50, +0.25, +0.00, -0.10" in sweep.table(found).replace("-0.00", "+0.00")


def test_the_table_of_the_docs_is_that_of_the_file():
    result = json.loads((ROOT / "benchmarks" / "results" / "learning-rates.json").read_text())
    rows = sweep.table(sweep.curves(result, sweep.SHAPES)).splitlines()[2:]
    page = (ROOT / "docs" / "math.md").read_text()
    assert len(rows) == len(SCHEMES)
    for row in rows:
        name, gain, rates, apart, mean, worst, one, three = (cell.strip() for cell in row.strip("|").split("|"))
        assert f"| {gain} | {rates} | {apart} | {mean}, {worst} | {one} | {three} |" in page, name


# -- on the shipped pipeline -------------------------------------------------------------------------------------------


def test_the_sweep_on_the_pipeline_trains_and_goes_on(tmp_path, capsys, monkeypatch):
    out = tmp_path / "out.json"
    arguments = ["--out", str(out), "--steps", "2", "--batch", "1"]
    monkeypatch.setattr(unet_sweep, "FACTORS", ((4, 2, 1),))
    monkeypatch.setattr(unet_sweep, "RATES", (1e-2,))
    monkeypatch.setattr(unet_sweep, "JUDGED", 2)
    assert unet_sweep.main(arguments) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert row["factors"] == [4, 2, 1] and row["subject"] == "dog" and 0 < row["loss"] != 1
    assert f"| 1.0e-02 | **{row['loss']:.3f}** |" in capsys.readouterr().out
    monkeypatch.setattr(unet_sweep, "train", None)  # nothing is left to do
    assert unet_sweep.main(arguments) == 0
    assert unet_sweep.main([*arguments, "--steps", "3"]) == 1


def test_the_table_of_the_pipeline_in_the_docs_is_that_of_the_file():
    result = json.loads((ROOT / "benchmarks" / "results" / "learning-rates-unet.json").read_text())
    rows = unet_sweep.table(result).splitlines()
    assert len(rows) == 2 + len(unet_sweep.RATES) and all(
        row in (ROOT / "docs" / "math.md").read_text() for row in rows
    )

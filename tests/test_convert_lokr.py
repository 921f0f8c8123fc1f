# SPDX-License-Identifier: Apache-2.0
"""LoKr in: every variant against torch.kron, and PEFT's own LoKr."""

import json

import pytest
import torch
from convert_fixtures import relative
from rounding import STORED
from torch import nn

from peft_krona.convert import BASES, from_lokr, from_peft, from_tensors, read_adapter
from peft_krona.convert.formats.lokr import as_plain_kron, lycoris_loads
from peft_krona.convert.record import LayerUpdate
from peft_krona.errors import FormatError

NAME = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


def parts(full1=True, full2=True, rank=3, tucker=False, kernel=()):
    tensors = {}
    if full1:
        tensors["lokr_w1"] = torch.randn(4, 2)
    else:
        tensors |= {"lokr_w1_a": torch.randn(4, rank), "lokr_w1_b": torch.randn(rank, 2)}
    if full2:
        tensors["lokr_w2"] = torch.randn(8, 16, *kernel)
    elif tucker:
        tensors |= {"lokr_t2": torch.randn(rank, rank, *kernel)}
        tensors |= {"lokr_w2_a": torch.randn(rank, 8), "lokr_w2_b": torch.randn(rank, 16)}
    else:
        columns = 16 * torch.Size(kernel).numel()
        tensors |= {"lokr_w2_a": torch.randn(8, rank), "lokr_w2_b": torch.randn(rank, columns)}
    return tensors


def expected(p, scale, kernel=()):
    """dW from the format's definition, without our code."""
    w1 = p["lokr_w1"] if "lokr_w1" in p else p["lokr_w1_a"] @ p["lokr_w1_b"]
    if "lokr_w2" in p:
        w2 = p["lokr_w2"]
    elif "lokr_t2" in p:
        w2 = torch.einsum("ijkl,ip,jr->prkl", p["lokr_t2"], p["lokr_w2_a"], p["lokr_w2_b"])
    else:
        w2 = (p["lokr_w2_a"] @ p["lokr_w2_b"]).reshape(8, 16, *kernel)
    return torch.kron(w1.reshape(4, 2, *[1] * (w2.dim() - 2)), w2.contiguous()) * scale


@pytest.mark.parametrize(
    ("full1", "full2", "alpha", "scale"),
    [
        (True, True, None, 1.0),
        (True, True, 16.0, 1.0),  # ignored for full x full, as LyCORIS, ComfyUI and A1111 do
        (True, False, 6.0, 2.0),
        (True, False, None, 1.0),
        (False, True, 1.5, 0.5),
        (False, False, 3.0, 1.0),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_alpha_and_low_rank_sides(full1, full2, alpha, scale, dtype):
    p = {key: tensor.to(dtype) for key, tensor in parts(full1, full2).items()}
    file = {f"{NAME}.{key}": tensor for key, tensor in p.items()}
    if alpha is not None:
        file[f"{NAME}.alpha"] = torch.tensor(alpha)
    (layer,) = from_lokr(file)
    assert layer.name == "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    p = {key: tensor.double() for key, tensor in p.items()}
    assert relative(layer.delta_weight(), expected(p, scale)) <= STORED


CONV = "lora_unet_down_blocks_0_resnets_0_conv1"


@pytest.mark.parametrize("form", ["full", "tucker", "flat"])
def test_convolutions(form):
    kernel = (3, 3)
    p = parts(full2=form == "full", tucker=form == "tucker", kernel=kernel)
    file = {f"{CONV}.{key}": tensor for key, tensor in p.items()} | {f"{CONV}.alpha": torch.tensor(3.0)}
    (layer,) = from_lokr(file)
    assert layer.shape == (32, 32, 3, 3) and layer.r == 1
    assert relative(layer.delta_weight(), expected({k: t.double() for k, t in p.items()}, 1.0, kernel)) <= STORED


@pytest.mark.parametrize(
    ("columns", "width", "terms"), [(4, 72, 1), (72, 4, 9), (96, 3, 3), (288, 1, 9), (8, 36, 1), (12, 24, 3)]
)
def test_sd_scripts_krona_flattens_the_kernel_into_the_input(columns, width, terms):
    """PR #2370: dW = kron(w1, w2).reshape(out, in, kh, kw), wherever the split falls."""
    w1, w2 = torch.randn(4, columns), torch.randn(8, width)
    (layer,) = from_lokr({f"{CONV}.lokr_w1": w1, f"{CONV}.lokr_w2": w2, f"{CONV}.alpha": torch.tensor(1.0)})
    wanted = torch.kron(w1, w2).reshape(32, 32, 3, 3)
    assert layer.r == terms
    assert torch.equal(layer.delta_weight(torch.float32), wanted)


def test_one_by_one_convolutions_stored_as_matrices():
    name = "lora_unet_down_blocks_0_attentions_0_proj_in"
    file = {f"{name}.lokr_w1": torch.randn(4, 2), f"{name}.lokr_w2": torch.randn(8, 16)}
    assert from_lokr(file, base_model=BASES["sd15"]).layers[0].shape == (32, 32, 1, 1)
    assert from_lokr(file, base_model=BASES["sdxl"]).layers[0].shape == (32, 32)
    (layer,) = from_lokr(file).fitted({"unet": {"down_blocks.0.attentions.0.proj_in": (32, 32, 1, 1)}})
    assert layer.shape == (32, 32, 1, 1)


def test_cdka_scale_that_the_first_sd_scripts_module_did_not_save():
    file = {f"{NAME}.lokr_w1": torch.randn(2, 4), f"{NAME}.lokr_w2": torch.randn(8, 16)}
    arguments = {"use_cdka_scale": "true", "krona_alpha": "16", "factor_in": "4"}
    metadata = {"ss_network_module": "networks.krona", "ss_network_args": json.dumps(arguments)}
    (plain,), (scaled,) = from_lokr(file), from_lokr(file, metadata)
    assert (plain.scale, scaled.scale) == (1.0, 16 / 4**0.5)
    metadata["ss_network_args"] = json.dumps({"cdka_alpha": "16"})  # later versions: folded into w1
    assert from_lokr(file, metadata).layers[0].scale == 1.0


LOW_RANK = {"lokr_w2": None, "lokr_w2_a": torch.ones(4, 3), "lokr_w2_b": torch.ones(3, 5)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lokr_w1": None}, "expected lokr_w1, or lokr_w1_a and lokr_w1_b"),
        ({"lokr_w2": None}, "expected lokr_w2, or"),
        ({"lokr_w1_a": torch.ones(4, 1)}, "expected lokr_w1, or"),
        ({"lokr_w2_a": torch.ones(4, 1), "lokr_w2_b": torch.ones(1, 4)}, "and not both"),
        ({"lokr_w1": None, "lokr_w1_a": torch.ones(4, 3), "lokr_w1_b": torch.ones(2, 5)}, "ranks of"),
        ({"lokr_w1": torch.ones(4)}, "expected w1 a matrix"),
        ({"lokr_w2": torch.ones(4, 0)}, "expected w1 a matrix"),
        ({"dora_scale": torch.ones(32, 1)}, "is DoRA"),
        ({"banana": torch.ones(1)}, "does not belong here"),
        (LOW_RANK | {"alpha": torch.tensor(-1.0)}, "positive number"),
        (LOW_RANK | {"alpha": torch.ones(2)}, "one positive number"),
        ({"lokr_t2": torch.ones(3, 3, 3, 3)}, "and not both"),
    ],
)  # fmt: skip
def test_errors_name_layer_and_reason(change, message):
    p = parts() | {"alpha": torch.tensor(1.0)} | change
    with pytest.raises(FormatError, match=message) as error:
        from_lokr({f"{NAME}.{key}": tensor for key, tensor in p.items() if tensor is not None})
    assert "to_q" in str(error.value)


@pytest.mark.parametrize(
    "settings", [{}, {"decompose_both": True}, {"use_effective_conv2d": True}, {"alpha": 5, "r": 100}]
)
def test_peft_lokr_folders(tmp_path, settings):
    """PEFT scales by alpha / r always; read from the folder and from the tensors, equal to its own delta weights."""
    from peft import LoKrConfig, get_peft_model

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.conv, self.point = nn.Linear(48, 64), nn.Conv2d(16, 32, 3), nn.Conv2d(16, 32, 1)

        def forward(self, x):
            return x

    config = LoKrConfig(
        **({"r": 3, "alpha": 4} | settings),
        target_modules=["lin", "conv", "point"],
        rank_pattern={"point": 2},
        alpha_pattern={"conv": 7},
        init_weights=False,
    )
    model = get_peft_model(Net(), config)
    model.save_pretrained(tmp_path)
    shapes = {"lin": (64, 48), "conv": (32, 16, 3, 3), "point": (32, 16, 1, 1)}
    adapter = read_adapter(tmp_path).fitted({"model": shapes})  # the files do not say what the kernels are
    assert len(adapter) == 3
    for layer in adapter:
        wanted = model.base_model.model.get_submodule(layer.module).get_delta_weight("default")
        assert layer.shape == tuple(wanted.shape)
        assert relative(layer.delta_weight(), wanted) <= STORED


@pytest.mark.parametrize("name", ["a_out", "b_out", "a_in", "b_in"])
def test_shuffled_layers_with_a_side_of_one_are_plain_products(name):
    sizes = {"a_out": 4, "a_in": 3, "b_out": 5, "b_in": 2} | {name: 1}
    A, B = torch.randn(1, sizes["a_out"], sizes["a_in"]), torch.randn(1, sizes["b_out"], sizes["b_in"])
    layer = LayerUpdate("unet", "x", A, B, 0.5, "diffusekrona")
    plain = as_plain_kron(layer)
    assert plain.layout == "kron"
    assert relative(plain.delta_weight(), layer.delta_weight()) < 1e-12


def test_no_shuffled_layer_of_full_sizes_is_a_plain_product():
    assert (
        as_plain_kron(LayerUpdate("unet", "x", torch.ones(1, 4, 2), torch.ones(1, 3, 2), layout="diffusekrona")) is None
    )


def test_lycoris_rule_on_known_cases():
    """The cases measured with LyCORIS 4.1.3: a1 = a2 = 4 loads, a1 = 8, a2 = 4 does not, nor a larger left factor."""
    for a, b, loads in (
        ((4, 4), (8, 80), True),
        ((8, 4), (40, 80), False),
        ((64, 4), (20, 320), False),
        ((16, 16), (2, 2), False),
    ):
        assert lycoris_loads(LayerUpdate("unet", "x", torch.ones(1, *a), torch.ones(1, *b))) is loads


def test_detection_refuses_diff_and_mixed_layers():
    with pytest.raises(FormatError, match=r"diff file .* nearest_kronecker"):
        from_tensors({f"{NAME}.diff": torch.ones(2, 2)})
    with pytest.raises(FormatError, match=r"mixes lokr and lora"):
        from_tensors({f"{NAME}.lokr_w1": torch.ones(2, 2), f"{NAME}.lora_up.weight": torch.ones(2, 2)})
    with pytest.raises(FormatError, match="of no adapter format"):
        from_tensors({"model.diffusion_model.out.2.weight": torch.ones(2, 2)})
    with pytest.raises(FormatError, match="peft_type='IA3' cannot be read"):
        from_peft({"peft_type": "IA3"}, {})

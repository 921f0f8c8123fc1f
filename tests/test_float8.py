# SPDX-License-Identifier: Apache-2.0
"""Base weights that are stored as 8-bit floats (diffusers' layerwise casting): the adapter keeps its digits."""

import pytest
import torch
from adapted import assert_same_bits, config, krona_layers, snapshot
from diffusers.hooks import apply_layerwise_casting
from peft import get_peft_model
from safetensors.torch import load_file
from tiny import sd_pipeline
from torch import nn

import peft_krona
from peft_krona import KronAConfig
from peft_krona.errors import MergeError
from peft_krona.ops.reference import delta_weight_loop
from peft_krona.pipelines import add_krona, load_krona_weights, save_krona_weights

STORED = [torch.float8_e4m3fn, torch.float8_e5m2]
REFUSAL = r"Cannot merge into a weight that is stored as torch.float8_\w+: rounding to it would lose most of the update"


def base_layer(stored):
    torch.manual_seed(1)
    layer = nn.Linear(12, 8)
    for parameter in layer.parameters():
        parameter.data = parameter.data.to(stored).float()
    return layer


@pytest.mark.parametrize("first", ["cast", "adapt"])
@pytest.mark.parametrize("stored", STORED, ids=str)
def test_layer_over_a_weight_that_is_stored_in_8_bits(stored, first):
    model = nn.Sequential(base_layer(stored))
    exact = base_layer(stored).double()
    if first == "cast":
        apply_layerwise_casting(model, stored, torch.float32, skip_modules_pattern=("norm",))
    model = get_peft_model(model, config(), autocast_adapter_dtype=False)
    if first == "adapt":
        apply_layerwise_casting(model, stored, torch.float32, skip_modules_pattern=("norm",))
    layer = model.base_model.model[0]
    assert layer.get_base_layer().weight.dtype == stored
    A, B = layer.krona_A["default"], layer.krona_B["default"]
    assert A.dtype == B.dtype == torch.float32
    x = torch.randn(5, 12)
    delta = delta_weight_loop(A, B, 1.0, "kron").detach()
    y = model(x)
    size = x.double().abs() @ (exact.weight.abs() + delta.abs()).T + exact.bias.abs()
    error = (y.double() - exact(x.double()) - x.double() @ delta.T).abs()
    assert (error <= 8 * torch.finfo(torch.float32).eps * size).all()
    y.sum().backward()
    assert A.grad is not None and torch.isfinite(A.grad).all()
    before = snapshot(model)
    for call in (model.merge_adapter, model.merge_and_unload, layer.merge):
        with pytest.raises(MergeError, match=REFUSAL):
            call()
    assert_same_bits(model, before)


def test_files_go_through_such_a_model_unchanged(tmp_path):
    pipe = sd_pipeline()
    add_krona(pipe, KronAConfig(a_out=8, a_in=2, init_weights=False))
    save_krona_weights(pipe, tmp_path / "a")
    pipe = sd_pipeline()
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    load_krona_weights(pipe, tmp_path / "a")
    assert {layer.get_base_layer().weight.dtype for layer in krona_layers(pipe.unet).values()} == {torch.float8_e4m3fn}
    save_krona_weights(pipe, tmp_path / "b")
    a, b = (load_file(tmp_path / name / "unet" / "adapter_model.safetensors") for name in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    before = snapshot(pipe.unet)
    with pytest.raises(MergeError, match=REFUSAL), peft_krona.merged(pipe.unet):
        raise AssertionError("not reached")
    with pytest.raises(MergeError, match=REFUSAL):
        pipe.fuse_lora()
    assert_same_bits(pipe.unet, before)

# SPDX-License-Identifier: Apache-2.0
"""Released DiffuseKronA checkpoints: equal to what the released layer computes, in a pipeline and merged."""

import copy

import pytest
import torch
from convert_fixtures import merge_by_hand, relative, tiny_clip, tiny_unet
from rounding import STORED, STORED_IN_A_MODEL
from safetensors.torch import save_file

from peft_krona.convert import from_diffusekrona, read_adapter, shapes_of_models
from peft_krona.errors import FormatError
from peft_krona.pipelines import load_krona_weights


def released_layer(x, down, up):
    """The released layer, token by token: X = x.view(a_in, b_in), Y = up (X^T down), output Y.view(-1)."""
    a_in, b_in = down.shape[0], up.shape[1]
    tokens = [(up @ (token.view(a_in, b_in).T @ down)).reshape(-1) for token in x.reshape(-1, x.shape[-1])]
    return torch.stack(tokens).reshape(*x.shape[:-1], -1)


def plain_reading(x, down, up):
    """The paper's plain Kronecker product of the same factors, which the released weights do not have."""
    return x @ torch.kron(down.T.contiguous(), up).T


FACTORS = {"to_q": (8, 4), "to_k": (4, 8), "to_v": (16, 2), "to_out.0": (8, 2), "q_proj": (8, 4), "out_proj": (4, 4)}


def checkpoint(models, which, seed=0):
    """A checkpoint in the released code's keys, and {(component, module): (down, up)}."""
    generator = torch.Generator().manual_seed(seed)
    tensors, pairs = {}, {}
    for component, shapes in shapes_of_models(models).items():
        for module, shape in shapes.items():
            kind = next((w for w in which if module.endswith(f".{w}")), None)
            if kind is None:
                continue
            a_out, a_in = FACTORS.get(kind, (8, 4))
            down = torch.randn(a_in, a_out, generator=generator)
            up = torch.randn(shape[0] // a_out, shape[1] // a_in, generator=generator) * 0.1
            if kind.startswith("to_"):
                stem = module.replace(f".{kind}", f".processor.{kind.removesuffix('.0')}_lora")
            else:
                stem = f"{module}.lora_layer" if ".ff." in module else f"{module}.lora_linear_layer"
            tensors[f"{component}.{stem}.down.weight"] = down
            tensors[f"{component}.{stem}.up.weight"] = up
            pairs[component, module] = down, up
    return tensors, pairs


SUBSETS = {
    "kqvo": ("to_q", "to_k", "to_v", "to_out.0"),
    "qv": ("to_q", "to_v"),
    "o": ("to_out.0",),
    "ffn": ("net.0.proj", "net.2"),
    "all": (
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "net.0.proj",
        "net.2",
        "q_proj",
        "k_proj",
        "v_proj",
        "out_proj",
        "fc1",
        "fc2",
    ),
}


class Parts:
    """What load_krona_weights needs of a pipeline."""

    def __init__(self, **components):
        self.components = components


@pytest.mark.parametrize("xl", [False, True], ids=["sd", "sdxl"])
@pytest.mark.parametrize("subset", SUBSETS)
def test_dW_is_the_released_layer(xl, subset):
    models = {"unet": tiny_unet(xl), "text_encoder": tiny_clip()}
    if xl:
        models["text_encoder_2"] = tiny_clip(with_projection=True)
    tensors, pairs = checkpoint(models, SUBSETS[subset])
    adapter = from_diffusekrona(tensors)
    assert {(layer.component, layer.module) for layer in adapter} == pairs.keys()
    for layer in adapter:
        assert layer.layout == "diffusekrona"
        x = torch.randn(5, layer.shape[1], dtype=torch.float64)
        down, up = (t.double() for t in pairs[layer.component, layer.module])
        y = x @ layer.delta_weight().T
        assert relative(y, released_layer(x, down, up)) < 1e-12
        assert relative(plain_reading(x, down, up), released_layer(x, down, up)) > 0.5


def test_into_a_pipeline_unmerged_and_merged(tmp_path):
    models = {
        "unet": tiny_unet(xl=True),
        "text_encoder": tiny_clip(),
        "text_encoder_2": tiny_clip(with_projection=True),
    }
    tensors, pairs = checkpoint(models, SUBSETS["all"])
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors")
    adapted = Parts(**copy.deepcopy(models))
    assert set(load_krona_weights(adapted, tmp_path)) == set(models)

    for model in (*models.values(), *adapted.components.values()):
        model.double()  # what differs is then what was stored
    wrappers = {}
    for component, model in adapted.components.items():
        for name, module in model.named_modules():
            if hasattr(module, "krona_A"):
                wrappers[
                    component, name if "text" not in component else f"text_model.{name.removeprefix('text_model.')}"
                ] = module
    assert wrappers.keys() == pairs.keys()
    for (component, name), module in wrappers.items():
        down, up = (t.double() for t in pairs[component, name])
        x = torch.randn(2, 3, module.in_features, dtype=torch.float64)
        wanted = module.base_layer(x) + released_layer(x, down, up)
        assert relative(module(x), wanted) <= STORED
        module.merge()
        assert relative(module(x), wanted) <= STORED
        module.unmerge()

    merged = copy.deepcopy(models)
    merge_by_hand(merged, read_adapter(tmp_path))
    ids = torch.arange(7)[None]
    for name in ("text_encoder", "text_encoder_2"):
        wanted = merged[name](ids).last_hidden_state
        assert relative(adapted.components[name](ids).last_hidden_state, wanted) <= STORED_IN_A_MODEL
        assert relative(models[name](ids).last_hidden_state, wanted) > 1e-3


def test_factors_may_differ_per_module_and_survive_a_peft_folder(tmp_path):
    from peft_krona.convert import export

    tensors, _ = checkpoint({"unet": tiny_unet()}, SUBSETS["kqvo"])
    adapter = from_diffusekrona(tensors)
    export(adapter, tmp_path / "out", "peft")
    again = {layer.name: layer for layer in read_adapter(tmp_path / "out")}
    assert len({layer.factors for layer in again.values()}) == 4
    for layer in adapter:
        assert torch.equal(layer.A, again[layer.name].A) and torch.equal(layer.B, again[layer.name].B)
        assert (layer.scale, layer.layout) == (again[layer.name].scale, again[layer.name].layout)


KEY = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({f"{KEY}.down.weight": torch.ones(4, 8)}, r"to_q_lora' has down.weight but not up.weight"),
        ({f"{KEY}.up.weight": torch.ones(4, 8)}, r"has up.weight but not down.weight"),
        ({"foo.down.weight": torch.ones(4, 8), "foo.up.weight": torch.ones(4, 8)}, "'foo.down.weight' is not a key"),
        ({f"{KEY}.down.weight": torch.ones(4), f"{KEY}.up.weight": torch.ones(4, 8)}, "expected matrices"),
        ({f"{KEY}.down.weight": torch.ones(4, 320), f"{KEY}.up.weight": torch.ones(320, 4)}, "this is LoRA, not KronA"),
        ({"unet.conv_in.weight": torch.ones(4, 4)}, "The key 'unet.conv_in.weight' does not belong here"),
        ({}, "no layers"),
    ],
)
def test_errors_name_key_and_reason(tensors, message):
    with pytest.raises(FormatError, match=message):
        from_diffusekrona(tensors)


def test_attention_whose_sizes_do_not_fit_is_refused():
    other = KEY.replace("to_q", "to_k")
    tensors = {f"{KEY}.down.weight": torch.ones(4, 8), f"{KEY}.up.weight": torch.ones(5, 16)}
    tensors |= {f"{other}.down.weight": torch.ones(4, 8), f"{other}.up.weight": torch.ones(6, 16)}
    with pytest.raises(FormatError, match=r"inner sizes of one attention differ, \{'q': 40, 'k': 48\}"):
        from_diffusekrona(tensors)


def test_a_checkpoint_for_another_model_is_refused_by_name():
    tensors, _ = checkpoint({"unet": tiny_unet(xl=True)}, SUBSETS["kqvo"])
    with pytest.raises(FormatError, match=r"unet\.down_blocks.*base model"):
        from_diffusekrona(tensors).peft_components({"unet": tiny_unet()})

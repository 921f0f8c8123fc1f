# SPDX-License-Identifier: Apache-2.0
"""The written files in the programs that read them: LyCORIS 4.1.3, diffusers, transformers."""

import copy
from dataclasses import replace

import pytest
import torch
from convert_fixtures import (
    anything,
    attention,
    image,
    merge_by_hand,
    random_adapter,
    relative,
    tiny_clip,
    tiny_pipeline,
    tiny_unet,
)
from rounding import HALF, STORED, STORED_IN_A_MODEL
from torch import nn

from peft_krona.convert import BASES, AdapterFile, base_of_folder, export, shapes_of_models
from peft_krona.convert.formats.lokr import lycoris_loads
from peft_krona.pipelines import load_krona_weights

# -- LyCORIS -----------------------------------------------------------------------------------------------------------


class WithTextModel(nn.Module):
    """A text encoder with the `text_model.` in its layers' names that transformers 5 dropped."""

    def __init__(self, encoder):
        super().__init__()
        self.text_model = encoder


def lycoris_merge(adapter, models, path):
    """Merge a file with LyCORIS; returns how many layers it found and the largest relative error of an update."""
    kohya = pytest.importorskip("lycoris.kohya")
    # LyCORIS' default preset names SD's time embedding twice and then refuses it.
    kohya.LycorisNetworkKohya.apply_preset(
        {
            "unet_target_module": ["Transformer2DModel"],
            "unet_target_name": [],
            "text_encoder_target_module": ["CLIPAttention"],
            "text_encoder_target_name": [],
        }
    )
    wanted, merged = ({k: copy.deepcopy(m).double() for k, m in models.items()} for _ in range(2))
    merge_by_hand(wanted, adapter)
    encoder = merged["text_encoder"]
    encoder = encoder if hasattr(encoder, "text_model") else WithTextModel(encoder)
    network, weights = kohya.create_network_from_weights(1.0, str(path), None, encoder, merged["unet"])
    network.merge_to(encoder, merged["unet"], weights, torch.float64, "cpu")
    errors = [0.0]
    for name, model in models.items():
        for before, now, then in zip(
            model.parameters(), merged[name].parameters(), wanted[name].parameters(), strict=True
        ):
            if not torch.equal(before, then):
                errors.append(relative(now - before, then - before))
    return len(network.unet_loras) + len(network.text_encoder_loras), max(errors)


@pytest.fixture(scope="module")
def sd_models():
    return {"unet": tiny_unet(), "text_encoder": tiny_clip()}


@pytest.mark.parametrize("factors", [(4, 4), (8, 8), (4, 8), (16, 4)])
def test_lycoris_loads_the_lokr_files_that_it_can(sd_models, factors, tmp_path):
    adapter = random_adapter(sd_models, anything, factors=factors, scale=0.5)
    loadable = replace(adapter, layers=[layer for layer in adapter if lycoris_loads(layer)])
    report = export(loadable, tmp_path / "x", "lokr", base_model=BASES["sd15"], dtype=torch.float32)
    found, error = lycoris_merge(loadable, sd_models, report.files[0])
    assert found == len(loadable) and error <= STORED
    assert not report.notes


@pytest.mark.parametrize("factors", [(8, 4), (16, 2), (2, 16), (16, 16)])
def test_lycoris_refuses_the_lokr_files_that_it_cannot_load(sd_models, factors, tmp_path):
    """The reason for the note in the report: its loader derives the split from one number for both sides."""
    adapter = random_adapter(sd_models, attention, factors=factors)
    refused = {layer.A.shape + layer.B.shape: layer for layer in adapter if not lycoris_loads(layer)}
    assert refused
    for layer in refused.values():
        report = export(AdapterFile((layer,)), tmp_path / "x", "lokr", base_model=BASES["sd15"], dtype=torch.float32)
        assert "LyCORIS itself does not load" in report.notes[0]
        with pytest.raises(RuntimeError, match="match"):
            lycoris_merge(AdapterFile((layer,)), sd_models, report.files[0])


@pytest.mark.parametrize("layout", ["kron", "diffusekrona"])
@pytest.mark.parametrize("to", ["loha", "lora", "diff"])
def test_lycoris_loads_the_other_formats_with_any_factors(sd_models, to, layout, tmp_path):
    adapter = random_adapter(sd_models, anything, factors=(8, 4), layout=layout, scale=0.5)
    report = export(adapter, tmp_path / "x", to, base_model=BASES["sd15"], dtype=torch.float32)
    found, error = lycoris_merge(adapter, sd_models, report.files[0])
    assert found == len(adapter) and error <= STORED


def test_lycoris_loads_the_terms_of_one_adapter_from_several_files(sd_models, tmp_path):
    adapter = random_adapter(sd_models, attention, factors=(4, 4), r=2)
    report = export(adapter, tmp_path / "x", "lokr", base_model=BASES["sd15"], dtype=torch.float32, split_terms=True)
    first, second = (replace(adapter, layers=[layer.terms()[n] for layer in adapter]) for n in (0, 1))
    assert lycoris_merge(first, sd_models, report.files[0])[1] <= STORED
    assert lycoris_merge(second, sd_models, report.files[1])[1] <= STORED


# -- diffusers ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[False, True], ids=["sd", "sdxl"])
def pipe(request, tmp_path_factory):
    pipe = tiny_pipeline(tmp_path_factory.mktemp("pipeline"), request.param)
    pipe.folder = tmp_path_factory.mktemp("saved")
    pipe.save_pretrained(pipe.folder)
    return pipe


def copied(pipe):
    folder = pipe.folder
    pipe = copy.copy(pipe)
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module) and name != "vae":
            setattr(pipe, name, copy.deepcopy(part))
    pipe.folder = folder
    return pipe


def adapted_parts(pipe):
    return {name: part for name, part in pipe.components.items() if name in ("unet", "text_encoder", "text_encoder_2")}


@pytest.mark.parametrize(
    ("select", "r", "layout"), [(attention, 1, "diffusekrona"), (anything, 2, "kron")], ids=["attention", "with-conv"]
)
def test_diffusers_loads_our_lora_and_gives_the_native_adapters_image(pipe, select, r, layout, tmp_path):
    adapter = random_adapter(adapted_parts(pipe), select, r=r, layout=layout, factors=(8, 4), scale=0.7)
    export(adapter, tmp_path / "native", "peft")
    report = export(adapter, tmp_path / "lora", "lora", base_model=base_of_folder(pipe.folder), dtype=torch.float32)
    native, other = copied(pipe), copied(pipe)
    load_krona_weights(native, tmp_path / "native")
    other.load_lora_weights(str(report.files[0]))
    wanted = image(native)
    assert relative(image(other), wanted) <= STORED_IN_A_MODEL
    assert relative(image(pipe), wanted) > 1e-2
    half = copied(pipe)
    report = export(adapter, tmp_path / "lora16", "lora", base_model=base_of_folder(pipe.folder))
    half.load_lora_weights(str(report.files[0]))
    assert relative(image(half), wanted) <= 2 * HALF


def test_unet_load_lora_adapter_takes_the_peft_names(tmp_path):
    """As diffusers' own names, without a pipeline: unet.load_lora_adapter(prefix="unet")."""
    from peft_krona.convert import to_lora_peft

    unet = tiny_unet(xl=True)
    adapter = random_adapter({"unet": unet}, anything, factors=(8, 4), layout="diffusekrona")
    merged = {"unet": copy.deepcopy(unet)}
    merge_by_hand(merged, adapter)
    tensors, _ = to_lora_peft(adapter, torch.float32)
    unet.load_lora_adapter(tensors, prefix="unet")
    x, text, embeds = (torch.randn(shape, dtype=torch.float64) for shape in ((1, 4, 8, 8), (1, 5, 64), (1, 32)))
    t, added = torch.tensor([3]), {"text_embeds": embeds, "time_ids": torch.zeros(1, 6)}
    with torch.no_grad():
        ours = unet.double()(x, t, text, added_cond_kwargs=added).sample
        assert relative(ours, merged["unet"].double()(x, t, text, added_cond_kwargs=added).sample) <= STORED_IN_A_MODEL


@pytest.mark.parametrize("with_projection", [False, True])
def test_transformers_loads_the_native_folder_of_a_text_encoder(with_projection, tmp_path):
    component = "text_encoder_2" if with_projection else "text_encoder"
    encoder = tiny_clip(with_projection)
    adapter = random_adapter({component: encoder}, anything, factors=(8, 4), layout="diffusekrona")
    export(adapter, tmp_path / "out", "peft")
    merged = {component: copy.deepcopy(encoder)}
    merge_by_hand(merged, adapter)
    encoder.load_adapter(str(tmp_path / "out" / component))
    ids = torch.arange(9)[None]
    found, wanted = (model.double()(ids).last_hidden_state for model in (encoder, merged[component]))
    assert relative(found, wanted) <= STORED_IN_A_MODEL


def tiny_transformer(kind):
    from diffusers import FluxTransformer2DModel, SD3Transformer2DModel

    torch.manual_seed(4)
    if kind == "flux":
        return FluxTransformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
        ).eval()  # fmt: skip
    return SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=64, out_channels=4,
        pos_embed_max_size=16,
    ).eval()  # fmt: skip


def run_transformer(kind, model):
    generator = torch.Generator().manual_seed(6)
    model.double()

    def noise(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    with torch.no_grad():
        if kind == "flux":
            return model(
                hidden_states=noise(1, 16, 16), encoder_hidden_states=noise(1, 6, 32), pooled_projections=noise(1, 32),
                timestep=torch.tensor([0.5]), img_ids=torch.zeros(16, 3), txt_ids=torch.zeros(6, 3),
                guidance=None,
            ).sample  # fmt: skip
        return model(
            hidden_states=noise(1, 4, 8, 8), encoder_hidden_states=noise(1, 6, 32), pooled_projections=noise(1, 64),
            timestep=torch.tensor([5]),
        ).sample  # fmt: skip


@pytest.mark.parametrize("kind", ["flux", "sd3"])
@pytest.mark.parametrize("layout", ["kron", "diffusekrona"])
def test_pipelines_with_a_transformer_load_our_lora(kind, layout, tmp_path):
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, StableDiffusion3Pipeline

    transformer = tiny_transformer(kind)
    adapter = random_adapter(
        {"transformer": transformer}, lambda c, m: "embed" not in m, factors=(8, 4), r=2, layout=layout
    )
    encoder = tiny_clip(with_projection=kind == "sd3")
    adapter = AdapterFile(
        (*adapter, *random_adapter({"text_encoder": encoder}, attention, factors=(8, 4), layout=layout))
    )
    names = {layer.module for layer in adapter}
    assert "proj_out" in names  # the name of one layer that is the end of others' names
    report = export(adapter, tmp_path / "x", "lora", dtype=torch.float32)
    merged = {"transformer": copy.deepcopy(transformer), "text_encoder": copy.deepcopy(encoder)}
    merge_by_hand(merged, adapter)
    parts = dict.fromkeys(("vae", "tokenizer", "text_encoder_2", "tokenizer_2"))
    parts |= {"scheduler": FlowMatchEulerDiscreteScheduler(), "transformer": transformer, "text_encoder": encoder}
    if kind == "flux":
        pipe = FluxPipeline(**parts)
    else:
        pipe = StableDiffusion3Pipeline(**parts, text_encoder_3=None, tokenizer_3=None)
    pipe.load_lora_weights(str(report.files[0]))
    found, wanted = (run_transformer(kind, model) for model in (pipe.transformer, merged["transformer"]))
    assert relative(found, wanted) <= STORED_IN_A_MODEL
    ids = torch.arange(9)[None]
    wanted = merged["text_encoder"].double()(ids).last_hidden_state
    assert relative(pipe.text_encoder.double()(ids).last_hidden_state, wanted) <= STORED_IN_A_MODEL


def test_native_adapters_of_a_transformer_touch_only_their_layers(tmp_path):
    transformer = tiny_transformer("flux")
    adapter = random_adapter({"transformer": transformer}, lambda c, m: m == "proj_out", factors=(8, 4))
    config, _ = adapter.peft_components({"transformer": transformer})["transformer"]
    transformer.add_adapter(config)
    adapted = [name for name, module in transformer.named_modules() if hasattr(module, "krona_A")]
    assert adapted == ["proj_out"]
    assert shapes_of_models({"transformer": transformer})["transformer"]["proj_out"] == adapter.layers[0].shape

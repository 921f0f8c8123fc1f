# SPDX-License-Identifier: Apache-2.0
"""Files out: exact for every shape, layout, number of terms and dtype; refusals; the automatic choice; verification."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch
from convert_fixtures import relative
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding import EPS, HALF, STORED
from safetensors import safe_open
from safetensors.torch import load_file

from peft_krona.convert import (
    BASES,
    AdapterFile,
    LayerUpdate,
    choose_format,
    export,
    from_tensors,
    guess_base,
    read_adapter,
    safetensors_io,
    to_diff,
    to_loha,
    to_lokr,
    to_lora,
    to_lora_peft,
    tolerance,
)
from peft_krona.convert import export as _export_function
from peft_krona.convert.formats.lokr import LOKR
from peft_krona.convert.formats.lora import lora_rank
from peft_krona.errors import FormatError, KronAError
from peft_krona.ops.reference import delta_weight_loop

export_module = __import__("sys").modules[_export_function.__module__]

MODULE = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
KEY = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
side = st.integers(1, 6)


@st.composite
def layers(draw, kernels=((), (3, 3), (1, 1), (1, 3)), max_r=3):
    a_out, a_in, b_out, b_in = (draw(side) for _ in range(4))
    r, kernel = draw(st.integers(1, max_r)), draw(st.sampled_from(kernels))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    A = torch.randn(r, a_out, a_in, generator=generator, dtype=torch.float64)
    B = torch.randn(r, b_out, b_in, *kernel, generator=generator, dtype=torch.float64)
    magnitude = 10.0 ** draw(st.integers(-4, 4))  # of A against B: folding has to balance them
    stored = draw(st.sampled_from(DTYPES))
    A, B = (A * magnitude).to(stored), (B / magnitude * 1e-2).to(stored)
    return LayerUpdate(
        "unet", MODULE, A, B, draw(st.sampled_from([1.0, 0.3, 16.0])), draw(st.sampled_from(["kron", "diffusekrona"]))
    )


def judge(layer):
    """dW by the loop over the definition."""
    return delta_weight_loop(layer.A, layer.B, layer.scale, layer.layout)


def rebuilt(to, tensors):
    """dW from the definition of each format, written here a second time."""
    t = {key.removeprefix(f"{KEY}."): tensor.double() for key, tensor in tensors.items()}
    if to == "lokr":
        w2 = t["lokr_w2"]
        return torch.kron(t["lokr_w1"].reshape(*t["lokr_w1"].shape, *[1] * (w2.dim() - 2)), w2)
    if to == "loha":
        scale = t["alpha"] / t["hada_w1_b"].shape[0]
        return (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"]) * scale
    if to == "lora":
        up, down = t["lora_up.weight"], t["lora_down.weight"]
        return up.flatten(1) @ down.flatten(1) * t["alpha"] / down.shape[0]
    return t["diff"]


WRITERS = {"lokr": to_lokr, "loha": to_loha, "lora": to_lora, "diff": to_diff}


@settings(max_examples=120, deadline=None)
@given(layer=layers(), to=st.sampled_from(list(WRITERS)), dtype=st.sampled_from(DTYPES))
def test_every_format_holds_what_it_accepts(layer, to, dtype):
    wanted = judge(layer)
    try:
        tensors = WRITERS[to](AdapterFile((layer,)), BASES["sd15"], dtype)
    except FormatError as error:
        assert to in ("lokr", "loha") and ("to=" in str(error))
        assert layer.r > 1 or (to == "lokr" and layer.layout == "diffusekrona")
        return
    assert relative(rebuilt(to, tensors).reshape(wanted.shape), wanted) < tolerance(dtype)
    assert all(t.dtype == dtype or key.endswith(".alpha") for key, t in tensors.items())
    if to == "lokr":
        assert tensors[f"{KEY}.alpha"] == 1.0 and tensors[f"{KEY}.lokr_w2"].dim() == len(layer.shape)


@settings(max_examples=60, deadline=None)
@given(layer=layers(), to=st.sampled_from(["lokr", "lora"]))
def test_native_to_file_to_native(layer, to):
    if to == "lokr" and (layer.r > 1 or layer.layout != "kron"):
        return
    (again,) = from_tensors(WRITERS[to](AdapterFile((layer,)), BASES["sd15"], torch.float32))
    assert again.name == layer.name and again.shape == layer.shape
    assert relative(again.delta_weight(), judge(layer)) <= STORED
    if to == "lokr":
        assert (again.factors, again.r, again.layout) == (layer.factors, layer.r, layer.layout)


@settings(max_examples=40, deadline=None)
@given(layer=layers(kernels=((), (3, 3))), to=st.sampled_from(["lokr", "lora"]))
def test_file_to_native_to_file(layer, to):
    if to == "lokr" and (layer.r > 1 or layer.layout != "kron"):
        return
    first = WRITERS[to](AdapterFile((layer,)), BASES["sd15"], torch.float32)
    again = WRITERS[to](from_tensors(first), BASES["sd15"], torch.float32)
    assert first.keys() == again.keys()
    if to == "lokr":
        assert torch.equal(rebuilt(to, again), rebuilt(to, first))  # balancing by powers of two rounds nothing
    assert relative(rebuilt(to, again), rebuilt(to, first)) <= STORED


@settings(max_examples=25, deadline=None)
@given(layer=layers(), dtype=st.sampled_from([None, torch.float32, torch.bfloat16]))
def test_peft_folders_keep_factors_bit_for_bit(layer, dtype, tmp_path_factory):
    out = tmp_path_factory.mktemp("peft") / "adapter"
    export(AdapterFile((layer,)), out, "peft", dtype=dtype)
    (again,) = read_adapter(out)
    assert torch.equal(again.A, layer.A.to(dtype or layer.A.dtype))
    assert (again.scale, again.layout, again.name) == (layer.scale, layer.layout, layer.name)


@pytest.mark.parametrize("layout", ["kron", "diffusekrona"])
def test_ranks_are_the_closed_form_ones(layout):
    """SDXL 1280 x 1280 with (64, 8): LoRA of rank 160, LoHa of rank 20, LoKr of 3,712 numbers."""
    torch.manual_seed(0)
    layer = LayerUpdate("unet", MODULE, torch.randn(1, 64, 8), torch.randn(1, 20, 160), 1.0, layout)
    adapter = AdapterFile((layer,))
    assert lora_rank(layer) == 160
    assert to_lora(adapter, BASES["sdxl"])[
        "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q.lora_up.weight"
    ].shape == (1280, 160)
    loha = to_loha(adapter, BASES["sdxl"])
    assert loha["lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q.hada_w1_b"].shape == (20, 1280)
    low = LayerUpdate("unet", MODULE, torch.ones(1, 64, 8), torch.randn(1, 20, 160), 1.0, layout)
    assert lora_rank(low) == 20  # ones have rank 1


def one(r=1, layout="kron", a=(4, 2), b=(8, 16), module=MODULE, component="unet", fill=torch.randn):
    return LayerUpdate(component, module, fill(r, *a), fill(r, *b) * 0.1, 1.0, layout)


@pytest.mark.parametrize(
    ("layer", "format", "split"),
    [
        (one(), "lokr", False),
        (one(layout="diffusekrona"), "loha", False),
        (one(layout="diffusekrona", a=(1, 2)), "lokr", False),
        (one(r=2, a=(16, 1), b=(2, 32)), "lora", False),
        (one(r=2, a=(4, 1), b=(8, 32)), "lora", False),
        (one(r=3), "lokr", True),
        (one(r=3, layout="diffusekrona"), "loha", True),
        (one(component="transformer", module="transformer_blocks.0.attn.to_q"), "lokr", False),
        (one(component="transformer", module="blocks.0.attn.to_q"), "lora", False),
    ],
)
def test_the_automatic_choice(layer, format, split, tmp_path):
    chosen = choose_format(AdapterFile((layer,)))
    assert chosen[:2] == (format, split)
    report = export(AdapterFile((layer,)), tmp_path / "x", base_model=BASES["sd15"])
    assert report.format == format and chosen[2] in str(report)
    assert len(report.files) == (layer.r if split else 1)
    assert report.size == sum(path.stat().st_size for path in report.files)
    assert f"{report.worst_error:.2e}" in str(report) and report.worst_error < tolerance(torch.float16)


@pytest.mark.parametrize("to", ["lokr", "loha"])
def test_terms_as_several_files_add_up(to, tmp_path):
    layer = one(r=3, layout="kron" if to == "lokr" else "diffusekrona")
    other = one(r=2, module=MODULE.replace("to_q", "to_k"), layout=layer.layout)
    report = export(
        AdapterFile((layer, other)),
        tmp_path / "my.safetensors",
        to,
        base_model=BASES["sd15"],
        dtype=torch.float32,
        split_terms=True,
    )
    assert [path.name for path in report.files] == [f"my_term{n}of3.safetensors" for n in (1, 2, 3)]
    total = sum(rebuilt(to, {k: t for k, t in load_file(p).items() if k.startswith(KEY)}) for p in report.files)
    assert relative(total, judge(layer)) <= STORED
    assert len(load_file(report.files[2])) < len(load_file(report.files[1]))
    assert "together" in report.notes[-1]


@pytest.mark.parametrize(
    ("layer", "to", "message"),
    [
        (one(r=2), "lokr", r"attn1\.to_q has r=2 terms.*split_terms=True.*to='lora' or to='diff'"),
        (one(r=2), "loha", "r=2 terms.*to='lora'"),
        (one(layout="diffusekrona"), "lokr", "layout 'diffusekrona'.*to='loha'"),
        (
            one(component="transformer", module="blocks.0.attn.to_q"),
            "lokr",
            "of no family whose names in such files are known here .*Use to='lora'",
        ),
        (one(component="model", module="layers.0.q"), "lora", "to='peft'"),
        (one(component="text_encoder", module="text_model.embeddings.token_embedding"), "lora", "is an embedding"),
        (one(module="down_blocks.0.motion_modules.0.x"), "lokr", "has no name"),
        (one(), "banana", "expected one of auto, lokr"),
    ],
)
def test_refusals_name_layer_reason_and_way_out(layer, to, message, tmp_path):
    with pytest.raises(FormatError, match=message):
        export(AdapterFile((layer,)), tmp_path / "x", to, base_model=BASES["sdxl"])
    assert not list(tmp_path.iterdir())


def test_numbers_too_small_for_the_dtype_fail_and_leave_nothing(tmp_path):
    tiny = LayerUpdate("unet", MODULE, torch.full((1, 4, 2), 1e-4), torch.full((1, 8, 16), 1e-5))
    with pytest.raises(FormatError, match=r"to_q: rebuilt from the diff file, dW is off by .*dtype=torch.float32"):
        export(AdapterFile((tiny,)), tmp_path / "x", "diff", base_model=BASES["sd15"])
    assert not list(tmp_path.iterdir())
    exact = export(AdapterFile((tiny,)), tmp_path / "x", "diff", base_model=BASES["sd15"], dtype=torch.float32)
    assert exact.worst_error <= EPS
    balanced = export(AdapterFile((tiny,)), tmp_path / "y", "lokr", base_model=BASES["sd15"])
    assert balanced.worst_error <= 2 * HALF


@pytest.mark.parametrize("to", ["lokr", "lora", "loha", "diff"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("scale", [1e-30, 1e-60, 1e-200, 1e30, 1e60, 1e200], ids=str)
def test_scales_far_from_one_are_exact_or_refused(scale, dtype, to, tmp_path):
    """Numbers that vanish in the file are no exact copy of the update, however small it is."""
    layer = LayerUpdate("unet", MODULE, torch.randn(1, 4, 2), torch.randn(1, 8, 16), scale)
    try:
        export(AdapterFile((layer,)), tmp_path / "x", to, base_model=BASES["sd15"], dtype=dtype)
    except FormatError as error:
        assert re.search(r"is too large for it|Its numbers are probably too small", str(error)), error
        assert list(tmp_path.iterdir()) == []
    else:
        tensors = load_file(tmp_path / "x.safetensors")
        assert all(t.isfinite().all() and t.any() for t in tensors.values())
        assert dtype == torch.float32 and abs(math.log10(scale)) <= 60


def test_a_writer_that_is_wrong_is_caught_and_leaves_nothing(tmp_path, monkeypatch):
    def forgets_the_scale(layers, dtype):
        return [{**parts, "lokr_w1": parts["lokr_w1"] * 2} for parts in LOKR.write(layers, dtype)]

    def forgets_a_layer(layers, dtype):
        return [*LOKR.write(layers[:1], dtype), {}]

    adapter = AdapterFile((one(), one(module=MODULE.replace("to_q", "to_k"))))
    for wrong in (forgets_the_scale, forgets_a_layer):
        monkeypatch.setitem(export_module.WRITTEN, "lokr", replace(LOKR, write=wrong))
        with pytest.raises(FormatError, match="Nothing was written"):
            export(adapter, tmp_path / "x", "lokr", base_model=BASES["sd15"])
        with pytest.raises(FormatError, match="Nothing was written"):
            export(adapter, tmp_path / "x", "lokr", base_model=BASES["sd15"], split_terms=True)
        assert not list(tmp_path.iterdir())


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    export(AdapterFile((one(),)), path, "lokr", base_model=BASES["sd15"])
    before = path.read_bytes()

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors_io.os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        export(AdapterFile((one(),)), path, "lokr", base_model=BASES["sd15"])
    with pytest.raises(KeyboardInterrupt):
        export(AdapterFile((one(),)), tmp_path / "folder", "peft")
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_an_existing_folder_is_not_touched(tmp_path):
    (tmp_path / "keep").write_text("me")
    with pytest.raises(FormatError, match="exists already"):
        export(AdapterFile((one(),)), tmp_path, "peft")
    assert (tmp_path / "keep").read_text() == "me"


def test_metadata(tmp_path):
    adapter = AdapterFile((one(),), source="test", metadata={"base_model": "sdxl-base", "trigger_words": "zwx cat"})
    report = export(adapter, tmp_path / "cat", "lokr", base_model=BASES["sdxl"])
    with safe_open(report.files[0], "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_base_model_version"] == "sdxl_base_v1-0"
    assert (
        metadata["ss_network_module"] == "lycoris.kohya" and json.loads(metadata["ss_network_args"])["algo"] == "lokr"
    )
    assert (metadata["ss_output_name"], metadata["ss_v2"]) == ("cat", "False")
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert metadata["modelspec.trigger_phrase"] == metadata["trigger_words"] == "zwx cat"
    assert json.loads(metadata["krona.factors"]) == {"1x4x2": 1} and metadata["krona.layout"] == "kron"
    import hashlib

    data = report.files[0].read_bytes()
    assert metadata["sshs_model_hash"] == hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    again = read_adapter(report.files[0])
    assert again.metadata == {"base_model": "sdxl-base", "trigger_words": "zwx cat"}


@pytest.mark.parametrize(
    ("component", "base", "count"),
    [("text_encoder_2", "sdxl", 4), ("text_encoder", "sd2", 4), ("text_encoder", "sd15", 1)],
)
def test_open_clip_attentions_are_filled_up_for_a1111(component, base, count, tmp_path):
    """A1111 applies q, k, v and out of an OpenCLIP attention only together."""
    layer = one(component=component, module="text_model.encoder.layers.0.self_attn.v_proj")
    report = export(AdapterFile((layer,)), tmp_path / "x", "lokr", base_model=BASES[base])
    stems = {key.split(".")[0] for key in load_file(report.files[0])}
    assert len(stems) == count
    zeros = [key for key, t in load_file(report.files[0]).items() if key.endswith("w1") and not t.any()]
    assert len(zeros) == count - 1


def test_one_alpha_for_the_whole_lora_file():
    adapter = AdapterFile(
        (one(), one(module="conv_in", a=(2, 1), b=(3, 4, 3, 3)), one(r=3, module="mid_block.resnets.0.time_emb_proj"))
    )
    tensors = to_lora(adapter, BASES["sdxl"])
    assert len({t.item() for key, t in tensors.items() if key.endswith(".alpha")}) == 1
    assert len({t.shape[0] for key, t in tensors.items() if "down" in key}) > 1
    for layer, again in zip(adapter, from_tensors(tensors), strict=True):
        assert relative(again.delta_weight(), judge(layer)) < tolerance(torch.float16)


def test_lora_for_transformers_carries_ranks_and_alphas():
    layers = [
        one(component="transformer", module=f"transformer_blocks.0.attn.to_{k}", a=a)
        for k, a in (("q", (4, 2)), ("k", (2, 1)))
    ]
    tensors, metadata = to_lora_peft(AdapterFile(tuple(layers)), torch.float32)
    config = json.loads(metadata["lora_adapter_metadata"])
    assert config["transformer.alpha_pattern"] == config["transformer.rank_pattern"]
    again = from_tensors(tensors, metadata)
    for layer, read in zip(layers, again, strict=True):
        assert relative(read.delta_weight(), judge(layer)) <= STORED


def test_the_projection_of_the_second_text_encoder_is_named_with_it(tmp_path):
    adapter = AdapterFile((one(), one(component="text_encoder_2", module="text_projection")))
    report = export(adapter, tmp_path / "x", base_model=BASES["sdxl"])
    assert report.format == "lokr" and "lora_te2_text_projection.lokr_w1" in load_file(report.files[0])
    assert {layer.name for layer in read_adapter(report.files[0])} == {layer.name for layer in adapter}


def test_zero_updates_stay_zero(tmp_path):
    fresh = LayerUpdate("unet", MODULE, torch.randn(1, 4, 2), torch.zeros(1, 8, 16))
    for to in WRITERS:
        report = export(AdapterFile((fresh,)), tmp_path / to, to, base_model=BASES["sd15"])
        assert report.worst_error == 0
        assert not rebuilt(to, load_file(report.files[0])).any()


@pytest.mark.parametrize(
    ("layers", "kind"),
    [
        ([one(module="down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k", b=(8, 384))], "sd15"),
        ([one(module="down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k", b=(8, 512))], "sd2"),
        ([one(module="down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v", b=(8, 1024))], "sdxl"),
        ([one(module="down_blocks.2.attentions.0.transformer_blocks.7.attn1.to_q")], "sdxl"),
        ([one(), one(component="text_encoder_2", module="text_model.encoder.layers.0.mlp.fc1")], "sdxl"),
        ([one(component="text_encoder", module="text_model.encoder.layers.0.mlp.fc1", b=(8, 384))], "sd15"),
        ([one()], None),
    ],
)
def test_the_base_model_is_guessed_or_asked_for(layers, kind):
    if kind is None:
        with pytest.raises(KronAError, match="base_model: sd15, sd2, sdxl"):
            guess_base(AdapterFile(tuple(layers)))
    else:
        assert guess_base(AdapterFile(tuple(layers))) is BASES[kind]


@pytest.mark.parametrize(
    "modules",
    [
        [
            "transformer_blocks.0.attn.to_q",
            "single_transformer_blocks.3.proj_mlp",
            "transformer_blocks.1.ff.net.0.proj",
        ],
        ["single_transformer_blocks.0.attn.to_qkv_mlp_proj", "transformer_blocks.0.ff.linear_in"],
        ["transformer_blocks.0.img_mlp.net.0.proj", "transformer_blocks.7.attn.to_out.0"],
        ["transformer_blocks.0.attn.add_k_proj", "transformer_blocks.0.ff_context.net.2"],
        ["layers.0.attention.to_q", "layers.11.feed_forward.w1"],
    ],
    ids=["flux", "flux2", "qwen-image", "sd3", "z-image"],
)
def test_transformers_get_a_lokr_under_comfyuis_names(modules, tmp_path):
    """The small one is what "auto" takes; it is read back under the same modules, and the LoRA's size is named."""
    adapter = AdapterFile(tuple(one(module=m, component="transformer", a=(16, 16), b=(16, 16)) for m in modules))
    report = export(adapter, tmp_path / "x", dtype=torch.float32)
    assert report.format == "lokr" and any("load_lora_weights takes to='lora'" in note for note in report.notes)
    keys = {key.rpartition(".")[0] for key in load_file(tmp_path / "x.safetensors")}
    assert keys == {f"lycoris_{module.replace('.', '_')}" for module in modules}
    back = {layer.name: layer for layer in read_adapter(tmp_path / "x.safetensors")}
    for layer in adapter:
        assert torch.equal(back[layer.name].delta_weight(), layer.delta_weight())
    lora = export(adapter, tmp_path / "y", "lora", dtype=torch.float32)
    (note,) = (note for note in lora.notes if "times those of the same adapter as LoKr" in note)
    sizes = [p.stat().st_size for p in (tmp_path / "y.safetensors", tmp_path / "x.safetensors")]
    assert sizes[0] > 10 * sizes[1] and f"{len(adapter) * 2 * 256 * 256 * 4 / 2**20:,.2f} MiB" in note

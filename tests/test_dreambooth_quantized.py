# SPDX-License-Identifier: Apache-2.0
"""examples/dreambooth_kron.py on bases in 4 and 8 bits; what asks for a GPU, which diffusers needs, is replaced."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("diffusers")
pytest.importorskip("bitsandbytes")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import dreambooth_pipelines as tiny
from accelerate.state import AcceleratorState
from diffusers.quantizers.bitsandbytes import BnB4BitDiffusersQuantizer, BnB8BitDiffusersQuantizer

from examples import dreambooth_kron
from examples.dreambooth import TrainingError, quantized
from examples.dreambooth.arguments import parse_args

GPU = torch.device("cuda")


@pytest.mark.parametrize(
    ("text", "device", "message"),
    [
        ('{"load_in_4bit": true}', "cpu", r"needs a GPU, and this run is on the CPU: .* Drop the flag, or run where"),
        (
            '{"load_in_4bits": true}',
            "cuda",
            r"c\.json: 'load_in_4bits' is no setting; expected some of load_in_8bit, l",
        ),
        (
            '{"load_in_4bit": true, "load_in_8bit": true}',
            "cuda",
            r"expected one of load_in_4bit and load_in_8bit to be",
        ),
        ('{"bnb_4bit_quant_type": "nf4"}', "cuda", r"expected one of load_in_4bit and load_in_8bit to be true"),
        ('{"load_in_8bit": true, "llm_int8_threshold": "x"}', "cuda", r"c\.json: llm_int8_threshold must be a float"),
        ("[]", "cuda", r'expected a table such as \{"load_in_4bit": true\}'),
        ("{", "cuda", r"cannot be read \(Expecting property name.*\): expected a JSON file"),
        (None, "cuda", r"cannot be read \(.*No such file.*\): expected a JSON file"),
    ],
)
def test_mistakes_in_the_settings(tmp_path, text, device, message):
    path = tmp_path / "c.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(TrainingError) as caught:
        quantized.for_pipelines(str(path), False, torch.bfloat16, torch.device(device))
    assert re.search(message, str(caught.value)) and "\n" not in str(caught.value), caught.value


@pytest.mark.parametrize(
    ("settings", "more", "kind"),
    [
        (
            {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
            ["--bnb_quantize_text_encoders"],
            torch.uint8,
        ),
        ({"load_in_8bit": True}, ["--gradient_checkpointing", "--offload", "--bnb_quantize_text_encoders"], torch.int8),
    ],
    ids=["nf4", "int8"],
)
def test_a_quantized_base_trains(tmp_path, monkeypatch, capsys, settings, more, kind):
    """Two steps, an exact resume, the final images on a base that is loaded anew, a file for other tools."""
    for quantizer in (BnB4BitDiffusersQuantizer, BnB8BitDiffusersQuantizer):
        monkeypatch.setattr(quantizer, "validate_environment", lambda self, **_: None)
        monkeypatch.setattr(quantizer, "update_device_map", lambda self, device_map: {"": "cpu"})
    # its fast path for some CPUs does not take layers as narrow as these
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    for_pipelines, seen = quantized.for_pipelines, []
    monkeypatch.setattr(quantized, "for_pipelines", lambda *args: for_pipelines(*args[:3], GPU))
    prepare = quantized.prepare
    monkeypatch.setattr(quantized, "prepare", lambda model, *args: seen.append(model) or prepare(model, *args))
    pipeline, pictures = tiny.build(tmp_path / "sd"), tiny.images(tmp_path / "pictures")
    (tmp_path / "c.json").write_text(json.dumps(settings))
    arguments = [
        "--pretrained_model_name_or_path", str(pipeline), "--instance_data_dir", str(pictures), "--instance_prompt",
        "a sks dog", "--output_dir", str(tmp_path / "dog"), "--max_train_steps", "2", "--checkpointing_steps", "1",
        "--train_batch_size", "1", "--report_to", "none", "--validation_prompt", "x", "--num_validation_images", "1",
        "--validation_inference_steps", "1", "--mixed_precision", "bf16", "--bnb_quantization_config_path",
        str(tmp_path / "c.json"), *more,
    ]  # fmt: skip
    dreambooth_kron.main(parse_args(arguments))
    kinds = [{p.dtype for p in model.parameters() if not p.requires_grad} for model in seen]
    assert kind in kinds[0] and kind in kinds[1]
    assert torch.float32 in kinds[0]  # the norms, as in diffusers' scripts
    whole = load_file(tmp_path / "dog" / "unet" / "adapter_model.safetensors")
    assert all(v.dtype == torch.float32 and v.isfinite().all() for v in whole.values())
    assert max(v.abs().max() for k, v in whole.items() if k.endswith("krona_B")) > 0
    assert (tmp_path / "dog" / "dog.safetensors").is_file()
    assert list((tmp_path / "dog" / "validation" / "final-2").glob("0*.png"))
    assert "unet 0." in capsys.readouterr().out  # MiB, counted as they are packed
    if "--offload" in more:  # once is enough
        return
    AcceleratorState._reset_state(True)
    dreambooth_kron.main(parse_args([*arguments, "--resume_from_checkpoint", "checkpoint-1"]))
    again = load_file(tmp_path / "dog" / "unet" / "adapter_model.safetensors")
    assert all(torch.equal(whole[name], again[name]) for name in whole)

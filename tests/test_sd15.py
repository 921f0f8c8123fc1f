# SPDX-License-Identifier: Apache-2.0
"""The main job at full size: Stable Diffusion 1.5's UNet and text encoder, random weights, trained, saved, merged."""

import pytest
import torch
import torch.nn.functional as F
from adapted import krona_layers
from diffusers import UNet2DConditionModel
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from test_counts import CLIP_L, COUNTS, UNETS
from transformers import CLIPTextConfig, CLIPTextModel

import peft_krona
from peft_krona import KronAConfig

DTYPE = torch.bfloat16  # 2 GB of weights


def random_model(make, seed):
    """A model whose weights have the scale of trained ones, without the minutes that its own initialisation takes."""
    with torch.device("meta"):
        model = make()
    model = model.to(DTYPE).to_empty(device="cpu")
    noise = torch.randn(1 << 20, generator=torch.Generator().manual_seed(seed)).to(DTYPE)
    for name, p in model.named_parameters():
        if p.dim() == 1:
            p.data.fill_(1.0 if name.endswith("weight") else 0.0)
        else:
            repeated = noise.repeat(-(-p.numel() // len(noise)))[: p.numel()]
            p.data.copy_(repeated.view(p.shape)).mul_(p[0].numel() ** -0.5)
    for name, buffer in model.named_buffers():
        assert name.endswith("position_ids")
        buffer.copy_(torch.arange(buffer.shape[-1]).expand(buffer.shape))
    return model.requires_grad_(False).eval()


def same_base(make, model):
    """A fresh model over the same frozen weights, which stay shared to save memory."""
    with torch.device("meta"):
        fresh = make().to(DTYPE)
    base = {k.replace(".base_layer.", "."): v for k, v in model.state_dict().items() if ".krona_" not in k}
    fresh.load_state_dict(base, strict=False, assign=True)
    for name, buffer in model.named_buffers():
        parent, _, last = name.rpartition(".")
        fresh.get_submodule(parent)._buffers[last] = buffer
    assert not any(t.is_meta for t in (*fresh.parameters(), *fresh.buffers()))
    return fresh.eval()


MAKE = {
    "unet": lambda: UNet2DConditionModel(**UNETS["sd15"]),
    "text_encoder": lambda: CLIPTextModel(CLIPTextConfig(**CLIP_L)),
}


@pytest.mark.slow
def test_train_save_load_merge_unmerge(tmp_path):
    models = {name: get_peft_model(random_model(make, i), KronAConfig()) for i, (name, make) in enumerate(MAKE.items())}
    trainable = {n: p for m in models.values() for n, p in m.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trainable.values()) == COUNTS[4]["sd15"] + COUNTS[4]["clip-l"]
    assert {p.dtype for p in trainable.values()} == {torch.float32}

    ids = torch.randint(0, 49407, (1, 12))
    latents, noise = torch.randn(1, 4, 8, 8).to(DTYPE), torch.randn(1, 4, 8, 8)
    step = torch.tensor([500])

    def predict(models):
        return models["unet"](latents, step, models["text_encoder"](ids)[0]).sample

    with torch.no_grad():
        untrained = predict(models)
        with models["unet"].disable_adapter(), models["text_encoder"].disable_adapter():
            assert torch.equal(predict(models), untrained)

    optimizer = torch.optim.Adam(trainable.values(), lr=3e-3)
    for model in models.values():
        model.train()
    losses = []
    for _ in range(4):
        loss = F.mse_loss(predict(models).float(), noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    moved = [n for n, p in trainable.items() if n.endswith("krona_B.default") and p.any()]
    assert len(moved) == len(trainable) // 2  # every layer has learned something

    for name, model in models.items():
        model.eval().save_pretrained(str(tmp_path / name))
        saved = load_file(tmp_path / name / "adapter_model.safetensors")
        assert sum(t.numel() for t in saved.values()) == COUNTS[4]["sd15" if name == "unet" else "clip-l"]
    with torch.no_grad():
        trained = predict(models)
        assert not torch.equal(trained, untrained)
        fresh = {
            name: PeftModel.from_pretrained(same_base(MAKE[name], m.get_base_model()), str(tmp_path / name))
            for name, m in models.items()
        }
        assert torch.equal(predict(fresh), trained)
        del fresh

        layers = [layer for m in models.values() for layer in krona_layers(m).values()]
        before = [layer.get_base_layer().weight.clone() for layer in layers]
        with peft_krona.merged(models["unet"]), peft_krona.merged(models["text_encoder"]):
            merged = predict(models)
            changed = sum(
                not torch.equal(layer.get_base_layer().weight, w) for layer, w in zip(layers, before, strict=True)
            )
            assert changed == len(layers) == 4 * 32 + 4 * 12
        assert all(torch.equal(layer.get_base_layer().weight, w) for layer, w in zip(layers, before, strict=True))
        assert torch.equal(predict(models), trained)
        # merged weights are rounded to bf16, the adapter apart is not: closer to each other than to the untrained model
        assert (merged - trained).float().norm() < (untrained - trained).float().norm()

# SPDX-License-Identifier: Apache-2.0
"""diffusers' official LoRA recipes with `KronAConfig` in the place of `LoraConfig`, and nothing else changed.

Their shape: add_adapter on denoiser and text encoders, accelerate's save hook with get_peft_model_state_dict and
save_lora_weights, the load hook with lora_state_dict and set_peft_model_state_dict, a last save, load_lora_weights.
"""

import json

import pytest
import tiny
import torch
from accelerate import Accelerator
from diffusers import FluxPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.training_utils import _collate_lora_metadata, _set_state_dict_into_text_encoder, cast_training_params
from diffusers.utils import convert_state_dict_to_diffusers, convert_unet_state_dict_to_peft
from peft import LoraConfig, set_peft_model_state_dict
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open

from peft_krona import KronAConfig
from peft_krona.errors import FormatError
from peft_krona.pipelines import load_krona_weights

RECIPES = {
    "sd": (StableDiffusionPipeline, "unet", ["text_encoder"]),
    "sdxl": (StableDiffusionXLPipeline, "unet", ["text_encoder", "text_encoder_2"]),
    "sd3": (StableDiffusion3Pipeline, "transformer", ["text_encoder", "text_encoder_2"]),
    "flux": (FluxPipeline, "transformer", ["text_encoder"]),
}
CONFIGS = {
    "krona": lambda targets: KronAConfig(a_out=8, a_in=2, alpha=2.0, target_modules=targets),
    "lora": lambda targets: LoraConfig(r=2, lora_alpha=4, init_lora_weights="gaussian", target_modules=targets),
}


class Recipe:
    """A recipe's setup, hooks, steps and last save."""

    def __init__(self, kind, method, folder, collate=True):
        self.cls, self.denoiser, self.encoders = RECIPES[kind]
        self.pipe = tiny.PIPELINES[kind]()
        self.kind, self.folder, self.collate = kind, folder, collate
        self.accelerator = Accelerator(cpu=True)
        for part in self.pipe.components.values():
            if isinstance(part, torch.nn.Module):
                part.requires_grad_(False)
        torch.manual_seed(1)
        models = [getattr(self.pipe, name) for name in (self.denoiser, *self.encoders)]
        models[0].add_adapter(CONFIGS[method](["to_k", "to_q", "to_v", "to_out.0"]))
        for encoder in models[1:]:
            encoder.add_adapter(CONFIGS[method](["q_proj", "k_proj", "v_proj", "out_proj"]))
        cast_training_params(models, dtype=torch.float32)
        parameters = [p for model in models for p in model.parameters() if p.requires_grad]
        *self.models, self.optimizer = self.accelerator.prepare(*models, torch.optim.AdamW(parameters, lr=1e-2))
        self.accelerator.register_save_state_pre_hook(self.save_model_hook)
        self.accelerator.register_load_state_pre_hook(self.load_model_hook)

    def save_model_hook(self, models, weights, output_dir):
        layers, modules_to_save = {}, {}
        for name, model in zip((self.denoiser, *self.encoders), models, strict=True):
            model = self.accelerator.unwrap_model(model)
            state_dict = get_peft_model_state_dict(model)
            if self.denoiser == "unet":  # the newer recipes leave this out
                state_dict = convert_state_dict_to_diffusers(state_dict)
            layers[f"{name}_lora_layers"] = state_dict
            modules_to_save[name] = model
            weights.pop()
        metadata = _collate_lora_metadata(modules_to_save) if self.collate else {}
        self.cls.save_lora_weights(output_dir, **layers, **metadata)

    def load_model_hook(self, models, input_dir):
        denoiser, *encoders = (models.pop(0) for _ in range(len(models)))
        loader = StableDiffusionLoraLoaderMixin if self.kind == "sdxl" else self.cls
        state_dict = loader.lora_state_dict(input_dir)
        state_dict = state_dict[0] if isinstance(state_dict, tuple) else state_dict
        start = f"{self.denoiser}."
        own = {f"{k.replace(start, '')}": v for k, v in state_dict.items() if k.startswith(start)}
        result = set_peft_model_state_dict(denoiser, convert_unet_state_dict_to_peft(own), adapter_name="default")
        assert result is not None and not result.unexpected_keys
        for name, encoder in zip(self.encoders, encoders, strict=True):
            _set_state_dict_into_text_encoder(state_dict, prefix=f"{name}.", text_encoder=encoder)

    def step(self, seed):
        generator = torch.Generator().manual_seed(seed)
        loss = 0.0
        for model in self.models[1:]:
            loss = loss + model(torch.randint(0, 9, (1, 5), generator=generator))[0].square().mean()
        x = torch.randn(1, 4, 8, 8, generator=generator)
        text = torch.randn(1, 5, tiny.WIDTH * (2 if self.kind == "sdxl" else 1), generator=generator)
        time = torch.tensor([3.0])
        inputs = {"timestep": time, "encoder_hidden_states": text, "return_dict": False}
        if self.kind == "sdxl":
            ids = torch.zeros(1, 6)
            inputs["added_cond_kwargs"] = {"text_embeds": torch.zeros(1, tiny.WIDTH), "time_ids": ids}
        elif self.kind == "sd3":
            inputs["pooled_projections"] = torch.zeros(1, 2 * tiny.WIDTH)
        elif self.kind == "flux":
            x = x.reshape(1, 16, 16)
            inputs["pooled_projections"] = torch.zeros(1, tiny.WIDTH)
            inputs |= {"txt_ids": torch.zeros(5, 3), "img_ids": torch.zeros(16, 3)}
        loss = loss + self.models[0](x, **inputs)[0].square().mean()
        self.accelerator.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save(self):
        self.save_model_hook(self.models, [None] * len(self.models), self.folder)

    def weights(self):
        return [p.detach().clone() for model in self.models for p in model.parameters() if p.requires_grad]

    def image(self):
        for model in self.models:
            model.eval()
        return tiny.image(self.pipe)


@pytest.mark.parametrize(("kind", "method"), [*((kind, "krona") for kind in RECIPES), ("sd", "lora")])
def test_official_recipe(kind, method, tmp_path):
    # without the settings, LoRA's alpha is lost; KronA's come along
    recipe = Recipe(kind, method, tmp_path, collate=method == "lora" or kind in ("sdxl", "sd3"))
    before = recipe.weights()
    recipe.step(0)
    recipe.accelerator.save_state(tmp_path / "checkpoint-1")
    recipe.step(1)
    after = recipe.weights()
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    # resumed: exactly the same run
    resumed = Recipe(kind, method, tmp_path, collate=recipe.collate)
    resumed.accelerator.load_state(tmp_path / "checkpoint-1")
    resumed.step(1)
    assert all(torch.equal(a, b) for a, b in zip(resumed.weights(), after, strict=True))
    # the last save, and a fresh pipeline
    recipe.save()
    image = recipe.image()
    fresh = tiny.PIPELINES[kind]()
    base = tiny.image(fresh)
    fresh.load_lora_weights(str(tmp_path))
    assert torch.equal(tiny.image(fresh), image) and not torch.equal(image, base)
    names = [recipe.denoiser, *recipe.encoders]
    assert sorted(fresh.get_list_adapters()) == sorted(names)
    if method == "krona":
        with safe_open(tmp_path / "pytorch_lora_weights.safetensors", "pt") as file:
            settings = json.loads(file.metadata()["lora_adapter_metadata"])
        assert all(settings[f"{name}.alpha"] == 2.0 and settings[f"{name}.peft_type"] == "KRONA" for name in names)
        fresh = tiny.PIPELINES[kind]()
        assert sorted(load_krona_weights(fresh, tmp_path / "checkpoint-1")) == sorted(names)
        fresh = tiny.PIPELINES[kind]()
        fresh.load_lora_weights(str(tmp_path), weight_name="pytorch_lora_weights.safetensors", adapter_name="style")
        fresh.fuse_lora(components=names)
        fresh.unload_lora_weights()
        assert not torch.equal(tiny.image(fresh), base)


def test_weights_without_settings_load_with_a_config_and_not_without(tmp_path):
    recipe = Recipe("sd", "krona", tmp_path)
    recipe.step(0)
    image = recipe.image()
    parts = {
        f"{name}_lora_layers": {key: tensor.clone() for key, tensor in get_peft_model_state_dict(model).items()}
        for name, model in zip(("unet", "text_encoder"), recipe.models, strict=True)
    }
    StableDiffusionPipeline.save_lora_weights(tmp_path, **parts)
    for call in ("load_lora_weights", None):
        pipe = tiny.sd_pipeline()
        with pytest.raises(FormatError, match=r"no settings, .* load_krona_weights\(pipe, source, config=KronAConfig"):
            getattr(pipe, call)(tmp_path) if call else load_krona_weights(pipe, tmp_path)
    assert sorted(load_krona_weights(pipe, tmp_path, config=KronAConfig(a_out=8, a_in=2, alpha=2.0))) == [
        "text_encoder", "unet"
    ]  # fmt: skip
    assert torch.equal(tiny.image(pipe), image)
    with pytest.raises(FormatError, match=r"krona_A has shape \(1, 8, 2\), the layer needs \(1, 4, 2\)"):
        load_krona_weights(tiny.sd_pipeline(), tmp_path, config=KronAConfig(a_out=4, a_in=2))

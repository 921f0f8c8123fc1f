# SPDX-License-Identifier: Apache-2.0
"""Counts what the presets here need in memory, from the models' configs: nothing is downloaded, no weight is made.

    python examples/configs/memory.py                 # a line per preset, as it stands at the preset's head

Not counted: the VAE, activations (which grow with the resolution), and what torch and CUDA take themselves.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import diffusers
import torch
import transformers
import yaml
from peft import get_peft_model
from torch import nn

from peft_krona import KronAConfig

HERE, GIB, MIB = Path(__file__).resolve().parent, 2**30, 2**20
SD = {
    "sample_size": 64, "block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2, "cross_attention_dim": 768,
    "attention_head_dim": 8, "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
}  # fmt: skip
SDXL = {
    "sample_size": 128, "block_out_channels": (320, 640, 1280), "layers_per_block": 2, "cross_attention_dim": 2048,
    "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 2), "transformer_layers_per_block": (1, 2, 10),
    "up_block_types": (*("CrossAttnUpBlock2D",) * 2, "UpBlock2D"), "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
SD35_MEDIUM = {
    "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm",
}  # fmt: skip
KLEIN_4B = {
    "num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 3 * 2560,
    "guidance_embeds": False,
}  # fmt: skip
CLIP_L = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "vocab_size": 49408, "projection_dim": 768,
}  # fmt: skip
CLIP_G = {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
    "vocab_size": 49408, "projection_dim": 1280,
}  # fmt: skip
T5_XXL = {
    "d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "d_kv": 64, "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip
QWEN3_4B = {
    "hidden_size": 2560, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "intermediate_size": 9728, "vocab_size": 151936, "tie_word_embeddings": True,
}  # fmt: skip
QWEN25_VL_7B = {
    "text_config": {
        "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
        "intermediate_size": 18944, "vocab_size": 152064,
    },
    "vision_config": {
        "depth": 32, "hidden_size": 1280, "num_heads": 16, "intermediate_size": 3420, "out_hidden_size": 3584,
    },
}  # fmt: skip
# text encoders: (class, config's class, its settings)
CLIP = ("CLIPTextModel", "CLIPTextConfig", CLIP_L)
BIG_CLIP = ("CLIPTextModelWithProjection", "CLIPTextConfig", CLIP_G)
T5, QWEN3 = ("T5EncoderModel", "T5Config", T5_XXL), ("Qwen3ForCausalLM", "Qwen3Config", QWEN3_4B)
QWEN_VL = ("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig", QWEN25_VL_7B)
# {preset: (denoiser's class, what its config has beside the class's defaults, text encoders; None: not known here)}
MODELS: dict[str, tuple] = {
    "sd15": ("UNet2DConditionModel", SD, (CLIP,)),
    "sdxl": ("UNet2DConditionModel", SDXL, (CLIP, BIG_CLIP)),
    "sd35_medium": ("SD3Transformer2DModel", SD35_MEDIUM, (CLIP, BIG_CLIP, T5)),
    "flux1_dev": ("FluxTransformer2DModel", {"guidance_embeds": True}, (CLIP, T5)),
    "flux2_klein": ("Flux2Transformer2DModel", KLEIN_4B, (QWEN3,)),
    "qwen_image": ("QwenImageTransformer2DModel", {}, (QWEN_VL,)),
    "z_image": ("ZImageTransformer2DModel", {}, (QWEN3,)),
    "krea2": ("Krea2Transformer2DModel", {}, None),
}


def count(preset: str) -> str:
    """What the models and the adapter of a preset need, as a sentence."""
    cls, config, encoders = MODELS[preset]
    flags = yaml.safe_load((HERE / f"{preset}.yaml").read_text(encoding="utf-8"))
    with torch.device("meta"):
        model = getattr(diffusers, cls)(**config)
        texts = [
            getattr(transformers, name)(getattr(transformers, kind)(**settings))
            for name, kind, settings in encoders or ()
        ]
    size = parameters(model)
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    nf4 = linear * (1 / 2 + 4 / 64) + 4 * (size - linear)  # half a byte and a scale per 64; the rest in float32
    settings = KronAConfig(a_out=flags["krona_a_out"], a_in=flags["krona_a_in"], r=flags.get("rank", 1))
    adapted = get_peft_model(model, settings, low_cpu_mem_usage=True)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    text = sum(map(parameters, texts))
    read = f"text encoders {text / 1e9:.2f}B, {2 * text / GIB:.1f} GiB" if texts else "text encoder not counted"
    states = 16 if flags.get("optimizer") == "prodigy" else 8
    return (
        f"denoiser {size / 1e9:.2f}B parameters, {2 * size / GIB:.1f} GiB in 16 bits ({nf4 / GIB:.1f} in nf4); {read}; "
        f"adapter {trained:,} parameters, with gradients and optimizer {trained * (8 + states) / MIB:.0f} MiB"
    )


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


if __name__ == "__main__":
    for preset in MODELS:
        print(f"{preset}: {count(preset)}", flush=True)

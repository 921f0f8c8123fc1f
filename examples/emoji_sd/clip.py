"""Contrastive training (CLIP) of a text encoder with a small image encoder on the cached latents."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, normalize
from transformers import CLIPTextConfig, CLIPTextModel

from .loop import Loop, adamw, autocast
from .text import LENGTH, RARE

STEPS, BATCH, LR, WIDTH = 1000, 128, 1e-3, 128


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, width), nn.GroupNorm(8, width)
        self.conv1, self.conv2 = nn.Conv2d(width, width, 3, 1, 1), nn.Conv2d(width, width, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(gelu(self.norm2(self.conv1(gelu(self.norm1(x))))))


class LatentEncoder(nn.Module):
    """Latents, N x channels x 16 x 16, to one vector."""

    def __init__(self, channels: int, width: int = 96, out: int = WIDTH):
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(channels, width, 4, 2, 1), Block(width),
            nn.Conv2d(width, 2 * width, 4, 2, 1), Block(2 * width), nn.Conv2d(2 * width, 64, 1), nn.GELU(),
        )  # fmt: skip
        self.head = nn.Linear(64 * 16, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x).flatten(1))


def build_text_encoder(tokenizer, width: int = 128, layers: int = 3) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=width // 64, max_position_embeddings=LENGTH, projection_dim=width,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return CLIPTextModel(config)


class Clip(nn.Module):
    def __init__(self, text: CLIPTextModel, image: nn.Module):
        super().__init__()
        self.text, self.image = text, image
        self.text_head = nn.Linear(text.config.hidden_size, WIDTH, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def embed_text(self, ids: Tensor) -> Tensor:
        return normalize(self.text_head(self.text(ids).pooler_output).float(), dim=-1)

    def embed_image(self, x: Tensor) -> Tensor:
        return normalize(self.image(x).float(), dim=-1)


def with_rare_word(caption: str, rng, chance: float = 0.1) -> str:
    """Sometimes put a rare word after the article, so that an identifier such as "sks" changes little by itself."""
    words = caption.split()
    if rng.random() < chance:
        at = 3 if words[1] in ("photo", "picture") else 0  # the article or "two"
        words.insert(at + 1, RARE[rng.integers(len(RARE))])
    return " ".join(words)


def contrast(a: Tensor, b: Tensor, scale: Tensor, same: Tensor | None = None) -> Tensor:
    """Symmetric contrastive loss; pairs marked in `same` (off the diagonal) are left out as negatives."""
    logits = scale * a @ b.T
    if same is not None:
        logits = logits.masked_fill(same & ~torch.eye(len(a), dtype=torch.bool), -1e4)
    target = torch.arange(len(a))
    return (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2


def train(folder, tokenizer, latents: Tensor, ids: Tensor, steps: int = STEPS, deadline=None) -> tuple[Clip, bool]:
    """`latents` (scaled), N x C x 16 x 16, and the token ids of K captions of each, N x K x LENGTH.
    Returns the model, and whether it has had all its steps."""
    torch.manual_seed(0)
    model = Clip(build_text_encoder(tokenizer), LatentEncoder(latents.shape[1]))

    def loss(step):
        pick = torch.randint(len(latents), (BATCH,))
        words = ids[pick, torch.randint(ids.shape[1], (BATCH,))]
        x = latents[pick].float()
        with autocast():
            image, text = model.embed_image(x + 0.1 * torch.randn_like(x)), model.embed_text(words)
        same = (words[:, None] == words[None]).all(-1)
        scale = model.log_scale.clamp(max=math.log(50)).exp()
        value = contrast(image, text, scale, same)
        accuracy = ((image @ text.T).argmax(1) == torch.arange(BATCH)).float().mean()
        return value, {"loss": value, "accuracy": accuracy, "scale": scale}

    loop = Loop("clip", folder, model, adamw(list(model.parameters()), LR), steps, seed=2, deadline=deadline).run(loss)
    return model.eval(), loop.finished

"""The judge: a small image/text encoder that says what a picture shows, trained apart from the generator.

    from examples.emoji_sd.judge import Judge      # or, from a script in examples/: from emoji_sd.judge import Judge
    judge = Judge.load()
    judge.concept_scores(images, ["teapot", "violin"])     # pictures x names, cosines
    judge.text_similarity(images, texts)                   # pictures x texts, cosines: stands in for CLIP-T
    judge.image_similarity(images, others)                 # pictures x pictures, cosines: stands in for CLIP-I
    judge.subject_similarity(images, others)               # the same in another space: stands in for DINO
    background_colour(images)                              # a name for each picture, from its border pixels alone

Captions name background colours, so the space of texts sees the background too, as CLIP does; the other one does not.
Pictures are PIL images of any size.  The text tower is a bag of known words; unknown words ("sks") count for nothing.
The two image spaces are two heads on one trunk: one trained with captions (contrastively, as CLIP), the other without
any name, on telling apart all emoji of the set whatever their pose, background and picture quality (as instance
discrimination does); it is not self-supervised in DINO's sense, but no label other than "the same emoji" enters it.
"""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import gelu, normalize

from .render import COLOURS, article

FOLDER = Path(__file__).resolve().parent.parent / "assets" / "judge"
SIZE = 64


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, width), nn.GroupNorm(8, width)
        self.conv1, self.conv2 = nn.Conv2d(width, width, 3, 1, 1), nn.Conv2d(width, width, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(gelu(self.norm2(self.conv1(gelu(self.norm1(x))))))


class JudgeModel(nn.Module):
    """Strided convolutions with residual blocks to a 4x4 grid; two linear heads; a bag of words for texts."""

    def __init__(self, words: list[str], width: int, out: int):
        super().__init__()
        self.words = {word: i + 1 for i, word in enumerate(words)}  # 0 is no word
        layers, channels = [], 3
        for multiple in (1, 2, 4, 8):
            layers += [nn.Conv2d(channels, width * multiple, 4, 2, 1), Block(width * multiple)]
            channels = width * multiple
        self.trunk = nn.Sequential(*layers, nn.GroupNorm(8, channels), nn.GELU(), nn.Conv2d(channels, 64, 1), nn.GELU())
        self.image_head, self.subject_head = nn.Linear(64 * 16, out), nn.Linear(64 * 16, out)
        self.word_table = nn.Embedding(len(words) + 1, out, padding_idx=0)
        self.text_head = nn.Sequential(nn.Linear(out, 2 * out), nn.GELU(), nn.Linear(2 * out, out))
        self.log_scale = nn.Parameter(torch.tensor(2.5))

    def embed_images(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.trunk(x).flatten(1)
        return normalize(self.image_head(features).float(), dim=-1), normalize(
            self.subject_head(features).float(), dim=-1
        )

    def embed_texts(self, texts: list[str]) -> Tensor:
        bags = [[self.words.get(word.strip(".,!?"), 0) for word in text.lower().split()] for text in texts]
        length = max(1, *map(len, bags)) if bags else 1
        ids = torch.tensor([bag + [0] * (length - len(bag)) for bag in bags])
        return normalize(self.text_head(self.word_table(ids).sum(1)).float(), dim=-1)


class Judge:
    def __init__(self, model: JudgeModel, names: list[str]):
        self.model, self.names = model.eval(), names

    @classmethod
    def load(cls, folder: Path = FOLDER) -> "Judge":
        folder = Path(folder)
        config = json.loads((folder / "config.json").read_text())
        model = JudgeModel(config["words"], config["width"], config["out"])
        model.load_state_dict({k: v.float() for k, v in load_file(folder / "model.safetensors").items()})
        return cls(model, config["names"])

    @torch.no_grad()
    def _embed(self, images) -> tuple[Tensor, Tensor]:
        parts = [self.model.embed_images(_tensor(images[i : i + 64])) for i in range(0, len(images), 64)]
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

    def embed_images(self, images) -> Tensor:
        """Unit vectors in the space that pictures and texts share."""
        return self._embed(images)[0]

    def embed_subjects(self, images) -> Tensor:
        """Unit vectors in the space that tells emoji apart and knows no names."""
        return self._embed(images)[1]

    @torch.no_grad()
    def embed_texts(self, texts: list[str]) -> Tensor:
        return self.model.embed_texts(texts)

    def concept_scores(self, images, names: list[str] | None = None) -> Tensor:
        """Cosines of pictures (rows) with "a photo of a <name>" (columns); without `names`, all that it knows."""
        names = self.names if names is None else names
        unknown = [n for n in names if not any(w in self.model.words for w in n.lower().split())]
        if unknown:
            raise ValueError(f"the judge has no word for {unknown}")
        return self.text_similarity(images, [f"a photo of {article(name)}" for name in names])

    def text_similarity(self, images, texts: list[str]) -> Tensor:
        return self.embed_images(images) @ self.embed_texts(texts).T

    def image_similarity(self, images, others) -> Tensor:
        return self.embed_images(images) @ self.embed_images(others).T

    def subject_similarity(self, images, others) -> Tensor:
        return self.embed_subjects(images) @ self.embed_subjects(others).T

    def background_colour(self, images) -> list[str]:
        return background_colour(images)


def _tensor(images) -> Tensor:
    arrays = [np.asarray(_resized(image)) for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1


def _resized(image: Image.Image) -> Image.Image:
    if not isinstance(image, Image.Image):
        raise TypeError(f"the judge takes PIL images, not {type(image).__name__}")
    image = image.convert("RGB")
    return image if image.size == (SIZE, SIZE) else image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def _palette() -> tuple[list[str], np.ndarray]:
    """Every named colour in the shades that gradients and stripes draw it in."""
    names, shades = [], []
    for name, rgb in COLOURS.items():
        base = np.array(rgb, float)
        other = base * 0.78 if base.mean() > 60 else base * 0.6 + 0.4 * 70
        for mix in (0, 0.5, 1):
            names.append(name)
            shades.append(base + mix * (other - base))
    return names, np.array(shades)


def background_colour(images, border: int = 3) -> list[str]:
    """The colour that most border pixels are nearest to, of the named ones in their shades."""
    names, shades = _palette()
    result = []
    for image in images:
        pixels = np.asarray(_resized(image), float)
        frame = np.ones(pixels.shape[:2], bool)
        frame[border:-border, border:-border] = False
        nearest = ((pixels[frame][:, None] - shades) ** 2).sum(-1).argmin(1)
        votes = [names[i] for i in nearest]
        result.append(max(COLOURS, key=votes.count))
    return result

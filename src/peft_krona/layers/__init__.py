# SPDX-License-Identifier: Apache-2.0
"""The adapted layers: `KronALayer`, the base of all, and one class for each kind of base layer."""

from .base import KronALayer
from .conv import Conv1d, Conv2d, Conv3d
from .embedding import Embedding
from .linear import Linear

__all__ = ["Conv1d", "Conv2d", "Conv3d", "Embedding", "KronALayer", "Linear"]

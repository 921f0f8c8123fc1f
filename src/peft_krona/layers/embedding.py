# SPDX-License-Identifier: Apache-2.0
"""Adapted embeddings."""

from __future__ import annotations

import torch

from ..ops import kron_embedding
from .base import KronALayer


class Embedding(KronALayer):
    """An adapted nn.Embedding: in = num_embeddings, out = embedding_dim, and the table gets dW^T added."""

    def _in_base_shape(self, delta: torch.Tensor) -> torch.Tensor:
        return delta.T.contiguous()

    def _add_delta(self, result: torch.Tensor, x: torch.Tensor, name: str) -> torch.Tensor:
        A, B = self.krona_A[name], self.krona_B[name]
        delta = self.krona_dropout[name](kron_embedding(x, A, B, scale=self._scale(name), layout=self.layout[name]))
        embed_scale = self._get_embed_scale()  # e.g. Gemma's scaled embeddings
        if embed_scale is not None:
            delta = delta * embed_scale.to(delta.dtype)
        return result + delta.to(result.dtype)

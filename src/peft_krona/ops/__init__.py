# SPDX-License-Identifier: Apache-2.0
"""The Kronecker ops. Never imports peft: usable alone."""

from .conv import kron_conv
from .delta import kron_delta_weight
from .embedding import kron_embedding
from .linear import kron_linear
from .operands import Frozen

__all__ = ["Frozen", "kron_conv", "kron_delta_weight", "kron_embedding", "kron_linear"]

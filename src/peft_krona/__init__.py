# SPDX-License-Identifier: Apache-2.0
"""Kronecker adapters for PEFT."""

from .ops import kron_linear

__all__ = ["kron_linear"]

# SPDX-License-Identifier: Apache-2.0
"""Adapted convolutions in one, two and three dimensions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..ops import kron_conv
from .base import KronALayer


class _ConvNd(KronALayer):
    """krona_B is (r, b_out, b_in, *kernel); a_out * b_out = out_channels, a_in * b_in = in_channels / groups."""

    # read by those who wrap or inspect a convolution: PEFT's LoRA, diffusers' ControlNets
    in_channels = property(lambda self: self._conv().in_channels)
    out_channels = property(lambda self: self._conv().out_channels)
    kernel_size = property(lambda self: self._conv().kernel_size)
    stride = property(lambda self: self._conv().stride)
    padding = property(lambda self: self._conv().padding)
    dilation = property(lambda self: self._conv().dilation)
    groups = property(lambda self: self._conv().groups)
    padding_mode = property(lambda self: self._conv().padding_mode)

    def _conv(self) -> nn.Conv1d | nn.Conv2d | nn.Conv3d:
        base = self.get_base_layer()
        assert isinstance(base, (nn.Conv1d, nn.Conv2d, nn.Conv3d))  # KronAModel.layers_mapping
        return base

    def _features(self, base: nn.Module) -> tuple[int, int]:
        base = self._conv()
        return base.in_channels // base.groups, base.out_channels

    def _kernel(self) -> tuple[int, ...]:
        return tuple(self._conv().kernel_size)

    def _add_delta(self, result: torch.Tensor, x: torch.Tensor, name: str) -> torch.Tensor:
        base = self._conv()
        x = self.krona_dropout[name](x)
        padding: int | tuple[int, ...] | str = base.padding
        if base.padding_mode != "zeros":
            x, padding = F.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode), 0
        delta = kron_conv(
            x,
            self.krona_A[name],
            self.krona_B[name],
            stride=base.stride,
            padding=padding,
            dilation=base.dilation,
            groups=base.groups,
            scale=self._scale(name),
            layout=self.layout[name],
        )
        return result + delta.to(result.dtype)


class Conv1d(_ConvNd):
    """An adapted nn.Conv1d."""


class Conv2d(_ConvNd):
    """An adapted nn.Conv2d."""


class Conv3d(_ConvNd):
    """An adapted nn.Conv3d."""

# SPDX-License-Identifier: Apache-2.0
"""Factors that accelerate or diffusers has offloaded, brought back for as long as they are computed with.

Their hooks bring a module's tensors when the module is called, which the factors' dicts never are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .._compat import offloading_hooks


@contextmanager
def onloaded(*modules: nn.Module) -> Iterator[None]:
    """The modules' tensors are where they are computed with inside the block."""
    hooks = [(hook, module) for module in modules for hook in offloading_hooks(module)]
    for hook, module in hooks:
        hook.pre_forward(module)
    try:
        yield
    finally:
        for hook, module in hooks:
            hook.post_forward(module, None)

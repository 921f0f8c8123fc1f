# SPDX-License-Identifier: Apache-2.0
"""`merged`: a model with its KronA adapters merged for the length of a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft.tuners.tuners_utils import onload_layer
from torch import nn

from .errors import MergeError
from .layers import KronALayer


@contextmanager
def merged(model: nn.Module, adapter_names: list[str] | None = None, safe_merge: bool = False) -> Iterator[nn.Module]:
    """Merge the KronA adapters of a model for the length of a `with` block and restore it exactly afterwards.

    Works on a `PeftModel` and on any model that KronA was injected into (a diffusers UNet, say). Adapters that are
    merged already stay merged. Costs one copy of every adapted weight, on its device, inside the block.

    Args:
        model: the model, or any part of it.
        adapter_names: adapters to merge; None merges the active ones.
        safe_merge: check every merged weight for NaN and infinity before any weight is changed.

    Raises:
        MergeError: if the model has no KronA layers, or no adapter of one of these names.
        TypeError: if `adapter_names` is a string.

    >>> import torch, peft_krona
    >>> from peft import get_peft_model
    >>> base = torch.nn.Sequential(torch.nn.Linear(8, 8))
    >>> config = peft_krona.KronAConfig(target_modules=["0"], a_out=4, a_in=2, init_weights=False)
    >>> model, x = get_peft_model(base, config), torch.randn(3, 8)
    >>> before = base[0].weight.clone()
    >>> with peft_krona.merged(model):
    ...     merged_inside = not torch.equal(base[0].weight, before)
    >>> merged_inside, torch.equal(base[0].weight, before)
    (True, True)
    """
    layers = [module for module in model.modules() if isinstance(module, KronALayer)]
    if not layers:
        raise MergeError(
            f"merged() found no KronA layer in {type(model).__name__}. Add an adapter first, e.g. with "
            "get_peft_model(model, KronAConfig(...)) or model.add_adapter(KronAConfig(...))."
        )
    if isinstance(adapter_names, str):
        raise TypeError(f"merged(): adapter_names should be a list of strings, got {adapter_names!r}.")
    known = {name for layer in layers for name in layer.krona_A}
    unknown = [name for name in adapter_names or [] if name not in known]
    if unknown:
        raise MergeError(f"merged(): there is no KronA adapter {unknown} in this model; it has {sorted(known)}.")
    if safe_merge:
        for layer in layers:
            with onload_layer(layer):
                layer.check_merge(adapter_names, check_finite=True)
    before = [(layer, len(layer.merged_adapters)) for layer in layers]
    try:
        for layer in layers:
            wanted = layer.active_adapters if adapter_names is None else adapter_names
            new = [name for name in wanted if name not in layer.merged_adapters]
            if new:
                with onload_layer(layer):
                    layer.merge(adapter_names=new)
        yield model
    finally:
        for layer, count in reversed(before):  # two layers may share a weight
            if len(layer.merged_adapters) > count:
                with onload_layer(layer):
                    layer.unmerge(keep=count)

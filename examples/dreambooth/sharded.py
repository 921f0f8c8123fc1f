# SPDX-License-Identifier: Apache-2.0
"""FSDP2 and DeepSpeed: a model spread over processes, of which only what is trained is collected, saved and read back.

accelerate's own checkpoints hold the whole model then, so 24 GB for a frozen FLUX.1 each time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from accelerate.utils import DistributedType
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


def is_sharded(accelerator: Any) -> bool:
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def load_whole(accelerator: Any) -> None:
    """Let from_pretrained load models as they are: under ZeRO-3 transformers would spread the frozen ones at once."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        from transformers.integrations import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()


def hides_parameters(accelerator: Any) -> bool:
    """Whether a process holds parts of the parameters only, so that none can draw an image by itself."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    return accelerator.distributed_type == DistributedType.FSDP or (plugin is not None and plugin.zero_stage == 3)


def announce_factors(accelerator: Any, models: Iterable[nn.Module]) -> None:
    """ZeRO-3 gathers what a layer owns before it runs; an adapter's factors lie in a dict in it, which is never run."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is None or plugin.zero_stage != 3:
        return
    from deepspeed.runtime.zero import register_external_parameter

    for model in models:
        for layer in model.modules():
            if isinstance(layer, BaseTunerLayer):
                for part in layer.children():
                    if isinstance(part, nn.ParameterDict):
                        for parameter in part.values():
                            register_external_parameter(layer, parameter)


def trained_state(accelerator: Any, model: nn.Module) -> dict[str, torch.Tensor]:
    """{name: whole tensor} of what is trained; every process has to call it, the main one gets it."""
    if accelerator.is_fsdp2:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        return get_model_state_dict(model, options=options)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        from deepspeed.runtime.zero import GatheredParameters

        named = {n: p for n, p in accelerator.unwrap_model(model).named_parameters() if p.requires_grad}
        with GatheredParameters(list(named.values()), enabled=hides_parameters(accelerator)):
            return {name: parameter.detach().cpu().clone() for name, parameter in named.items()}
    return accelerator.get_state_dict(model)


@contextlib.contextmanager
def without_the_base(accelerator: Any, saving: bool) -> Iterator[dict[str, Any]]:
    """The accelerator's `save_state` or `load_state` leaves the frozen model out; gives more arguments for it."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        yield {"exclude_frozen_parameters": True} if saving else {"load_module_strict": False}
    elif accelerator.is_fsdp2:
        nothing = {"save_fsdp_model": lambda *_, **__: None, "load_fsdp_model": lambda *_, **__: None}
        with mock.patch.multiple("accelerate.accelerator", **nothing):  # there is no argument for it
            yield {}
    else:
        yield {}


def spread_like(own: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Whole tensors, each as this process holds the one of its name in `own`."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    return {
        name: distribute_tensor(tensor, own[name].device_mesh, own[name].placements, src_data_rank=None)
        if isinstance(own[name], DTensor)
        else tensor
        for name, tensor in state.items()
    }


def whole(value: Any) -> Any:
    """A norm over parameters that are spread, as a number of all processes."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def all_finite(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether what this process holds of the parameters has neither NaN nor infinity."""
    parts = [p.to_local() if hasattr(p, "to_local") else p for p in parameters]
    return all(bool(part.isfinite().all()) for part in parts)

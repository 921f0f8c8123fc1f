# SPDX-License-Identifier: Apache-2.0
"""Every look into what torch, accelerate and diffusers keep private, in one place.

None of these names is promised. `tests/test_compat.py` has a test for each, which fails where a new version has moved
or renamed the thing: a wrong answer here would not raise, but take a wrong path through the ops. Those that a step
asks in every layer are torch's own functions under a public name, without a frame of ours around them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch._C._functorch import unwrap_if_dead as _unwrap_if_dead
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn.modules import module as _every

# -- torch: who looks at single ops ------------------------------------------------------------------------------------

# () -> bool: whether a transform of torch.func (grad, vmap, jvp, ...) is active.
functorch_active = torch._C._are_functorch_transforms_active
# () -> bool: whether autocast is on for any kind of device, in half the time that asking for one takes.
any_autocast = torch._C._is_any_autocast_enabled
# () -> int: how many dispatch modes (fake tensors, tracing, selective activation checkpointing, ...) are active.
dispatch_modes = torch._C._len_torch_dispatch_stack


def looks_inside() -> bool:
    """`sees_single_ops`, or a dispatch mode is active, which sees them too. Asked in every call: one frame."""
    return functorch_active() or forward_ad._current_level >= 0 or dispatch_modes() > 0 or torch._C._is_tracing()


def sees_calls() -> bool:
    """`looks_inside`, or torch.compile traces, or autocast is on: a call is more than torch's eager ops. One frame."""
    return (
        is_compiling()
        or any_autocast()
        or functorch_active()
        or forward_ad._current_level >= 0
        or dispatch_modes() > 0
        or torch._C._is_tracing()
    )


def apply_node(node: type[torch.autograd.Function], *arguments: Any) -> Any:
    """`node.apply(*arguments)` where no transform of torch.func is active, for a node without `setup_context`.

    What `apply` does besides takes as long as two small ops: it looks through the arguments for tensors that a
    transform has left behind. Here only x can be one: `unwrap_if_dead(x)`.
    """
    return super(torch.autograd.Function, node).apply(*arguments)  # type: ignore[misc]  # of the C base: no types


# (tensor) -> tensor: what a tensor that outlived its transform of torch.func holds; any other tensor as it is.
unwrap_if_dead = _unwrap_if_dead


def sees_single_ops() -> bool:
    """Whether a transform of torch.func, forward-mode differentiation or torch.jit.trace must see every torch op."""
    return functorch_active() or forward_ad._current_level >= 0 or torch.jit.is_tracing()


# -- torch: what hangs on a module -------------------------------------------------------------------------------------


def has_hooks(*modules: nn.Module) -> bool:
    """Whether calling one of them runs anything besides its class's `forward`, as by a hook of its own or for all."""
    if (
        _every._global_forward_hooks
        or _every._global_forward_pre_hooks
        or _every._global_backward_hooks
        or _every._global_backward_pre_hooks
    ):
        return True
    for module in modules:
        state = module.__dict__
        if (
            state["_forward_hooks"]
            or state["_forward_pre_hooks"]
            or state["_backward_hooks"]
            or state["_backward_pre_hooks"]
            or "forward" in state
        ):
            return True
    return False


# -- accelerate and diffusers ------------------------------------------------------------------------------------------

# The attribute by which diffusers and transformers remember that a model has adapters.
ADAPTERS_LOADED = "_hf_peft_config_loaded"
# The attribute in which diffusers' `enable_lora_hotswap` keeps its arguments until the first adapter is loaded.
HOTSWAP_SETTINGS = "_prepare_lora_hotswap_kwargs"


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate or diffusers has put a hook on the module that brings its tensors when it is called."""
    state = module.__dict__
    return "_hf_hook" in state or "_diffusers_hook" in state


def offloading_hooks(module: nn.Module) -> list[Any]:
    """accelerate's hook and diffusers' hooks of a module, each with `pre_forward(module)` and `post_forward(...)`."""
    state = module.__dict__
    hooks = [state["_hf_hook"]] if "_hf_hook" in state else []
    return hooks + (list(state["_diffusers_hook"].hooks.values()) if "_diffusers_hook" in state else [])


def is_left_out_by_fusing(attention: nn.Module, projection: str) -> bool:
    """Whether a projection is not called any longer once diffusers' `fuse_qkv_projections` has made one of several."""
    kept = projection == "to_q" and getattr(attention, "is_cross_attention", False)
    return not kept and projection in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")


def has_fused_projections(attention: nn.Module) -> bool:
    """Whether diffusers' `fuse_qkv_projections` is in force. Its older attention class is told by the processor alone,
    as unfusing leaves its flag up."""
    fused = getattr(attention, "fused_projections", False) is True
    return fused and (hasattr(attention, "unfuse_projections") or "Fused" in type(attention.processor).__name__)

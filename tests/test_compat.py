# SPDX-License-Identifier: Apache-2.0
"""Each private thing of torch, accelerate and diffusers that the library looks at is still what it was."""

import pytest
import tiny
import torch
from adapted import adapted_mlp
from torch import nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from peft_krona import _compat


def test_functorch_active():
    seen = []

    def f(x):
        seen.append(_compat.functorch_active())
        return x.sum()

    x = torch.ones(2)
    f(x)
    torch.func.grad(f)(x)
    torch.func.vmap(f)(x[None])
    torch.func.jvp(f, (x,), (x,))
    assert seen == [False, True, True, True]


def test_dispatch_modes():
    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    assert _compat.dispatch_modes() == 0
    with Mode():
        assert _compat.dispatch_modes() == 1
        with FlopCounterMode(display=False):
            assert _compat.dispatch_modes() == 2
    with torch._subclasses.FakeTensorMode():
        assert _compat.dispatch_modes() == 1
    assert _compat.dispatch_modes() == 0


def test_forward_mode_is_seen():
    assert not _compat.sees_single_ops()
    with forward_ad.dual_level():
        assert _compat.sees_single_ops()
    assert not _compat.sees_single_ops()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torch_func_and_jit_trace_see_single_ops():
    seen = []

    def f(x):
        seen.append(_compat.sees_single_ops())
        return x.sum()

    x = torch.ones(2)
    f(x)
    torch.func.grad(f)(x)
    torch.jit.trace(f, (x,), check_trace=False)
    assert seen == [False, True, True]


@pytest.mark.parametrize(
    "register",
    [
        nn.modules.module.register_module_forward_hook,
        nn.modules.module.register_module_forward_pre_hook,
        nn.modules.module.register_module_full_backward_hook,
        nn.modules.module.register_module_full_backward_pre_hook,
    ],
    ids=lambda register: register.__name__,
)
def test_hooks_for_all_modules(register):
    module = nn.Linear(2, 2)
    assert not _compat.has_hooks(module)
    handle = register(lambda *_: None)
    try:
        assert _compat.has_hooks(module)
    finally:
        handle.remove()
    assert not _compat.has_hooks(module)


@pytest.mark.parametrize(
    "name",
    ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook",
     "register_full_backward_pre_hook"],
)  # fmt: skip
def test_has_hooks(name):
    module = nn.Linear(2, 2)
    assert not _compat.has_hooks(module)
    handle = getattr(module, name)(lambda *_: None)
    assert _compat.has_hooks(module)
    handle.remove()
    assert not _compat.has_hooks(module)


def test_no_other_kind_of_module_hook_came_up():
    """A new one would be passed by, where base and adapter are one node."""
    known = {"_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"}
    known |= {f"_forward_{kind}" for kind in ("hooks_with_kwargs", "hooks_always_called", "pre_hooks_with_kwargs")}
    known |= {"_is_full_backward_hook"}  # says which kind the ones of backward are
    about_state = {name for name in vars(nn.Module()) if "state_dict" in name}
    assert {name for name in vars(nn.Module()) if "hook" in name} - about_state <= known


def test_a_replaced_forward_counts_as_a_hook():
    module = nn.Linear(2, 2)
    module.forward = lambda x: x
    assert _compat.has_hooks(module)


def test_hooks_of_accelerate():
    hooks = pytest.importorskip("accelerate.hooks")

    module = nn.Linear(2, 2)
    assert not _compat.is_offloaded(module) and _compat.offloading_hooks(module) == []
    hook = hooks.ModelHook()
    hooks.add_hook_to_module(module, hook)
    assert _compat.is_offloaded(module) and _compat.has_hooks(module)
    assert _compat.offloading_hooks(module) == [hook]
    assert callable(hook.pre_forward) and callable(hook.post_forward)
    hooks.remove_hook_from_module(module)
    assert not _compat.is_offloaded(module)


def test_hooks_of_diffusers():
    hooks = pytest.importorskip("diffusers.hooks")

    module, hook = nn.Linear(2, 2), hooks.ModelHook()
    registry = hooks.HookRegistry.check_if_exists_or_initialize(module)
    registry.register_hook(hook, "ours")
    assert _compat.is_offloaded(module) and _compat.has_hooks(module)
    assert _compat.offloading_hooks(module) == [hook]
    assert callable(hook.pre_forward) and callable(hook.post_forward)


def test_the_flag_of_a_model_with_adapters():
    """diffusers and transformers both set and read it in their mixins."""
    mixins = [
        pytest.importorskip("diffusers.loaders.peft").PeftAdapterMixin,
        pytest.importorskip("transformers.integrations.peft").PeftAdapterMixin,
    ]
    for mixin in mixins:
        assert getattr(mixin, _compat.ADAPTERS_LOADED) is False
    assert not hasattr(adapted_mlp(), _compat.ADAPTERS_LOADED)
    model = tiny.unet()
    assert getattr(model, _compat.HOTSWAP_SETTINGS) is None
    model.enable_lora_hotswap(target_rank=2)
    assert getattr(model, _compat.HOTSWAP_SETTINGS)["target_rank"] == 2

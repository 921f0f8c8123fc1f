# SPDX-License-Identifier: Apache-2.0
"""Whatever looks at, records or differentiates torch's single ops gets the same numbers as without it."""

import gc
from functools import partial

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from adapted import config
from peft import get_peft_model
from torch import nn
from torch.utils import checkpoint

from peft_krona import kron_linear
from peft_krona.errors import ShapeError

ATEN = torch.ops.aten


def small_model(**kwargs):
    """An adapted stack of Linears in float64, its input, and what gradients are taken of."""
    base = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 8)).double()
    model = get_peft_model(base, config(["0", "2", "4"], **kwargs))
    x = torch.randn(7, 16, dtype=torch.float64, requires_grad=True)
    return model, x, [x, *(p for p in model.parameters() if p.requires_grad)]


@pytest.mark.skipif(not hasattr(checkpoint, "CheckpointPolicy"), reason="selective checkpointing came with torch 2.5")
@pytest.mark.parametrize("fused", [True, False], ids=["one node", "two steps"])
@pytest.mark.parametrize(
    "kept",
    [[ATEN.mm.default, ATEN.addmm.default], lambda ctx, op, *args, **kwargs: checkpoint.CheckpointPolicy.MUST_SAVE],
    ids=["products", "everything"],
)
def test_selective_activation_checkpointing(kept, fused):
    """What it keeps must not be added to in place."""
    model, x, leaves = small_model()
    if not fused:  # a hook keeps the frozen layer and the product apart
        model.base_model.model[2].base_layer.register_forward_hook(lambda *_: None)
    want = torch.autograd.grad(model(x).square().sum(), leaves)
    context = partial(checkpoint.create_selective_checkpoint_contexts, kept)
    y = checkpoint.checkpoint(model, x, use_reentrant=False, context_fn=context)
    for got, expected in zip(torch.autograd.grad(y.square().sum(), leaves), want, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_forward_mode_differentiation(grad):
    model, x, _ = small_model()
    v = torch.randn_like(x)
    want = torch.func.jvp(model, (x.detach(),), (v,))[1]
    with torch.set_grad_enabled(grad), forward_ad.dual_level():
        got = forward_ad.unpack_dual(model(forward_ad.make_dual(x, v))).tangent
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_jit_trace(grad):
    model, x, _ = small_model()
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(model, (x.detach(),), check_trace=False)
        for tokens in (7, 3):
            x = torch.randn(tokens, 16, dtype=torch.float64)
            torch.testing.assert_close(traced(x), model(x))


@pytest.mark.parametrize("needs", ["x", "factors"])
@pytest.mark.parametrize("form", ["krona", "linear"])
def test_only_what_backward_needs_is_kept(needs, form):
    """A frozen adapter keeps no activation; without a gradient of x the frozen weight, here cast, is not kept."""
    layer = nn.Linear(64, 64) if form == "linear" else nn.Linear(64, 64, bias=False)
    model = get_peft_model(nn.Sequential(layer), config("0"))
    x = torch.randn(32, 64, requires_grad=needs == "x")
    if needs == "x":
        model.requires_grad_(False)
    kept = []
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        y = model(x)
    shapes = {tuple(t.shape) for t in kept}
    if needs == "x":
        assert (32, 64) not in shapes and (64, 64) in shapes
    else:
        assert (64, 64) not in shapes and (32, 64) in shapes
    y.sum().backward()


@pytest.mark.parametrize("needs", ["x", "factors", "both"])
def test_the_copy_that_autocast_makes_of_a_frozen_weight_lives_as_long_as_backward_needs_it(needs):
    """Not as an attribute of the node either, which saved_tensors_hooks would not see."""
    model = get_peft_model(nn.Sequential(nn.Linear(46, 34)), config("0"))
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("krona_" in name and needs != "x")
    x = torch.randn(3, 46, requires_grad=needs != "factors")

    def copies():
        gc.collect()
        tensors = [t for t in gc.get_objects() if type(t) is torch.Tensor]
        return sum(t.dtype == torch.bfloat16 and t.shape[-2:] in ((34, 46), (46, 34)) for t in tensors)

    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        y = model(x)
    assert copies() == (needs != "factors")
    y.sum().backward()
    del y
    assert copies() == 0


@pytest.mark.parametrize(
    "make,kind",
    [
        (lambda: torch.nested.nested_tensor([torch.randn(2, 6), torch.randn(3, 6)], layout=torch.jagged), "nested"),
        (lambda: torch.randn(2, 6).to_sparse(), "sparse_coo"),
    ],
    ids=["nested", "sparse"],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_tensors_without_strides_are_refused(make, kind):
    with pytest.raises(ShapeError, match=f"Expected x as an ordinary .strided. tensor, got a {kind} one. Pad it, or"):
        kron_linear(make(), torch.randn(1, 4, 3), torch.randn(1, 2, 2))


def test_hooks_for_every_module_see_the_frozen_layer():
    model, x, _ = small_model()
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    try:
        model(x)
    finally:
        handle.remove()
    assert seen.count(nn.Linear) == 3

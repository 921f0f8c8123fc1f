# SPDX-License-Identifier: Apache-2.0
"""The nearest Kronecker sum: exact where there is one, elsewhere as good as an SVD, fast enough for real layers."""

import time

import pytest
import torch
from convert_fixtures import relative, tiny_unet
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding import EPS, STORED_IN_A_MODEL

from peft_krona.convert import LayerUpdate, from_difference, nearest_kronecker
from peft_krona.errors import FactorError, FormatError
from peft_krona.ops.reference import delta_weight_loop

side = st.integers(1, 5)


@settings(max_examples=80, deadline=None)
@given(
    sizes=st.tuples(side, side, side, side),
    r=st.integers(1, 3),
    kernel=st.sampled_from([(), (3, 3), (1, 1)]),
    layout=st.sampled_from(["kron", "diffusekrona"]),
    seed=st.integers(0, 2**31),
)
def test_a_kronecker_sum_is_found_exactly(sizes, r, kernel, layout, seed):
    generator = torch.Generator().manual_seed(seed)
    a_out, a_in, b_out, b_in = sizes
    dW = delta_weight_loop(
        torch.randn(r, a_out, a_in, generator=generator),
        torch.randn(r, b_out, b_in, *kernel, generator=generator),
        1.0,
        layout,
    )
    A, B, error = nearest_kronecker(dW, a_out, a_in, r=r, layout=layout)
    assert A.shape[1:] == (a_out, a_in) and B.shape[1:] == (b_out, b_in, *kernel) and A.shape[0] <= r
    assert error <= EPS
    assert relative(delta_weight_loop(A, B, 1.0, layout), dW) <= EPS


@pytest.mark.parametrize(("a_out", "a_in"), [(4, 2), (2, 8), (24, 1), (1, 1), (24, 32)])
@pytest.mark.parametrize("r", [1, 3])
def test_it_is_the_best_that_an_svd_of_the_rearranged_matrix_gives(a_out, a_in, r):
    dW = torch.randn(24, 32, dtype=torch.float64)
    A, B, error = nearest_kronecker(dW, a_out, a_in, r=r)
    rearranged = torch.stack([block.flatten() for row in dW.chunk(a_out, 0) for block in row.chunk(a_in, 1)])
    values = torch.linalg.svdvals(rearranged)
    best = (values[r:].square().sum() / values.square().sum()).sqrt().item()
    assert abs(error - best) <= EPS
    assert abs(relative(delta_weight_loop(A, B), dW) - error) <= EPS


@pytest.mark.parametrize("factors", [(64, 4), (32, 32), (64, 64)])
def test_a_layer_of_2048_takes_seconds(factors):
    dW = torch.randn(2048, 2048)
    start = time.process_time()
    A, _, error = nearest_kronecker(dW, *factors, r=2)
    assert time.process_time() - start < 20  # of one core
    assert A.shape == (2, *factors) and 0 < error < 1


@pytest.mark.parametrize(("a_out", "a_in", "r"), [(5, 2, 1), (4, 3, 1), (4, 2, 0), (0, 1, 1)])
def test_factors_that_do_not_divide_are_refused(a_out, a_in, r):
    with pytest.raises(FactorError, match="do not fit a weight of"):
        nearest_kronecker(torch.ones(24, 32), a_out, a_in, r=r)


def test_zero():
    A, B, error = nearest_kronecker(torch.zeros(6, 4), 2, 2)
    assert error == 0 and torch.isfinite(A).all() and not torch.kron(A[0], B[0]).any()


@pytest.mark.parametrize("layout", ["kron", "diffusekrona"])
def test_two_checkpoints_give_the_adapter_between_them(layout):
    base = tiny_unet().state_dict()
    tuned = {key: tensor.clone() for key, tensor in base.items()}
    planted = {
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": ((1, 8, 4), (1, 4, 8)),
        "down_blocks.0.resnets.0.conv1": ((1, 8, 4), (1, 4, 8, 3, 3)),
    }
    for module, (a, b) in planted.items():
        layer = LayerUpdate("unet", module, torch.randn(a), torch.randn(b) * 0.1, 1.0, layout)
        tuned[f"{module}.weight"] += layer.delta_weight(torch.float32)
    adapter, errors = from_difference(base, tuned, 8, 4, layout=layout)
    assert {layer.module for layer in adapter} == planted.keys()
    for layer in adapter:
        assert errors[layer.name] <= STORED_IN_A_MODEL
        wanted = tuned[f"{layer.module}.weight"].double() - base[f"{layer.module}.weight"].double()
        assert relative(layer.delta_weight(), wanted) <= STORED_IN_A_MODEL
    other = {module: (2, 2) for module in planted}
    assert {layer.factors for layer in from_difference(base, tuned, 8, 4, modules=other)[0]} == {(2, 2)}


def test_checkpoints_that_do_not_fit_or_do_not_differ():
    base = {"x.weight": torch.ones(4, 4)}
    with pytest.raises(FormatError, match="do not differ"):
        from_difference(base, base, 2, 2)
    with pytest.raises(FormatError, match=r"x\.weight: .* \(4, 4\), \(4, 5\)"):
        from_difference(base, {"x.weight": torch.ones(4, 5)}, 2, 2)

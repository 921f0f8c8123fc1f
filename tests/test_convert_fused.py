# SPDX-License-Identifier: Apache-2.0
"""Fused projections: split and fused exactly in float64, and as the files of every transformer family have them."""

import pytest
import torch
from convert_fixtures import relative
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_krona.convert.formats import Factors
from peft_krona.convert.fused import fuse, split, swap_halves
from peft_krona.errors import ShapeError
from peft_krona.ops.reference import delta_weight_loop

side = st.integers(1, 6)


def dense(update):
    return update if isinstance(update, torch.Tensor) else delta_weight_loop(update.A, update.B, *update[2:])


def factors(a_out, a_in, b_out, b_in, r=1, layout="kron", scale=0.5, seed=0, kernel=()):
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(r, a_out, a_in, generator=generator, dtype=torch.float64)
    B = torch.randn(r, b_out, b_in, *kernel, generator=generator, dtype=torch.float64)
    return Factors(A, B, scale, layout)


def named(sizes):
    return {f"p{i}": size for i, size in enumerate(sizes)}


@settings(max_examples=150, deadline=None)
@given(
    a_out=side, a_in=side, b_out=side, b_in=side, r=st.integers(1, 3), layout=st.sampled_from(["kron", "diffusekrona"]),
    cuts=st.lists(st.integers(0, 36), max_size=4), seed=st.integers(0, 99),
)  # fmt: skip
def test_split_and_fuse_back(a_out, a_in, b_out, b_in, r, layout, cuts, seed):
    update = factors(a_out, a_in, b_out, b_in, r, layout, seed=seed)
    rows = a_out * b_out
    ends = [*sorted({min(cut, rows) for cut in cuts} - {0, rows}), rows]
    sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    bias = torch.randn(rows, dtype=torch.float64)
    parts = {"x": named(sizes), "x.bias": {f"{p}.bias": size for p, size in named(sizes).items()}}
    apart = split({"x": update, "x.bias": bias, "other": update}, parts)
    assert apart["other"] is update
    start = 0
    for name, size in named(sizes).items():
        assert relative(dense(apart[name]), dense(update)[start : start + size]) < 1e-15
        assert torch.equal(apart[f"{name}.bias"], bias[start : start + size])
        assert apart[name].layout == layout
        slow_fast = (b_out, a_out) if layout == "diffusekrona" else (a_out, b_out)
        assert apart[name].A.shape[0] <= r * slow_fast[1]
        start += size
    together = fuse({name: apart[name] for name in apart if name != "other"}, parts)
    assert relative(dense(together["x"]), dense(update)) < 1e-15 and torch.equal(together["x.bias"], bias)


@pytest.mark.parametrize("layout", ["kron", "diffusekrona"])
@pytest.mark.parametrize(
    ("a_out", "b_out", "n", "terms"),
    [(6, 5, 3, 1), (4, 6, 3, 3), (12, 4, 2, 1), (1, 9, 3, 1), (2, 9, 3, 2), (7, 4, 7, 1)],
)
def test_equal_parts_take_one_term_where_n_divides_the_slow_factor(a_out, b_out, n, terms, layout):
    """n divides a_out: slices of A. Else at most n terms, as n (a prime here) divides b_out then."""
    sizes = (a_out, b_out) if layout == "kron" else (b_out, a_out)
    update = factors(sizes[0], 2, sizes[1], 3, layout=layout)
    apart = split({"x": update}, {"x": named([a_out * b_out // n] * n)})
    assert max(part.A.shape[0] for part in apart.values()) == terms


@pytest.mark.parametrize("layout", ["kron", "diffusekrona"])
def test_q_k_and_v_of_one_factor_shape_fuse_into_three_terms(layout):
    updates = {name: factors(4, 2, 3, 5, layout=layout, seed=i, scale=i + 1.0) for i, name in enumerate("qkv")}
    fused = fuse(updates, {"qkv": dict.fromkeys("qkv", 12)})["qkv"]
    assert fused.A.shape[0] == 3
    assert relative(dense(fused), torch.cat([dense(update) for update in updates.values()])) < 1e-15


@pytest.mark.parametrize("layout", ["kron", "diffusekrona"])
def test_parts_of_different_factors_and_a_part_without_an_update(layout):
    updates = {"q": factors(4, 2, 3, 6, 2, layout), "v": factors(6, 3, 2, 4, 1, layout, seed=1, scale=3.0)}
    fused = fuse(updates, {"qkv": dict.fromkeys("qkv", 12)})["qkv"]
    wanted = torch.cat([dense(updates["q"]), torch.zeros(12, 12, dtype=torch.float64), dense(updates["v"])])
    assert relative(dense(fused), wanted) < 1e-15


def test_unequal_parts_of_grouped_query_attention_and_of_an_mlp():
    update = factors(8, 3, 14, 2, r=2)  # 112 rows: q 64, k 16, v 16, and 16 more
    sizes = {"q": 64, "k": 16, "v": 16, "mlp": 16}
    apart = split({"x": update}, {"x": sizes})
    assert relative(torch.cat([dense(part) for part in apart.values()]), dense(update)) < 1e-15


@pytest.mark.parametrize("layout", ["kron", "diffusekrona"])
@pytest.mark.parametrize(("a_out", "b_out"), [(4, 3), (3, 4), (2, 2)])
def test_halves_change_places(a_out, b_out, layout):
    update = factors(a_out, 2, b_out, 3, 2, layout)
    wanted = torch.cat(dense(update).chunk(2)[::-1])
    assert relative(dense(swap_halves(update)), wanted) < 1e-15
    assert torch.equal(swap_halves(torch.arange(6)), torch.tensor([3, 4, 5, 0, 1, 2]))


def test_convolutions_keep_their_kernel():
    update = factors(4, 2, 3, 2, kernel=(3, 3))
    apart = split({"x": update}, {"x": {"a": 5, "b": 7}})
    assert apart["a"].B.shape[3:] == (3, 3)
    assert relative(torch.cat([dense(part) for part in apart.values()]), dense(update)) < 1e-15
    fused = fuse(apart, {"x": {"a": 5, "b": 7}})["x"]
    assert relative(dense(fused), dense(update)) < 1e-15


def test_zero_updates_keep_a_term():
    update = factors(2, 2, 3, 2)._replace(A=torch.zeros(1, 2, 2, dtype=torch.float64))
    apart = split({"x": update}, {"x": {"a": 3, "b": 3}})
    assert all(part.A.shape[0] == 1 and not dense(part).any() for part in apart.values())


def test_errors_name_the_layer():
    update = factors(2, 2, 3, 2)
    with pytest.raises(ShapeError, match=r"x: its 6 rows are not those of its parts, \{'a': 3, 'b': 4\}"):
        split({"x": update}, {"x": {"a": 3, "b": 4}})
    with pytest.raises(ShapeError, match="a has 6 rows; expected 5 in x"):
        fuse({"a": update}, {"x": {"a": 5, "b": 5}})
    with pytest.raises(ShapeError, match="x: the updates of a, b have different inputs, kernels or layouts"):
        fuse({"a": update, "b": factors(2, 2, 3, 3)}, {"x": {"a": 6, "b": 6}})
    with pytest.raises(ShapeError, match="different inputs, kernels or layouts"):
        fuse({"a": update, "b": factors(2, 2, 3, 2, layout="diffusekrona")}, {"x": {"a": 6, "b": 6}})
    with pytest.raises(ShapeError, match="A layer of 9 rows has no two halves"):
        swap_halves(factors(3, 1, 3, 1))

# SPDX-License-Identifier: Apache-2.0
"""Fused projections, exactly: the rows of one Kronecker sum as several, and several as one.

Some models keep q, k and v (or q, k, v and the MLP's first half) as one weight, others as several. A Kronecker update
of the one is a Kronecker update of the other:

- Rows [s, s + n) of kron(A, B): where b_out divides s and n, those of A. Otherwise B is cut into q = b_out / g blocks
  of g = gcd(b_out, s, n) rows, kron(A, B) = sum_j kron(A (x) e_j, B_j), whose left factors are cut instead. A term
  becomes at most q terms; those without rows in the range fall away.
- Updates one below the other: factors are brought to common sizes in the same way, and every left factor gets zero
  rows above and below it. The terms add up.

In the layout "diffusekrona", where A's index runs fastest over the rows, A and B change places.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import gcd
from typing import TypeAlias, overload

import torch

from ..errors import ShapeError
from .formats import Factors

Update: TypeAlias = Factors | torch.Tensor  # a layer's update, or a vector with an entry for every row (that of a bias)


@overload
def split(updates: Mapping[str, Factors], parts: Mapping[str, Mapping[str, int]]) -> dict[str, Factors]: ...
@overload
def split(updates: Mapping[str, Update], parts: Mapping[str, Mapping[str, int]]) -> dict[str, Update]: ...
def split(updates: Mapping[str, Update], parts: Mapping[str, Mapping[str, int]]) -> Mapping[str, Update]:
    """Updates of fused layers as updates of their parts.

    Args:
        updates: {layer: update}. parts: {fused layer: {part: rows}}, from top to bottom. Layers that are not in it
            stay as they are.

    Returns:
        {layer: update}, factors of the parts of the same dtype.

    Raises:
        ShapeError: names the layer whose rows are not the sum of its parts'.

    >>> q_k = Factors(torch.ones(1, 2, 3), torch.ones(1, 5, 4))  # (10, 12): 5 rows of q, 5 of k
    >>> {name: tuple(update.A.shape) for name, update in split({"qk": q_k}, {"qk": {"q": 5, "k": 5}}).items()}
    {'q': (1, 1, 3), 'k': (1, 1, 3)}
    """
    result: dict[str, Update] = {}
    for name, update in updates.items():
        if name not in parts:
            result[name] = update
            continue
        rows = _rows(update)
        if sum(parts[name].values()) != rows:
            raise ShapeError(f"{name}: its {rows} rows are not those of its parts, {dict(parts[name])}.")
        start = 0
        for part, size in parts[name].items():
            result[part] = (
                update[start : start + size] if isinstance(update, torch.Tensor) else _cut(update, start, size)
            )
            start += size
    return result


def fuse(updates: Mapping[str, Update], parts: Mapping[str, Mapping[str, int]]) -> dict[str, Update]:
    """Updates of parts as updates of the fused layers: the inverse of `split`.

    A part that has no update is taken for zero. Scales are folded into A; layouts have to agree.

    Args:
        updates: {layer: update}. parts: {fused layer: {part: rows}}, from top to bottom.

    Raises:
        ShapeError: names the part whose rows are not as many as said, or that does not go with the others.
    """
    of_fused = {part: fused for fused, members in parts.items() for part in members}
    result: dict[str, Update] = {}
    for name, update in updates.items():
        if name not in of_fused:
            result[name] = update
        elif of_fused[name] not in result:
            members = parts[of_fused[name]]
            present = {part: updates[part] for part in members if part in updates}
            result[of_fused[name]] = _stack(of_fused[name], present, members)
    return result


@overload
def swap_halves(update: Factors) -> Factors: ...
@overload
def swap_halves(update: torch.Tensor) -> torch.Tensor: ...
def swap_halves(update: Update) -> Update:
    """The update of a layer whose two halves of rows stand the other way round.

    Raises:
        ShapeError: if the rows are not even in number.
    """
    rows = _rows(update)
    if rows % 2:
        raise ShapeError(f"A layer of {rows} rows has no two halves.")
    half = rows // 2
    if isinstance(update, torch.Tensor):
        return torch.cat([update[half:], update[:half]])
    halves = split({"x": update}, {"x": {"first": half, "second": half}})
    return fuse({"first": halves["second"], "second": halves["first"]}, {"x": {"first": half, "second": half}})["x"]


def _rows(update: Update) -> int:
    return update.shape[0] if isinstance(update, torch.Tensor) else update.A.shape[1] * update.B.shape[1]


def _swapped(update: Factors) -> Factors:
    """The factors with the one whose index runs slowest over the rows first, called A."""
    return update if update.layout == "kron" else update._replace(A=update.B, B=update.A)


def _cut(update: Factors, start: int, size: int) -> Factors:
    """Rows [start, start + size)."""
    slow, fast = _swapped(update)[:2]
    block = fast.shape[1]
    if start % block or size % block:
        slow, fast = _in_blocks(slow, fast, gcd(block, start, size))
        block = fast.shape[1]
    slow = slow[:, start // block : (start + size) // block]
    used = slow.flatten(1).any(dim=1)
    if not used.any():
        used[0] = True  # a zero update keeps one term
    cut = update._replace(A=slow[used].contiguous(), B=fast[used].contiguous())
    return _swapped(cut)


def _in_blocks(slow: torch.Tensor, fast: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same product with `block` rows in the fast factor, (r, a, *x) and (r, b, *y): r * b / block terms."""
    (r, a), (b, *y) = slow.shape[:2], fast.shape[1:]
    q = b // block
    expanded = slow.new_zeros(r, q, a, q, *slow.shape[2:])
    for j in range(q):
        expanded[:, j, :, j] = slow
    return expanded.reshape(r * q, a * q, *slow.shape[2:]), fast.reshape(r * q, block, *y)


def _in_columns(slow: torch.Tensor, fast: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same product with `width` columns in the fast factor, B: A (r, *, k), B (r, *, v, *kernel)."""
    slow, fast = _in_blocks(slow.transpose(1, 2), fast.transpose(1, 2), width)
    return slow.transpose(1, 2), fast.transpose(1, 2)


def _stack(name: str, present: Mapping[str, Update], members: Mapping[str, int]) -> Update:
    for part, update in present.items():
        if _rows(update) != members[part]:
            raise ShapeError(f"{part} has {_rows(update)} rows; expected {members[part]} in {name}.")
    vectors = {part: update for part, update in present.items() if isinstance(update, torch.Tensor)}
    if len(vectors) == len(present):
        like = next(iter(vectors.values()))
        return torch.cat([vectors.get(part, like.new_zeros(size)) for part, size in members.items()])
    factors = {part: update for part, update in present.items() if isinstance(update, Factors)}
    first = next(iter(factors.values()))
    width = {update.A.shape[2] * update.B.shape[2] for update in factors.values()}
    kinds = {(update.layout, *update.B.shape[3:]) for update in factors.values()}
    if len(factors) != len(present) or len(width) > 1 or len(kinds) > 1:
        raise ShapeError(f"{name}: the updates of {', '.join(present)} have different inputs, kernels or layouts.")
    columns = gcd(*(update.B.shape[2] for update in factors.values()))
    narrow = {
        part: Factors(*_in_columns(update.A * update.scale, update.B, columns), 1.0, update.layout)
        if update.B.shape[2] != columns
        else update._replace(A=update.A * update.scale, scale=1.0)
        for part, update in factors.items()
    }
    split_ = {part: _swapped(update)[:2] for part, update in narrow.items()}
    block = gcd(*(fast.shape[1] for _, fast in split_.values()), *members.values())
    slows, fasts, start = [], [], 0
    total = sum(members.values()) // block
    for part, size in members.items():
        if part in split_:
            slow, fast = split_[part]
            if fast.shape[1] != block:
                slow, fast = _in_blocks(slow, fast, block)
            whole = slow.new_zeros(slow.shape[0], total, *slow.shape[2:])
            whole[:, start // block : (start + size) // block] = slow
            slows.append(whole)
            fasts.append(fast)
        start += size
    return _swapped(first._replace(A=torch.cat(slows), B=torch.cat(fasts), scale=1.0))

# SPDX-License-Identifier: Apache-2.0
"""Rules that were stated before anything ran: which rates get no more runs, and which rate a method is compared at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from .plan import METHODS, REPORTED, STATED, Run, rates_of

QUALITY = "both_right"  # share of pictures with the right subject on the right background
FIRST = REPORTED[:3]  # the subjects that the rule looks at, of seed 0
FAR = (0.5, 0.35, 0.2)  # below the method's best share: hopeless, after one, two and three of them
RULE = (
    f"Of seed 0, after the first subject ({FIRST[0]}), a learning rate whose share of pictures with the right subject "
    f"on the right background is more than {FAR[0]:g} below the method's best rate's, and that is not next to that "
    f"rate, gets no more runs; after the second ({FIRST[1]}) the same with {FAR[1]:g} and after the third ({FIRST[2]}) "
    f"with {FAR[2]:g}, on all of them together."
)
TUNING = (
    "Experiments other than stability run each method at one rate: the one of its seven with the highest share over "
    "seed 0 of stability, of equal ones the lowest; where that has not all been run, the middle one, which was stated "
    "beforehand."
)


def share(records: Mapping[str, dict[str, Any]], runs: list[Run], base: str) -> float | None:
    """The mean quality of some runs; None unless all are done."""
    keys = [run.key(base) for run in runs]
    return float(np.mean([records[k][QUALITY] for k in keys])) if all(k in records for k in keys) else None


class Dropped(NamedTuple):
    """What the rule has said so far: of how many subjects, and which rates get no more runs."""

    subjects: int
    rates: tuple[float, ...]


def hopeless(shares: Mapping[int, float], far: float) -> list[int]:
    """Places to be dropped, of those that have a share; the best one's neighbours stay."""
    best = max(shares, key=lambda place: shares[place])
    return [place for place, x in shares.items() if x < shares[best] - far and abs(place - best) > 1]


def dropped_rates(records: Mapping[str, dict[str, Any]], method: str, base: str) -> Dropped:
    """What the rule says of a method, as far as the subjects that it looks at have been run."""
    rates = rates_of(method)
    left = list(range(len(rates)))
    for number, far in enumerate(FAR, 1):
        shares = {
            place: share(records, [Run(method, METHODS[method], rates[place], 0, s) for s in FIRST[:number]], base)
            for place in left
        }
        known = {place: x for place, x in shares.items() if x is not None}
        if len(known) < len(left):
            return Dropped(number - 1, tuple(lr for i, lr in enumerate(rates) if i not in left))
        left = [place for place in left if place not in hopeless(known, far)]
    return Dropped(len(FAR), tuple(lr for i, lr in enumerate(rates) if i not in left))


def wanted(run: Run) -> int:
    """Of how many subjects the rule has to have spoken before this run begins."""
    return FIRST.index(run.subject) if run.seed == 0 and run.subject in FIRST else len(FIRST)


def counts(record: Mapping[str, Any]) -> bool:
    """Whether the rule looks at this record."""
    return record["seed"] == 0 and record["subject"] in FIRST


def best_rates(records: Mapping[str, dict[str, Any]], base: str) -> tuple[dict[str, float], dict[str, str]]:
    """Each method's rate for the other experiments, and where it is from."""
    rates, sources = dict(STATED), dict.fromkeys(METHODS, "stated beforehand")
    for method, flags in METHODS.items():
        found = dropped_rates(records, method, base)
        if found.subjects < len(FIRST):
            continue
        kept = [lr for lr in rates_of(method) if lr not in found.rates]
        shares = [share(records, [Run(method, flags, lr, 0, s) for s in REPORTED], base) for lr in kept]
        if None not in shares:
            rates[method] = kept[int(np.argmax([x for x in shares if x is not None]))]
            sources[method] = "seed 0 of stability"
    return rates, sources

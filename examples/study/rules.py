# SPDX-License-Identifier: Apache-2.0
"""Rules that were stated before anything ran: which rates get no more runs, and which rate a method is compared at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .plan import METHODS, REPORTED, STATED, Run, rates_of

QUALITY = "both_right"  # share of pictures with the right subject on the right background
FIRST = REPORTED[:3]  # the subjects that the rule looks at, of seed 0
FAR = 0.2  # below the method's best share: hopeless
RULE = (
    f"After seed 0 on the first {len(FIRST)} subjects ({', '.join(FIRST)}), a learning rate whose share of pictures "
    f"with the right subject on the right background is more than {FAR:g} below the method's best rate's, and that is "
    "not next to that rate, gets no more runs."
)
TUNING = (
    "Experiments other than stability run each method at one rate: the one of its seven with the highest share, each "
    "share averaged with its neighbours', over seed 0 of stability; where that has not all been run, the middle one, "
    "which was stated beforehand."
)


def share(records: Mapping[str, dict[str, Any]], runs: list[Run], base: str) -> float | None:
    """The mean quality of some runs; None unless all are done."""
    keys = [run.key(base) for run in runs]
    return float(np.mean([records[k][QUALITY] for k in keys])) if all(k in records for k in keys) else None


def first_shares(records: Mapping[str, dict[str, Any]], method: str, base: str) -> list[float] | None:
    """What the rule looks at, rate by rate; None before all of it has been run."""
    found = [
        share(records, [Run(method, METHODS[method], lr, 0, subject) for subject in FIRST], base)
        for lr in rates_of(method)
    ]
    return None if None in found else [x for x in found if x is not None]


def dropped(shares: list[float]) -> list[int]:
    """Places of the rates that get no more runs."""
    best = int(np.argmax(shares))
    return [i for i, x in enumerate(shares) if x < shares[best] - FAR and abs(i - best) > 1]


def dropped_rates(records: Mapping[str, dict[str, Any]], method: str, base: str) -> tuple[float, ...] | None:
    """None: it can't be told yet."""
    shares = first_shares(records, method, base)
    return None if shares is None else tuple(rates_of(method)[i] for i in dropped(shares))


def is_first(run: Run) -> bool:
    """Whether the rule looks at this run."""
    return run.seed == 0 and run.subject in FIRST


def counts(record: Mapping[str, Any]) -> bool:
    """The same, asked of a record."""
    return record["seed"] == 0 and record["subject"] in FIRST


def best_rates(records: Mapping[str, dict[str, Any]], base: str) -> tuple[dict[str, float], dict[str, str]]:
    """Each method's rate for the other experiments, and where it is from."""
    rates, sources = dict(STATED), dict.fromkeys(METHODS, "stated beforehand")
    for method, flags in METHODS.items():
        hopeless = dropped_rates(records, method, base)
        if hopeless is None:
            continue
        shares = [
            share(records, [Run(method, flags, lr, 0, s) for s in REPORTED], base)
            for lr in rates_of(method)
            if lr not in hopeless
        ]
        kept = [lr for lr in rates_of(method) if lr not in hopeless]
        if None not in shares:
            rates[method] = kept[smoothed_best([x for x in shares if x is not None])]
            sources[method] = "seed 0 of stability"
    return rates, sources


def smoothed_best(shares: list[float]) -> int:
    """The place of the best of neighbours' averages: one lucky rate does not win."""
    smooth = [float(np.mean(shares[max(0, i - 1) : i + 2])) for i in range(len(shares))]
    return int(np.argmax(smooth))

# SPDX-License-Identifier: Apache-2.0
"""All numbers of a study as plain JSON; tables and plots are made of it and of nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

import numpy as np

from examples.measure.intervals import Interval, interval

from . import claims, rules
from .plan import CHOOSING, METHODS, REPORTED, Run
from .statistics import (
    WITHIN,
    Cell,
    Curve,
    Values,
    balanced,
    by_subject,
    cells,
    left_out,
    percentiles,
    resampled,
    widths,
)

SHARES = ("subject_right", "background_right", "both_right", "long_right")  # from 0 to 1
MEASURES = (
    "both_right", "subject_right", "background_right", "similarity", "own_similarity", "alignment", "long_right",
    "drift", "update_norm",
)  # fmt: skip
COSTS = (
    "seconds_training", "seconds_update", "activation_bytes", "file_bytes", "seconds_unmerged", "seconds_merged",
    "seconds_base", "seconds_run",
)  # fmt: skip
OWN = "krona 64,4"  # what the others are compared with
# how `OWN` is called in the experiments that run each method at one rate
KINDS = {"decay": ", decay 1", "factors": "", "parameters": "", "layers": ", all layers", "one_image": ", 1 image"}
ENOUGH = {"subject_right": 0.8, "background_right": 0.9}  # what a subject has to reach with the demo's settings
Records = Mapping[str, dict[str, Any]]


def problem(record: Mapping[str, Any]) -> str | None:
    """Which field makes a record one that cannot be counted; None if none does."""
    said = str(record.get("key")).split("; ")
    for name in ("learning_rate", "seed", "subject"):
        if f"{name}={record.get(name)}" not in said:
            return f"{name}: {record.get(name)!r} is not that of its key"
    for name in (*SHARES, "seconds_run") if record.get("diverged") else (*MEASURES, *COSTS, "parameters"):
        value = record.get(name)
        if type(value) not in (int, float) or not isfinite(value) or (name in SHARES and not 0 <= value <= 1):
            return f"{name}: {value!r}"
    return None if isinstance(record.get("versions"), dict) else f"versions: {record.get('versions')!r}"


def plain(found: Interval) -> dict[str, Any]:
    """Six digits and no sum's rounding error: the rest is noise, and files stay readable."""

    def rounded(value: float) -> float:
        return float(f"{value:.6g}") if abs(value) > 1e-12 else 0.0

    return {k: rounded(v) if isinstance(v, float) else v for k, v in found._asdict().items()}


def mean(values: Values) -> dict[str, Any] | None:
    """None below two subjects, of which no interval can be made."""
    return plain(interval({s: [v] for s, v in values.items()})) if len(values) > 1 else None


def difference(one: Values, other: Values) -> dict[str, Any] | None:
    """`one` minus `other` on the subjects that both have."""
    return mean({s: one[s] - other[s] for s in one.keys() & other.keys()})


def ratio(one: Values, other: Values) -> dict[str, Any] | None:
    return mean({s: one[s] / other[s] for s in one.keys() & other.keys()})


def summarize(
    runs: Mapping[str, Sequence[Run]], records: Records, base: str, tuned: Mapping[str, Any]
) -> dict[str, Any]:
    """
    Args:
        runs: {experiment: what is planned}. tuned: as `schedule.frozen_rates` gives it.
    """
    done = {run.key(base) for some in runs.values() for run in some} & records.keys()
    whole: dict[str, Any] = {
        "base": base,
        "versions": [json.loads(v) for v in sorted({json.dumps(records[k]["versions"], sort_keys=True) for k in done})],
        "cpu_hours": round(sum(records[k]["seconds_run"] for k in done) / 3600, 3),
        "rule": rules.RULE,
        "tuning": rules.TUNING,
        "tuned": dict(tuned),
    }
    for name, some in runs.items():
        if name == "choosing":  # not evidence
            continue
        by_cell = cells(some, records, base)
        found = {
            "planned": len(some),
            "done": sum(run.key(base) in records for run in some),
            "rows": [
                row(cell, own, sum((r.method, r.learning_rate) == cell for r in some)) for cell, own in by_cell.items()
            ],
        }
        if name == "stability":
            found |= stability(
                by_cell, {m: rules.dropped_rates(records, m, base).rates for m, _ in by_cell if m in METHODS}
            )
            whole["cost"] = cost(by_cell)
        elif name == "default":
            found |= default([record for own in by_cell.values() for record in own])
        elif name in KINDS:
            found |= compared(by_cell, KINDS[name])
        whole[name] = found
    if factors := whole.get("factors"):
        factors["terms"] = two(cells(runs["factors"], records, base), "krona 64,4 r=2", "krona 64,16")
    if one_image := whole.get("one_image"):
        by_cell = cells(runs["one_image"], records, base)
        one_image["fewer"] = {m: two(by_cell, f"{m}, 1 image", f"{m}, 5 images") for m in METHODS}
    if layers := whole.get("layers"):
        by_cell = cells(runs["layers"], records, base)
        layers["feed_forward"] = two(by_cell, f"{OWN}, attention and feed-forward", f"{OWN}, attention")
    whole["claims"] = claims.decided(whole)
    return whole


def row(cell: Cell, own: Sequence[dict[str, Any]], planned: int) -> dict[str, Any]:
    """What a cell has, balanced or not."""
    pairs = {(r["subject"], r["seed"]) for r in own}
    return {
        "method": cell[0], "learning_rate": cell[1], "runs": len(own), "planned": planned,
        "subjects": len({s for s, _ in pairs}), "diverged": sum("diverged" in r for r in own),
        "parameters": only(own, "parameters"),
        "share": float(np.mean([r[rules.QUALITY] for r in own])) if own else None,
        "norm": mean_norm(own),
    } | {measure: mean(by_subject(own, pairs, measure)) for measure in MEASURES}  # fmt: skip


def only(own: Sequence[dict[str, Any]], field: str) -> Any:
    """What all records agree on that have it; None if none has."""
    return next((r[field] for r in own if field in r), None)


def mean_norm(own: Sequence[dict[str, Any]]) -> float | None:
    """Of the update; None if no run has one, as none was done or all diverged."""
    norms = [r["update_norm"] for r in own if "update_norm" in r]
    return float(np.mean(norms)) if norms else None


def default(own: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Each subject's shares over its seeds, those of all subjects, and how many subjects reach `ENOUGH`."""
    pairs = {(r["subject"], r["seed"]) for r in own}
    measures = {measure: by_subject(own, pairs, measure) for measure in (*ENOUGH, "similarity", "drift")}
    reached = [s for s in measures["subject_right"] if all(measures[m][s] >= least for m, least in ENOUGH.items())]
    return {
        "seeds": len({seed for _, seed in pairs}),
        "subjects": {
            s: {m: round(v[s], 4) if s in v else None for m, v in measures.items()} for s in measures["subject_right"]
        },
        "reached": reached,
        "reached_of_the_reported": [s for s in reached if s in REPORTED],
        "means": {
            kind: {m: mean({s: x for s, x in v.items() if s in some}) for m, v in measures.items()}
            for kind, some in {"all": (*CHOOSING, *REPORTED), "reported": REPORTED}.items()
        },
    }


def stability(by_cell: Mapping[Cell, list[dict[str, Any]]], dropped: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Curves, widths and comparisons at each method's best rate; `dropped`: rates that got no more runs."""
    kept = {cell: own for cell, own in by_cell.items() if cell[1] not in dropped.get(cell[0], ())}
    ran = {m: len({s for s, _ in balanced({c: own for c, own in kept.items() if c[0] == m})}) for m, _ in kept}
    # a method that has run on few subjects is left out: else these few would be all that any method is judged by
    # one of which every run diverged has no curve: its zeros are in the rows
    drew = {cell[0] for cell, own in kept.items() if mean_norm(own) is not None}
    methods = [m for m, subjects in ran.items() if 2 * subjects > max(ran.values()) and m in drew]
    kept = {cell: own for cell, own in kept.items() if cell[0] in methods}
    pairs = balanced(kept)
    subjects = {s for s, _ in pairs}
    found: dict[str, Any] = {
        "dropped": {method: list(rates) for method, rates in dropped.items()},
        "pairs": len(pairs), "subjects": sorted(subjects), "within": WITHIN,
    }  # fmt: skip
    if len(subjects) < 2:
        return found
    curves = {m: curve(m, by_cell, pairs, dropped.get(m, ())) for m in methods}
    found["widths"], found["wider"], found["rates"] = {}, {}, {}
    for axis in ("rates", "norms"):
        own = widths(curves, axis)
        spans = {m: curves[m].span(axis=axis) for m in methods}
        found["widths"][axis] = {
            m: plain(percentiles(own[m], len(subjects)))
            | {
                "from": float(f"{10 ** spans[m].low:.4g}"),
                "to": float(f"{10 ** spans[m].high:.4g}"),
                "open": spans[m].open,
            }
            for m in methods
        }
        found["wider"][axis] = {
            m: plain(percentiles(own[OWN] - own[m], len(subjects))) for m in methods if OWN in methods and m != OWN
        }

    def values(m: str, measure: str) -> dict[float, Values]:
        return {lr: by_subject(own, pairs, measure) for (method, lr), own in kept.items() if method == m}

    chosen = {m: left_out(values(m, rules.QUALITY)) for m in methods}
    found["best"] = {}
    at_best: dict[str, dict[str, Values]] = {}
    for m in methods:
        at_best[m] = {measure: at_rates(values(m, measure), chosen[m]) for measure in MEASURES}
        found["best"][m] = {
            "learning_rates": chosen[m],
            "parameters": only([r for (method, _), own in kept.items() if method == m for r in own], "parameters"),
        } | {measure: mean(values) for measure, values in at_best[m].items()}
    if OWN in methods:
        found["paired"] = {
            m: {measure: difference(at_best[OWN][measure], at_best[m][measure]) for measure in MEASURES}
            for m in methods
            if m != OWN
        }
        found["rates"] = {m: best_ratio(curves[OWN], curves[m]) for m in methods if m != OWN}
        found["beside"] = {}
        rates = sorted(lr for method, lr in kept if method == OWN)
        for name, step in (("lower", -1), ("higher", 1)):
            places = {s: rates.index(lr) + step for s, lr in chosen[OWN].items()}
            beside = {s: rates[place] for s, place in places.items() if 0 <= place < len(rates)}
            found["beside"][name] = {
                measure: difference(at_best[OWN][measure], at_rates(values(OWN, measure), beside))
                for measure in MEASURES
            }
    return found


def at_rates(values: Mapping[float, Values], rates: Mapping[str, float]) -> Values:
    """Each subject's value at its own rate, of those that have one there.  values: {rate: {subject: value}}."""
    return {s: values[lr][s] for s, lr in rates.items() if s in values[lr]}


def curve(
    method: str, by_cell: Mapping[Cell, list[dict[str, Any]]], pairs: set[tuple[str, int]], dropped: Sequence[float]
) -> Curve:
    rates = sorted(lr for m, lr in by_cell if m == method)
    subjects = tuple(sorted({s for s, _ in pairs}))
    quality = np.full((len(subjects), len(rates)), np.nan)
    norms = np.zeros(len(rates))
    for i, lr in enumerate(rates):
        own = by_cell[method, lr]
        norms[i] = mean_norm(own) or np.nan
        if lr not in dropped:
            values = by_subject(own, pairs, rules.QUALITY)
            quality[:, i] = [values[s] for s in subjects]
    deficit, reference = np.zeros(len(rates)), int(np.nanargmax(quality.mean(0)))
    if dropped:  # how far below the best rate that was kept, on the subjects that the dropped one had
        first = [{r["subject"]: r[rules.QUALITY] for r in by_cell[method, lr] if rules.counts(r)} for lr in rates]
        reference = max(
            (i for i, lr in enumerate(rates) if lr not in dropped), key=lambda i: np.mean(list(first[i].values()))
        )
        deficit = np.array([np.mean([first[reference][s] - x for s, x in own.items()]) for own in first])
    return Curve(np.array(rates), norms, subjects, quality, deficit, reference)


def best_ratio(one: Curve, other: Curve) -> dict[str, Any]:
    """Of the two best rates, subjects resampled together."""

    def best(curve: Curve, rows: Any) -> float:
        return float(curve.rates[np.argmax(curve.mean(rows))])

    rows = [slice(None), *resampled(len(one.subjects))]
    return plain(percentiles(np.array([best(one, r) / best(other, r) for r in rows]), len(one.subjects)))


def compared(by_cell: Mapping[Cell, list[dict[str, Any]]], kind: str) -> dict[str, Any]:
    """Each method minus `OWN`, on the pairs that all have; the other way round: `OWN` minus each."""
    pairs = balanced(by_cell)
    values = {
        method: {measure: by_subject(own, pairs, measure) for measure in MEASURES}
        for (method, _), own in by_cell.items()
    }
    own = values.get(OWN + kind)
    found: dict[str, Any] = {"pairs": len(pairs), "subjects": sorted({s for s, _ in pairs})}
    if own is not None:
        found["paired"] = {
            method: {measure: difference(own[measure], theirs[measure]) for measure in MEASURES}
            for method, theirs in values.items()
            if method != OWN + kind
        }
    found["means"] = {
        method: {measure: mean(theirs[measure]) for measure in MEASURES} for method, theirs in values.items()
    }
    return found


def two(by_cell: Mapping[Cell, list[dict[str, Any]]], one: str, other: str) -> dict[str, Any]:
    """`one` minus `other`, methods of one rate each."""
    some = {cell: own for cell, own in by_cell.items() if cell[0] in (one, other)}
    if len(some) < 2:
        return {}
    pairs = balanced(some)
    by_name = {method: own for (method, _), own in some.items()}
    return {m: difference(by_subject(by_name[one], pairs, m), by_subject(by_name[other], pairs, m)) for m in MEASURES}


def cost(by_cell: Mapping[Cell, list[dict[str, Any]]]) -> dict[str, Any]:
    """Over all runs of stability: what does not depend on the rate is the better known for it."""
    values: dict[str, dict[str, Values]] = {}
    parameters = {}
    for method in dict.fromkeys(m for m, _ in by_cell):
        own = [r for (m, _), some in by_cell.items() if m == method for r in some]
        if own:
            pairs = {(r["subject"], r["seed"]) for r in own}
            values[method] = {measure: by_subject(own, pairs, measure) for measure in COSTS}
            parameters[method] = only(own, "parameters")
    found: dict[str, Any] = {
        "rows": {m: {k: mean(v) for k, v in own.items()} | {"parameters": parameters[m]} for m, own in values.items()}
    }
    found["merged"] = {m: ratio(v["seconds_merged"], v["seconds_base"]) for m, v in values.items()}
    found["unmerged"] = {m: ratio(v["seconds_unmerged"], v["seconds_base"]) for m, v in values.items()}
    if OWN in values:
        found["ratios"] = {m: {k: ratio(values[OWN][k], v[k]) for k in COSTS} for m, v in values.items() if m != OWN}
    return found

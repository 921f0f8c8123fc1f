# SPDX-License-Identifier: Apache-2.0
"""The summary as Markdown, section by section; what was not run says so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .plan import CHOOSING

Summary = Mapping[str, Any]
NOT_RUN = "not run"
NAMES = {
    "both_right": "both right", "subject_right": "right subject", "background_right": "right background",
    "similarity": "similarity", "own_similarity": "similarity, own judge", "alignment": "alignment, own judge",
    "long_right": "long prompts, both right", "drift": "drift", "update_norm": "norm of dW",
}  # fmt: skip
COLUMNS = ("both_right", "subject_right", "background_right", "similarity", "alignment", "drift")


def number(found: Mapping[str, Any] | None, factor: float = 1.0) -> str:
    """A mean and its interval."""
    if not found:
        return NOT_RUN
    return f"{found['mean'] * factor:.3g} [{found['low'] * factor:.3g}, {found['high'] * factor:.3g}]"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def parameters(count: int | None) -> str:
    return f"{count:,}" if count else ""


def state(summary: Summary) -> str:
    rows = [
        [name, f"{summary[name]['done']} of {summary[name]['planned']}"]
        for name in ("default", "decay", "stability", "parameters", "factors", "layers", "one_image")
        if name in summary
    ]
    lines = [table(["experiment", "runs done"], rows), ""]
    if summary["versions"]:
        commits = sorted({one["commit"] for one in summary["versions"] if "commit" in one})
        packages = sorted({f"{k} {v}" for one in summary["versions"] for k, v in one.items() if k != "commit"})
        lines.append(
            f"{summary['cpu_hours']:.2f} CPU hours, base model {summary['base']}, {', '.join(packages)}; commits "
            f"{', '.join(commits)}."
        )
    else:
        lines.append("Nothing has been run.")
    return "\n".join(lines)


def claims(summary: Summary) -> str:
    rows = [
        [c["claim"], c["source"], c["measured"], number(c["interval"]), f"**{c['verdict']}**"]
        for c in summary["claims"]
    ]
    return table(["claim", "source", "number", "value [95 % interval]", "verdict"], rows)


def curves(summary: Summary) -> str:
    """A line a method, its seven rates in columns."""
    found = summary["stability"]
    methods = list(dict.fromkeys(r["method"] for r in found["rows"]))
    width = max(sum(r["method"] == m for r in found["rows"]) for m in methods)
    rows = []
    for method in methods:
        own = sorted((r for r in found["rows"] if r["method"] == method), key=lambda r: r["learning_rate"])
        dropped = found.get("dropped", {}).get(method, ())
        cells = []
        for r in own:
            share = f"{r['share']:.2f}" if r["runs"] else NOT_RUN
            few = f" (dropped after {r['runs']})" if r["learning_rate"] in dropped else ""
            lost = f", {r['diverged']} diverged" if r["diverged"] else ""
            cells.append(f"{r['learning_rate']:g}: {share}{few}{lost}")
        rows.append([method, *cells, *[""] * (width - len(cells))])
    return table(["method", "learning rate: both right", *[""] * (width - 1)], rows)


def stability(summary: Summary) -> str:
    found = summary.get("stability", {})
    if not found.get("widths"):
        return NOT_RUN
    rows = []
    for method, best in found["best"].items():
        rates = sorted(set(best["learning_rates"].values()))
        spans = []
        for axis in ("rates", "norms"):
            own = found["widths"][axis][method]
            spans.append(f"{number(own)}; {own['from']:.2g} to {own['to']:.2g}" + (", open" if own["open"] else ""))
        rows.append([method, parameters(best["parameters"]), ", ".join(f"{r:g}" for r in rates), *spans])
    head = [
        "method", "parameters", "best rates", "width of the range of rates, decades; from, to",
        "width of the range of norms of dW, decades; from, to",
    ]  # fmt: skip
    return table(head, rows) + f"\n\n{len(found['subjects'])} subjects, {found['pairs']} pairs of subject and seed."


def best(summary: Summary) -> str:
    found = summary.get("stability", {})
    if not found.get("best"):
        return NOT_RUN
    rows = [[m, *[number(b[c]) for c in (*COLUMNS, "own_similarity", "update_norm")]] for m, b in found["best"].items()]
    return table(["method", *[NAMES[c] for c in (*COLUMNS, "own_similarity", "update_norm")]], rows)


def paired(found: Summary, columns: Sequence[str] = COLUMNS) -> str:
    if not found.get("paired"):
        return NOT_RUN
    rows = [[f"minus {m}", *[number(d[c]) for c in columns]] for m, d in found["paired"].items()]
    return table(["", *[NAMES[c] for c in columns]], rows)


def means(found: Summary) -> str:
    rates = {r["method"]: r for r in found["rows"]}
    rows = [
        [m, f"{rates[m]['learning_rate']:g}", parameters(rates[m]["parameters"]), *[number(v[c]) for c in COLUMNS]]
        for m, v in found["means"].items()
    ]
    pairs = f"\n\n{len(found['subjects'])} subjects, {found['pairs']} pairs of subject and seed that all methods have."
    return table(["method", "learning rate", "parameters", *[NAMES[c] for c in COLUMNS]], rows) + pairs


def of(summary: Summary, name: str) -> str:
    """One of the experiments that run each method at one rate."""
    found = summary.get(name)
    ran = found and any(v["both_right"] for v in found.get("means", {}).values())
    return means(found) if found and ran else NOT_RUN


def default(summary: Summary) -> str:
    """A row a subject, in the order of the plan, and the sums."""
    found = summary.get("default", {})
    if not found.get("subjects"):
        return NOT_RUN
    shares, features = ("subject_right", "background_right"), ("similarity", "drift")
    rows = [
        [subject, "chosen on" if subject in CHOOSING else "", *(f"{own[m]:.0%}" for m in shares),
         *("" if own[m] is None else f"{own[m]:.3f}" for m in features)]
        for subject, own in found["subjects"].items()
    ]  # fmt: skip
    columns = (*shares, *features)
    for kind, means in found["means"].items():
        rows.append([f"mean, {kind}", "", *(number(means[m]) for m in columns)])
    own, reported = found["reached"], [s for s in found["subjects"] if s not in CHOOSING]
    return (
        table(["subject", "", *(NAMES[m] for m in columns)], rows)
        + f"\n\n**{len(own)} of {len(found['subjects'])} subjects** have the right subject in 80 % and the right "
        f"background in 90 % of the pictures; of those that nothing was chosen on "
        f"{len(found['reached_of_the_reported'])} of "
        f"{len(reported)}. {found['seeds']} seed{'s' * (found['seeds'] > 1)}."
    )


def long_prompts(summary: Summary) -> str:
    found = summary.get("stability", {})
    if not found.get("best"):
        return NOT_RUN
    rows = []
    for method, own in found["best"].items():
        difference = found.get("paired", {}).get(method)
        rows.append(
            [method, number(own["both_right"]), number(own["long_right"]),
             number(difference["long_right"]) if difference else ""]
        )  # fmt: skip
    return table(["method", "short prompts", "long prompts", "krona 64,4 minus this, long prompts"], rows)


def cost(summary: Summary) -> str:
    found = summary.get("cost", {})
    if not found.get("rows"):
        return NOT_RUN
    rows = []
    for method, own in found["rows"].items():
        size = f"{own['file_bytes']['mean'] / 1000:.0f} kB" if own["file_bytes"] else ""
        rows.append(
            [method, parameters(own["parameters"]), size, number(own["seconds_training"]),
             number(own["seconds_update"], 1e3), number(own["activation_bytes"], 2**-20),
             number(found["unmerged"][method]), number(found["merged"][method])]
        )  # fmt: skip
    head = [
        "method", "parameters", "file", "training, CPU-s", "update, CPU-ms", "kept for the backward pass, MiB",
        "forward unmerged / base", "forward merged / base",
    ]  # fmt: skip
    return table(head, rows)


def sections(summary: Summary, plots: str = "") -> dict[str, str]:
    """{name of a marked section of docs/evidence.md: its text}; `plots`: where the plots lie, with a slash."""

    def picture(text: str, what: str, name: str) -> str:
        return text if text == NOT_RUN else f"![{what}]({plots}{name}.png)\n\n{text}"

    known = summary.get("stability", {})
    shown = curves(summary) if any(r["runs"] for r in known.get("rows", ())) else NOT_RUN
    return {
        "state": state(summary),
        "claims": claims(summary),
        "default": default(summary),
        "decay": of(summary, "decay"),
        "decay paired": paired(summary.get("decay", {})),
        "curves": picture(shown, "Quality by learning rate and by the norm of dW, a line a method", "stability"),
        "stability": stability(summary),
        "best": best(summary),
        "paired": paired(known, (*COLUMNS, "own_similarity")),
        "parameters": picture(of(summary, "parameters"), "Quality by the number of parameters", "parameters"),
        "factors": picture(of(summary, "factors"), "Quality by factors", "factors"),
        "factors paired": paired(summary.get("factors", {})),
        "layers": of(summary, "layers"),
        "one_image": of(summary, "one_image"),
        "long_prompts": long_prompts(summary),
        "cost": cost(summary),
    }

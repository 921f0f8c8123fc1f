# SPDX-License-Identifier: Apache-2.0
"""Plots of a summary."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

SIZES = {"stability": (11, 8), "parameters": (9, 5), "factors": (8, 4.5)}
LABEL = "right subject on the right background"


def save(figure: Figure, path: Path) -> Path:
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, dpi=90, format="png", metadata={"Software": None})
    temporary.replace(path)
    return path


def stability(summary: Mapping[str, Any], path: Path) -> Path:
    """Quality above the learning rate and the norm of the update, and its two parts: a line a method, the 95 % interval
    shaded; rates that were dropped as crosses, of the first subjects alone."""
    found = summary["stability"]
    figure = Figure(figsize=SIZES["stability"], layout="constrained")
    axes = figure.subplots(2, 2, sharey=True)
    panels = (
        (axes[0, 0], "learning_rate", "both_right", LABEL), (axes[0, 1], "norm", "both_right", LABEL),
        (axes[1, 0], "learning_rate", "subject_right", "right subject"),
        (axes[1, 1], "learning_rate", "background_right", "right background"),
    )  # fmt: skip
    for axis, across, measure, label in panels:
        for i, method in enumerate(dict.fromkeys(r["method"] for r in found["rows"])):
            points = [r for r in found["rows"] if r["method"] == method and r["runs"] and r[across] is not None]
            if not points:
                continue
            dropped = found.get("dropped", {}).get(method, ())
            points = sorted(points, key=lambda r: r[across])
            kept = [r for r in points if r[measure] and r["learning_rate"] not in dropped]
            xs = [r[across] for r in kept]
            axis.plot(xs, [r[measure]["mean"] for r in kept], color=f"C{i}", label=method if kept else None, marker="o")
            axis.fill_between(xs, *[[r[measure][e] for r in kept] for e in ("low", "high")], color=f"C{i}", alpha=0.08)
            if measure == "both_right":
                gone = [r for r in points if r["learning_rate"] in dropped]
                axis.plot([r[across] for r in gone], [r["share"] for r in gone], f"C{i}x")
        words = "norm of dW" if across == "norm" else "learning rate"
        axis.set(xscale="log", xlabel=words, ylabel=label, ylim=(-0.02, 1.02))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize="small")
    return save(figure, path)


def spread(axis: Any, x: float, value: Mapping[str, float], **style: Any) -> None:
    """A point and its interval."""
    ends = [[value["mean"] - value["low"]], [value["high"] - value["mean"]]]
    axis.errorbar([x], [value["mean"]], yerr=ends, marker="o", capsize=2, **style)


def parameters(summary: Mapping[str, Any], path: Path) -> Path:
    """Quality by parameters; a color a family, a dashed line where nothing with as few parameters is better."""
    figure = Figure(figsize=SIZES["parameters"], layout="constrained")
    axis = figure.subplots()
    known = {r["method"]: r["parameters"] for r in summary["parameters"]["rows"]}
    # without those of which every run diverged, whose parameters nobody has counted
    means = {m: v["both_right"] for m, v in summary["parameters"]["means"].items() if v["both_right"] and known[m]}
    counts = {m: known[m] for m in means}
    colors = {"krona": "C0", "lora": "C1", "lokr": "C2"}
    beside = {"krona": 0.97, "lora": 1.0, "lokr": 1.03}  # equal counts would cover each other
    named = set()
    for method, value in means.items():
        family = method.split()[0]
        x = counts[method] * beside[family]
        spread(axis, x, value, color=colors[family], label=None if family in named else family)
        named.add(family)
        axis.annotate(
            method.removeprefix(family).strip(), (x, value["low"]), (0, -3), textcoords="offset points",
            rotation=90, ha="center", va="top", fontsize="x-small", color=colors[family],
        )  # fmt: skip
    front: list[tuple[float, float]] = []
    for method in sorted(means, key=lambda m: counts[m]):
        if not front or means[method]["mean"] > front[-1][1]:
            front.append((counts[method] * beside[method.split()[0]], means[method]["mean"]))
    if front:
        xs, ys = zip(*front, (1.1 * max(counts.values()), front[-1][1]), strict=True)
        axis.step(xs, ys, "k--", where="post", linewidth=0.8)
    axis.set(xscale="log", xlabel="parameters", ylabel=LABEL, ylim=(-0.02, 1.02))
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 4)))
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right")
    return save(figure, path)


def factors(summary: Mapping[str, Any], path: Path) -> Path:
    """A point a pair of factors."""
    figure = Figure(figsize=SIZES["factors"], layout="constrained")
    axis = figure.subplots()
    means = {m: v["both_right"] for m, v in summary["factors"]["means"].items() if v["both_right"]}
    for i, value in enumerate(means.values()):
        spread(axis, i, value, color="C0")
    axis.set_xticks(range(len(means)), list(means), rotation=40, ha="right", fontsize="small")
    axis.set(ylabel=LABEL, ylim=(-0.02, 1.02))
    axis.grid(alpha=0.3)
    return save(figure, path)


def write(summary: Mapping[str, Any], folder: Path) -> list[Path]:
    """The plots of which something has been run."""
    found = []
    if any(r["runs"] for r in summary.get("stability", {}).get("rows", ())):
        found.append(stability(summary, folder / "stability.png"))
    for name, draw in (("parameters", parameters), ("factors", factors)):
        if any(v["both_right"] for v in summary.get(name, {}).get("means", {}).values()):
            found.append(draw(summary, folder / f"{name}.png"))
    return found

# SPDX-License-Identifier: Apache-2.0
"""Tables (Markdown, to standard output) and a plot from result files.

python -m benchmarks.report benchmarks/results/*.json [--plot docs/performance.png --only SDXL]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def describe(result: dict[str, Any]) -> str:
    """One line: device, threads, dtype, versions, commit, copy bandwidth."""
    environment = result["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    return (
        f"{environment['device']}, {environment['threads']} thread(s), {result['dtype']}; {versions}; commit "
        f"{environment['commit']}; memory copies at {result['copy_bytes_per_second'] / 1e9:.1f} GB/s; medians of "
        f"{result['repetitions']} interleaved repetitions."
    )


def layer_table(result: dict[str, Any]) -> str:
    """Milliseconds that each provider adds to the frozen layer's forward + backward, and its peak memory."""
    lines = []
    for case, factors in _cases(result):
        rows = [r for r in result["rows"] if r["case"]["name"] == case and r["factors"] == factors]
        frozen = next(r for r in rows if r["provider"] == "frozen")
        lora = next((r for r in rows if r["provider"] == "PEFT LoRA r=4"), None)
        sizes = frozen["case"]
        lines += [
            "",
            f"**{case}**: {sizes['tokens']} tokens, {sizes['n_in']} to {sizes['n_out']}, factors "
            f"({factors[0]},{factors[1]}). Frozen layer: {frozen['training']['p50'] * 1e3:.1f} ms forward + backward, "
            f"{frozen['peak_bytes'] / 2**20:.1f} MiB.",
            "",
            "| | parameters | forward adds (ms) | forward + backward adds (ms) | of LoRA's | peak (MiB) |",
            "|---|---:|---:|---:|---:|---:|",
        ]
        for row in rows:
            if row["provider"] == "frozen":
                continue
            if "wrong" in row:
                lines.append(f"| {row['provider']} | {row['trainable']:,} | wrong: {row['wrong']} | | | |")
                continue
            share = row["training"]["added"] / lora["training"]["added"] if lora else float("nan")
            lines.append(
                f"| {row['provider']} | {row['trainable']:,} | {row['forward']['added'] * 1e3:.1f} | "
                f"{row['training']['added'] * 1e3:.1f} | {share:.2f} | {row['peak_bytes'] / 2**20:.1f} |"
            )
    return "\n".join(lines)


def unet_table(result: dict[str, Any]) -> str:
    """One step of whole UNets: training, or denoising in the inference suite."""
    kind = "training" if result["suite"] == "unet" else "forward"
    lines = [
        "| UNet | adapter | parameters | step (s) | of the frozen UNet's | of LoRA's | peak (MiB) |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        times = row[kind]
        lines.append(
            f"| {row['unet']}, {row['latents']}x{row['latents']} latents, batch {row['batch']} | {row['provider']} | "
            f"{row['trainable']:,} | {times['p50']:.3f} | {times['over_frozen']:.3f} | "
            f"{times['over_lora']:.3f} | {row['peak_bytes'] / 2**20:.0f} |"
        )
    return "\n".join(lines)


def scaling_table(result: dict[str, Any]) -> str:
    """Milliseconds that one layer's adapters add, one row for each point."""
    lines = [
        "| varied | tokens | width | r | adapters | | forward adds (ms) | forward + backward adds (ms) |",
        "|---|---:|---:|---:|---:|---|---:|---:|",
    ]
    for row in result["rows"]:
        if row["provider"] != "frozen":
            lines.append(
                f"| {row['axis']} | {row['tokens']} | {row['width']} | {row['r']} | {row['adapters']} | "
                f"{row['provider']} | {row['forward']['added'] * 1e3:.3f} | {row['training']['added'] * 1e3:.3f} |"
            )
    return "\n".join(lines)


def plot(results: list[dict[str, Any]], path: Path, only: str = "") -> None:
    """Added forward + backward time of every provider, one panel a case that `only` is in, on a logarithmic scale."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullFormatter

    panels = [(result, case, factors) for result in results for case, factors in _cases(result) if only in case]
    columns = min(4, len(panels))
    height = -(-len(panels) // columns)
    figure, axes = plt.subplots(height, columns, figsize=(4.4 * columns, 3.2 * height), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (result, case, factors) in zip(axes.flat, panels, strict=False):
        rows = [r for r in result["rows"] if r["case"]["name"] == case and r["factors"] == factors]
        rows = [r for r in rows if r["provider"] != "frozen" and "wrong" not in r]
        frozen = next(r for r in result["rows"] if r["case"]["name"] == case and r["provider"] == "frozen")
        added = [max(r["training"]["added"], 1e-5) * 1e3 for r in rows]
        colours = ["#d1495b" if r["provider"] == "KronA" else "#8d99ae" for r in rows]
        names = [r["provider"] for r in rows]
        axis.hlines(names, 0.1, added, color="#e5e8ee", linewidth=1)
        axis.scatter(added, names, color=colours, s=36, zorder=2)
        axis.axvline(frozen["training"]["p50"] * 1e3, color="black", linewidth=0.8, linestyle=":")
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.invert_yaxis()
        axis.set_title(f"{case}\n({factors[0]},{factors[1]}), {result['dtype']}", fontsize=8)
        axis.set_xlabel("ms added to forward + backward (dotted: the frozen layer)", fontsize=7)
        axis.tick_params(labelsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _cases(result: dict[str, Any]) -> list[tuple[str, list[int]]]:
    seen = dict.fromkeys((row["case"]["name"], tuple(row["factors"])) for row in result["rows"])
    return [(case, list(factors)) for case, factors in seen]


TABLES = {"layer": layer_table, "scaling": scaling_table, "unet": unet_table, "inference": unet_table}


def main(argv: list[str] | None = None) -> None:
    """Print the tables; with --plot also draw the layer results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--only", default="", help="plot only the cases whose name contains this")
    args = parser.parse_args(argv)
    results = [json.loads(path.read_text(encoding="utf-8")) for path in args.results]
    for path, result in zip(args.results, results, strict=True):
        print(f"\n### {path.name}\n\n{describe(result)}\n")
        print(TABLES[result["suite"]](result))
    layers = [result for result in results if result["suite"] == "layer"]
    if args.plot and layers:
        plot(layers, args.plot, args.only)
        print(f"\nwrote {args.plot}")


if __name__ == "__main__":
    main()

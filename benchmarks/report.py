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
    """One line: device, threads, dtype, versions, commit, copy bandwidth; what is missing."""
    environment = result["environment"]
    device = environment["device"]
    if environment.get("cuda"):
        device += f" (driver {environment.get('driver')}, CUDA {environment['cuda']})"
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    line = (
        f"{device}, {environment['threads']} thread(s), {result['dtype']}; {versions}; commit "
        f"{environment['commit']}; memory copies at {result['copy_bytes_per_second'] / 1e9:.1f} GB/s; medians of "
        f"{result['repetitions']} interleaved repetitions."
    )
    if result.get("clock") == "cpu":
        line += " Times are CPU seconds of the process, not seconds on the wall."
    if result.get("lycoris_kernels"):
        line += f" LyCORIS computes its bypass mode with: {result['lycoris_kernels']}."
    if not result.get("complete", True):
        line += " **Incomplete: the run was stopped.**"
    return line


def layer_table(result: dict[str, Any]) -> str:
    """Milliseconds that each provider adds to the frozen layer's forward + backward, and its peak memory.

    On a GPU also how often the floor, which says nothing where a CPU's caches hold x and y.
    """
    on_gpu = result.get("device") == "cuda"
    lines = []
    for case, factors in _cases(result):
        rows = _rows_of(result, case, factors)
        frozen = next((r for r in rows if r["provider"] == "frozen"), {})
        if "training" not in frozen:
            continue
        lora = next((r for r in rows if r["provider"] == "PEFT LoRA r=4"), {})
        columns = ["", "parameters", "forward adds (ms)", "forward + backward adds (ms)", "of LoRA's", "peak (MiB)"]
        floor = ""
        if on_gpu:
            columns[3:3] = ["of the floor"]
            columns[5:5] = ["of the floor"]
            known = next((r for r in rows if "floor" in r.get("training", {})), None)
            if known:
                floor = (
                    " Floor: "
                    + " and ".join(_ms(known[kind]["floor"], True) for kind in ("forward", "training"))
                    + " ms."
                )
        lines += [
            "",
            f"**{case}**: {_sizes(frozen)}, factors ({factors[0]},{factors[1]}). Frozen layer: "
            f"{_ms(frozen['training']['p50'], on_gpu)} ms forward + backward, "
            f"{frozen['peak_bytes'] / 2**20:.1f} MiB.{floor}",
            "",
            *_head(columns, left=1),
        ]
        for row in rows:
            if row["provider"] == "frozen":
                continue
            cells = [row["provider"], f"{row['trainable']:,}" if "trainable" in row else ""]
            if "training" not in row:
                cells.append(_problem(row))
            else:
                for kind in ("forward", "training"):
                    cells.append(_ms(row[kind]["added"], on_gpu))
                    if on_gpu:
                        cells.append(f"{row[kind]['over_floor']:.2f}")
                share = f"{row['training']['added'] / lora['training']['added']:.2f}" if "training" in lora else ""
                cells += [share, f"{row['peak_bytes'] / 2**20:.1f}"]
            lines.append(_line(cells, len(columns)))
    return "\n".join(lines)


def unet_table(result: dict[str, Any]) -> str:
    """One step of whole UNets: training, or denoising in the inference suite."""
    kind = "training" if result["suite"] == "unet" else "forward"
    columns = ["UNet", "batch", "checkpointing", "compiled", "adapter", "parameters", "step (ms)"]
    columns += ["of the frozen UNet's", "of LoRA's", "peak (MiB)"]
    lines = _head(columns, left=5)
    for row in sorted(result["rows"], key=_variant):  # providers of one variant below each other
        name, batch, checkpointing, compiled = _variant(row)
        if compiled:
            graphs = f"{row['compilations']} graphs, {row['graph_breaks']} breaks" if "compilations" in row else "yes"
        cells = [name, str(batch), "on" if checkpointing else "off", graphs if compiled else "no", row["provider"]]
        if "failed" in row:
            cells += ["", _problem(row)]
        else:
            times = row[kind]
            ratios = [times.get("over_frozen"), times.get("over_lora")]
            cells += [f"{row['trainable']:,}", _ms(times["p50"], False)]
            cells += ["" if ratio is None else f"{ratio:.3f}" for ratio in ratios]
            cells.append(f"{row['peak_bytes'] / 2**20:.0f}")
        lines.append(_line(cells, len(columns)))
    return "\n".join(lines)


def _variant(row: dict[str, Any]) -> tuple[str, int, bool, bool]:
    name = f"{row['unet']}, {row['latents']}x{row['latents']} latents"
    return name, row["batch"], row.get("gradient_checkpointing", False), row.get("compiled", False)


def qkv_table(result: dict[str, Any]) -> str:
    """Milliseconds that the adapters of q, k and v add, each on its own and in one node."""
    on_gpu = result.get("device") == "cuda"
    columns = [
        "layer",
        "factors",
        "q, k and v",
        "forward + backward (ms)",
        "adds (ms)",
        "of one by one's",
        "peak (MiB)",
    ]
    lines = _head(columns, left=3)
    for case, factors in _cases(result):
        rows = _rows_of(result, case, factors)
        alone = next(r["training"]["added"] for r in rows if r["provider"] == "one by one")
        for row in rows:
            times = row["training"]
            cells = [f"{case}: {_sizes(row)}", f"({factors[0]},{factors[1]})", row["provider"]]
            cells.append(_ms(times["p50"], on_gpu))
            frozen = row["provider"] == "frozen"
            cells += ["", ""] if frozen else [_ms(times["added"], on_gpu), f"{times['added'] / alone:.2f}"]
            lines.append(_line([*cells, f"{row['peak_bytes'] / 2**20:.1f}"], len(columns)))
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


def variants_table(result: dict[str, Any]) -> str:
    """Milliseconds of the product's forward + backward in every variant; what the rule takes is in bold."""
    names = list(dict.fromkeys(name for row in result["rows"] for name in row["seconds"]))
    lines = _head(["layer", "factors", *(name.removeprefix("torch ") for name in names)], left=2)
    for row in result["rows"]:
        cells = [f"{row['case']['name']}: {_sizes(row)}", f"({row['factors'][0]},{row['factors'][1]})"]
        for name in names:
            time = _ms(row["seconds"][name], result.get("device") == "cuda") if name in row["seconds"] else ""
            cells.append(f"**{time}**" if name == f"torch {row['rule']}" else time)
        lines.append(_line(cells, len(names) + 2))
    return "\n".join(lines)


def host_table(result: dict[str, Any]) -> str:
    """CPU time that an adapter adds to one frozen layer, with 20th and 80th percentile, and the ratio to LoRA's."""
    columns = ["layers", "adapter", "forward adds (us)", "of LoRA's", "forward + backward adds (us)", "of LoRA's"]
    lines = _head(columns, left=2)
    for row in result["rows"]:
        if row["provider"] == "frozen":
            continue
        case = row["case"]
        cells = [f"{case['name']}, {case['tokens']} tokens", row["provider"]]
        for kind in ("forward", "training"):
            low, middle, high = (1e6 * row[kind]["added"][f"p{q}"] for q in (20, 50, 80))
            cells += [f"{middle:.0f} ({low:.0f} to {high:.0f})", f"{row[kind]['of_lora']:.2f}"]
        lines.append(_line(cells, len(columns)))
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
        rows = [r for r in _rows_of(result, case, factors) if "training" in r]
        frozen = next(r for r in rows if r["provider"] == "frozen")
        rows.remove(frozen)
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


def _rows_of(result: dict[str, Any], case: str, factors: list[int]) -> list[dict[str, Any]]:
    return [r for r in result["rows"] if r["case"]["name"] == case and r["factors"] == factors]


def _sizes(row: dict[str, Any]) -> str:
    return f"{row['case']['tokens']} tokens, {row['case']['n_in']} to {row['case']['n_out']}"


def _ms(seconds: float, small: bool) -> str:
    return f"{seconds * 1e3:.{3 if small else 1}f}"


def _problem(row: dict[str, Any]) -> str:
    return f"wrong: {row['wrong']}" if "wrong" in row else f"failed: {row.get('failed')}"


def _head(columns: list[str], left: int) -> list[str]:
    """A table's first two lines; all columns but the first ones hold numbers."""
    return [_line(columns, len(columns)), "|" + "---|" * left + "---:|" * (len(columns) - left)]


def _line(cells: list[str], columns: int) -> str:
    return "| " + " | ".join([*cells, *[""] * (columns - len(cells))]).replace("\n", " ") + " |"


TABLES = {
    "layer": layer_table,
    "scaling": scaling_table,
    "unet": unet_table,
    "inference": unet_table,
    "qkv": qkv_table,
    "variants": variants_table,
    "host": host_table,
}


def main(argv: list[str] | None = None) -> None:
    """Print the tables; with --plot also draw the layer results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--only", default="", help="plot only the cases whose name contains this")
    args = parser.parse_args(argv)
    results = [json.loads(path.read_text(encoding="utf-8")) for path in args.results]
    for path, result in zip(args.results, results, strict=True):
        if result.get("suite") not in TABLES:
            print(f"\n### {path.name}\n\nNot written by benchmarks.run, which this makes tables of.")
            continue
        print(f"\n### {path.name}\n\n{describe(result)}\n")
        print(TABLES[result["suite"]](result) if result["rows"] else "Nothing was measured.")
    layers = [result for result in results if result.get("suite") == "layer"]
    if args.plot and layers:
        plot(layers, args.plot, args.only)
        print(f"\nwrote {args.plot}")


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""Which scaling and initialisation has the same best learning rate whatever the factors, the terms and the width.

    python -m benchmarks.learning_rates --out benchmarks/results/learning-rates.json --plot docs/learning_rates.png

Toy regressions: frozen random layers, and targets from the same layers plus an update of rank 4 that changes outputs by
0.3 of their size. Adapters of every scheme are trained by Adam at every learning rate of a grid, all of a case at
once, and what is kept is the loss at the end relative to the loss at the start. Finished cases are in the file and are
not run again, so a stopped run goes on where it was; with all of them there, the table is printed at once.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from .measure import environment

RATES = tuple(2.0**e for e in range(-14, -1))
SEEDS = (0, 1)
RANK, SIZE = 4, 0.3  # of the update that the targets are made with
RAMP = 1.0  # standard deviations of the inputs' directions fall as 1/i^(RAMP/2)


class Shape(NamedTuple):
    """A width (out = in), the adapter on it, and how many layers there are, with ReLU between them."""

    width: int
    a_out: int
    a_in: int
    r: int
    layers: int = 1

    @property
    def b_out(self) -> int:
        return self.width // self.a_out

    @property
    def b_in(self) -> int:
        return self.width // self.a_in


BASE = Shape(512, 64, 4, 1)
FACTORS = [Shape(512, *f, 1) for f in ((64, 4), (64, 16), (64, 64), (16, 16), (4, 64), (16, 2), (256, 2))]
TERMS = [Shape(512, *f, r) for f, r in (((64, 4), 4), ((64, 4), 16), ((64, 64), 4))]
WIDTHS = [Shape(w, *f, 1) for f in ((64, 4), (16, 16)) for w in (128, 256, 512, 1024)]
DEEP = [
    Shape(w, *f, 1, 3) for w, f in ((128, (64, 4)), (256, (64, 4)), (256, (16, 16)), (256, (64, 64)), (512, (64, 4)))
]
DEEP += [Shape(256, 64, 4, 4, 3)]
SHAPES = tuple(dict.fromkeys([*FACTORS, *TERMS, *WIDTHS, *DEEP]))


class Scheme(NamedTuple):
    """Standard deviation of A's and of B's entries at the start, and s, each a function of the shape; the ratio of B's
    learning rate to A's."""

    std_a: Callable[[Shape], float]
    std_b: Callable[[Shape], float]
    s: Callable[[Shape], float]
    ratio: float = 1.0


def zero(_: Shape) -> float:
    return 0.0


def kaiming(fan_in: int) -> float:
    """Standard deviation of Kaiming-uniform with a = sqrt(5): U(-1, 1) / sqrt(fan_in)."""
    return 1 / math.sqrt(3 * fan_in)


def first_step(c: Shape, std_a: float) -> float:
    """What a step of Adam on B alone, from zero, adds to an output per s and learning rate, for inputs of size 1.

    Sum over B's inputs (b_in, all of one sign), over the columns of A and over the terms: docs/math.md.
    """
    return std_a * c.b_in * math.sqrt(c.r * (1 + c.r * c.a_in / c.a_out))


UNIT = first_step(Shape(1280, 64, 4, 1), 1 / 64)  # s is 1 there: where the paper's 5e-4 comes from


def balanced(c: Shape) -> float:
    """The std of A for which its own movement counts alike everywhere, with s = 1280 / (r * in)."""
    return UNIT * c.a_in * math.sqrt(c.r) / math.sqrt(1 + c.r * c.a_in / c.a_out) / 1280


SCHEMES: dict[str, Scheme] = {
    "alpha": Scheme(lambda c: 1 / c.a_out, zero, lambda c: 1.0),
    "rank": Scheme(lambda c: 1 / c.a_out, zero, lambda c: 1 / c.r),
    "rslora": Scheme(lambda c: 1 / c.a_out, zero, lambda c: c.r**-0.5),
    "cdka": Scheme(zero, lambda c: kaiming(c.b_in), lambda c: (c.r * c.a_in) ** -0.5),
    "kaiming": Scheme(lambda c: kaiming(c.a_in), zero, lambda c: 1.0),
    "first step": Scheme(lambda c: 1 / c.a_out, zero, lambda c: UNIT / first_step(c, 1 / c.a_out)),
    "first step, kaiming": Scheme(lambda c: kaiming(c.a_in), zero, lambda c: UNIT / first_step(c, kaiming(c.a_in))),
    "width": Scheme(lambda c: 1 / c.a_out, zero, lambda c: math.sqrt(1280 / c.width)),
    "width, a_out": Scheme(lambda c: 1 / c.a_out, zero, lambda c: math.sqrt(1280 / c.width * 64 / c.a_out)),
    "balanced": Scheme(balanced, zero, lambda c: 1280 / (c.r * c.width)),
    **{
        f"alpha, ratio {name}": Scheme(lambda c: 1 / c.a_out, zero, lambda c: 1.0, ratio)
        for name, ratio in (("1/4", 0.25), ("4", 4.0), ("16", 16.0))
    },
}


def mixing(width: int, generator: torch.Generator) -> torch.Tensor:
    """(width, width): z @ it are inputs of size 1 whose covariance has a falling spectrum in random directions."""
    falling = torch.arange(1, width + 1.0) ** (-RAMP / 2)
    rotation = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
    return (falling * (width / falling.square().sum()).sqrt())[:, None] * rotation


def losses(shape: Shape, scheme: Scheme, seed: int, steps: int, tokens: int) -> list[float]:
    """The loss at the end relative to the one at the start, of each learning rate; inf where it diverged."""
    generator = torch.Generator().manual_seed(seed)
    n, w = len(RATES), shape.width
    mix = mixing(w, generator)
    weights = [torch.randn(w, w, generator=generator) * math.sqrt(2 / w) for _ in range(shape.layers)]
    updates = []
    for weight in weights:
        update = torch.randn(w, RANK, generator=generator) @ torch.randn(RANK, w, generator=generator)
        updates.append(update * (SIZE * weight.norm() / update.norm()))
    targets = [weight + update for weight, update in zip(weights, updates, strict=True)]
    # factors of all learning rates: (n, r, ...)
    A, B = [], []
    for _ in weights:
        left = torch.randn(shape.r, shape.a_out, shape.a_in, generator=generator) * scheme.std_a(shape)
        right = torch.randn(shape.r, shape.b_out, shape.b_in, generator=generator) * scheme.std_b(shape)
        A.append(left.expand(n, *left.shape).clone().requires_grad_())
        B.append(right.expand(n, *right.shape).clone().requires_grad_())
    s, rates = scheme.s(shape), torch.tensor(RATES)
    parameters = [*A, *B]
    optimizer = Adam(parameters, [rates] * len(A) + [rates * scheme.ratio] * len(B))
    history = []
    for _ in range(steps):
        x = torch.randn(tokens, w, generator=generator) @ mix
        with torch.no_grad():
            wanted = through(x, targets)
        h = x.expand(n, tokens, w)
        for i, (weight, a, b) in enumerate(zip(weights, A, B, strict=True)):
            if shape.layers == 1:
                h, wanted = s * product(h, a, b), wanted - x @ weight.T  # the frozen part cancels
            else:
                h = h @ weight.T + s * product(h, a, b)
            h = h.relu() if i < shape.layers - 1 else h
        loss = (h - wanted).square().mean((1, 2)) / wanted.square().mean()
        history.append(loss.detach())
        optimizer.step(torch.autograd.grad(loss.sum(), parameters))
    first = history[0]
    last = torch.stack(history[-max(1, steps // 10) :]).mean(0) / first
    return [value if math.isfinite(value) and value < 1e3 else math.inf for value in last.tolist()]


def through(x: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
    for i, weight in enumerate(weights):
        x = x @ weight.T
        x = x.relu() if i < len(weights) - 1 else x
    return x


def product(x: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """(sum A_i (x) B_i) x for every learning rate: x (n, tokens, in), A (n, r, a_out, a_in), B (n, r, b_out, b_in)."""
    n, tokens, _ = x.shape
    X = x.reshape(n, tokens, A.shape[-1], B.shape[-1])
    a_first = x.shape[-1] * A.shape[2] + A.shape[2] * B.shape[2] * B.shape[-1] < (
        x.shape[-1] * B.shape[2] + A.shape[2] * B.shape[2] * A.shape[-1]
    )
    if a_first:
        V = torch.einsum("nrik,ntkv->ntirv", A, X)
        Y = torch.einsum("ntirv,nruv->ntiu", V, B)
    else:
        U = torch.einsum("ntkv,nruv->ntkru", X, B)
        Y = torch.einsum("nrik,ntkru->ntiu", A, U)
    return Y.reshape(n, tokens, -1)


class Adam:
    """Adam (0.9, 0.999) on parameters whose first dimension is that of their learning rates."""

    def __init__(self, parameters: list[torch.Tensor], rates: list[torch.Tensor]) -> None:
        self.parameters, self.rates, self.t = parameters, rates, 0
        self.m = [torch.zeros_like(p) for p in parameters]
        self.v = [torch.zeros_like(p) for p in parameters]

    @torch.no_grad()
    def step(self, gradients: tuple[torch.Tensor, ...]) -> None:
        self.t += 1
        for p, g, m, v, rates in zip(self.parameters, gradients, self.m, self.v, self.rates, strict=True):
            m.lerp_(g, 0.1)
            v.lerp_(g.square(), 0.001)
            update = (m / (1 - 0.9**self.t)) / ((v / (1 - 0.999**self.t)).sqrt() + 1e-8)
            p.sub_(update * rates.view(-1, *[1] * (p.ndim - 1)))


def cases(shapes: tuple[Shape, ...], schemes: list[str]) -> Iterator[tuple[Shape, str, int]]:
    """Seeds outermost: what a stopped run has is balanced."""
    for seed in SEEDS:
        for shape in shapes:
            for scheme in schemes:
                yield shape, scheme, seed


def main(argv: list[str] | None = None) -> int:
    """Run what the file does not have yet; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning_rates", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file; what is in it is not run again")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=64, help="inputs per step")
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the sweeps as well")
    parser.add_argument("--widest", type=int, default=1024, help="leave out wider layers")
    args = parser.parse_args(argv)
    settings = {"steps": args.steps, "tokens": args.tokens, "rates": list(RATES)}
    result: dict[str, Any] = {"suite": "learning rates", **settings, "environment": environment("cpu"), "rows": []}
    if args.out.exists():
        result = json.loads(args.out.read_text(encoding="utf-8"))
        if {name: result.get(name) for name in settings} != settings:
            print(f"{args.out} has other settings: {[result.get(name) for name in settings]}. Choose another --out.")
            return 1
    done = {(*row["shape"], row["scheme"], row["seed"]) for row in result["rows"]}
    shapes = tuple(shape for shape in SHAPES if shape.width <= args.widest)
    todo = [case for case in cases(shapes, args.schemes) if (*case[0], *case[1:]) not in done]
    same: dict[tuple[Any, ...], list[float]] = {}  # with r = 1, some schemes are one
    for shape, scheme, seed in tqdm(todo, leave=False):
        start = time.perf_counter()
        key = (shape, seed, *(f(shape) for f in SCHEMES[scheme][:3]), SCHEMES[scheme].ratio)
        found = same[key] = same.get(key) or losses(shape, SCHEMES[scheme], seed, args.steps, args.tokens)
        row = {"shape": list(shape), "scheme": scheme, "seed": seed}
        row["losses"] = [round(v, 5) if math.isfinite(v) else None for v in found]
        result["rows"].append(row | {"seconds": round(time.perf_counter() - start, 2)})
        save(result, args.out)
    found = curves(result, shapes)
    print(table(found))
    if args.plot:
        draw(found, args.plot)
    return 0


def save(result: dict[str, Any], path: Path) -> None:
    """Write the JSON file whole or not at all, a line for each row."""
    head = {name: value for name, value in result.items() if name != "rows"}
    rows = ",\n  ".join(json.dumps(row) for row in result["rows"])
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(f'{json.dumps(head, indent=1)[:-2]},\n "rows": [\n  {rows}\n ]\n}}\n', encoding="utf-8")
    os.replace(temporary, path)


# -- what they say -----------------------------------------------------------------------------------------------------

Curves = dict[str, dict[Shape, list[float]]]


def curves(result: dict[str, Any], shapes: tuple[Shape, ...]) -> Curves:
    """{scheme: {shape: losses, the mean of the seeds}} of the schemes that have all shapes."""
    runs: dict[str, dict[Shape, list[list[float]]]] = {}
    for row in result["rows"]:
        losses_of = [math.inf if v is None else v for v in row["losses"]]
        runs.setdefault(row["scheme"], {}).setdefault(Shape(*row["shape"]), []).append(losses_of)
    complete = {name: runs[name] for name in SCHEMES if name in runs and set(runs[name]) >= set(shapes)}
    return {
        name: {shape: [sum(c) / len(c) for c in zip(*of[shape], strict=True)] for shape in shapes}
        for name, of in complete.items()
    }


def best(losses_of: list[float]) -> float:
    """log2 of the best rate: the vertex of the parabola through the best one of the grid and its neighbours."""
    i = min(range(len(losses_of)), key=losses_of.__getitem__)
    around = losses_of[max(0, i - 1) : i + 2]
    shift = 0.0
    if len(around) == 3 and all(map(math.isfinite, around)):
        left, middle, right = around
        shift = (left - right) / (left - 2 * middle + right) / 2
    return math.log2(RATES[0]) + i + shift


def lost(losses_of: list[float]) -> list[float]:
    """Which share of what the best rate gains is lost at each rate; 1 where nothing was gained."""
    least = min(losses_of)
    return [min(1.0, (loss - least) / (1 - least)) for loss in losses_of]


def exponents(of: dict[Shape, list[float]], layers: int) -> dict[str, float]:
    """Of the width, a_out, a_in and r in the best rate, by least squares over the shapes with so many layers."""
    shapes = [shape for shape in of if shape.layers == layers]
    logs = [[1.0, *(math.log2(size) for size in shape[:4])] for shape in shapes]
    solution = torch.linalg.lstsq(
        torch.tensor(logs, dtype=torch.float64),
        torch.tensor([[best(of[shape])] for shape in shapes], dtype=torch.float64),
        driver="gelsd",
    ).solution[1:, 0]
    return dict(zip(("width", "a_out", "a_in", "r"), solution.tolist(), strict=True))


def table(found: Curves) -> str:
    """Markdown: what the best rates gain, how far they lie apart, what one rate for all loses, what they depend on."""
    lines = [
        "| scheme | gain | best rates | apart | lost at one rate: mean | worst "
        "| exponents, 1 layer: width, a_out, a_in, r | 3 layers |",
        "|---|---:|---|---:|---:|---:|---|---|",
    ]
    for name, of in found.items():
        rates = [best(losses_of) for losses_of in of.values()]
        shares = [lost(losses_of) for losses_of in of.values()]
        at = min(range(len(RATES)), key=lambda i: sum(share[i] for share in shares))
        mean, worst = sum(share[at] for share in shares) / len(shares), max(share[at] for share in shares)
        there = {shape.layers for shape in of}
        fits = [_signed(exponents(of, layers)) if layers in there else "-" for layers in (1, 3)]
        gain = 1 - sum(min(losses_of) for losses_of in of.values()) / len(of)
        lines.append(
            f"| {name} | {gain:.3f} | {2 ** min(rates):.1e} to {2 ** max(rates):.1e} "
            f"| x {2 ** (max(rates) - min(rates)):.1f} | {mean:.1%} | {worst:.1%} | {fits[0]} | {fits[1]} |"
        )
    return "\n".join(lines)


def _signed(values: dict[str, float]) -> str:
    return ", ".join(f"{value:+.2f}" for value in values.values())


DRAWN = ("alpha", "rank", "cdka", "first step", "width")


def draw(found: Curves, path: Path) -> None:
    """One panel a scheme, one line a shape: what is lost at each learning rate."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from PIL import Image

    names = [name for name in DRAWN if name in found]
    figure, axes = plt.subplots(1, len(names), figsize=(2.7 * len(names), 2.9), sharey=True, layout="constrained")
    for axis, name in zip(axes, names, strict=True):
        rates = [best(losses_of) for losses_of in found[name].values()]
        axis.axvspan(2 ** min(rates), 2 ** max(rates), color="0.92")
        for shape, losses_of in found[name].items():
            colour = "tab:orange" if shape.layers > 1 else "tab:red" if shape.r > 1 else "tab:blue"
            axis.plot(RATES, [100 * share for share in lost(losses_of)], color=colour, linewidth=0.8, alpha=0.8)
        axis.set_xscale("log", base=2)
        axis.set_ylim(0, 30)
        axis.set_title(f"{name}: x {2 ** (max(rates) - min(rates)):.1f}", fontsize=10)
        axis.set_xlabel("learning rate")
    axes[0].set_ylabel("% of the gain that is lost")
    for colour, label in (("tab:blue", "1 layer, r = 1"), ("tab:red", "r = 4, 16"), ("tab:orange", "3 layers")):
        axes[0].plot([], [], color=colour, label=label)
    axes[0].legend(fontsize=7, loc="upper left")
    figure.savefig(path, dpi=90)
    with Image.open(path) as picture:  # a quarter of the size
        picture.convert("P", palette=Image.Palette.ADAPTIVE, colors=48).save(path, optimize=True)


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""Which trainings the study consists of.  Nothing here runs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import product

# Settings may be chosen on these, and are reported on the others.
CHOOSING = ("robot", "teapot", "guitar", "mushroom", "boot", "dog", "owl")
REPORTED = ("unicorn", "duck", "teddy_bear", "snowman", "ghost", "backpack", "potted_plant", "cupcake")

# Flags of examples/dreambooth_kron.py.  On the widths of the shipped pipeline's attention, 128 and 192, LoRA of rank 1
# has about as many parameters as KronA (64, 4), and LoKr's default factors make both of its matrices full.
METHODS = {
    "krona 64,4": ("--adapter_type", "krona", "--krona_a_out", "64", "--krona_a_in", "4"),
    "krona 64,8": ("--adapter_type", "krona", "--krona_a_out", "64", "--krona_a_in", "8"),
    "lora r=1": ("--adapter_type", "lora", "--rank", "1"),
    "lora r=4": ("--adapter_type", "lora", "--rank", "4"),
    "lokr": ("--adapter_type", "lokr"),
}
RATES = tuple(round(4e-4 * 10 ** (2.5 * i / 6), 6) for i in range(7))  # 2.5 decades
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Sizes:
    """How much each training gets, and how many pictures are judged."""

    steps: int = 120
    batch: int = 8
    sampler_steps: int = 30
    backgrounds: int = 7  # of those that no instance picture has
    unrelated: int = 20  # prompts that the adapter should leave alone


QUICK = Sizes(steps=2, batch=1, sampler_steps=2, backgrounds=1, unrelated=1)


@dataclass(frozen=True)
class Run:
    """One training and what is judged of it."""

    experiment: str
    method: str
    flags: tuple[str, ...]
    learning_rate: float
    seed: int
    subject: str
    sizes: Sizes

    def key(self, pipeline: str) -> str:
        """What tells this run from any other one; `pipeline` is the fingerprint of the base model."""
        fields = {k: v for k, v in asdict(self).items() if k not in ("sizes", "flags")}
        sizes = asdict(self.sizes)
        return "; ".join(
            f"{k}={v}" for k, v in {**fields, "flags": " ".join(self.flags), **sizes, "base": pipeline}.items()
        )


def stability(sizes: Sizes) -> list[Run]:
    """Which share of 2.5 decades of learning rates serves each method.  Seeds outermost: a part of it is balanced."""
    return [
        Run("stability", method, flags, rate, seed, subject, sizes)
        for seed, subject, rate, (method, flags) in product(SEEDS, REPORTED, RATES, METHODS.items())
    ]


def parameters(sizes: Sizes, rate: float = 1.5e-2) -> list[Run]:
    """KronA from a tenth of LoRA r=4's parameters to twice as many, against LoRA's ranks."""
    shapes = [
        (64, 4, 1),
        (32, 4, 1),
        (16, 4, 1),
        (64, 8, 1),
        (64, 16, 1),
        (64, 4, 2),
        (64, 4, 4),
        (16, 16, 1),
        (4, 4, 1),
    ]
    methods = {
        f"krona {o},{i} r={r}": (*METHODS["krona 64,4"][:2], *f"--krona_a_out {o} --krona_a_in {i} --rank {r}".split())
        for o, i, r in shapes
    } | {f"lora r={r}": ("--adapter_type", "lora", "--rank", str(r)) for r in (1, 2, 4, 8)}
    return [
        Run("parameters", method, flags, rate, seed, subject, sizes)
        for seed, subject, (method, flags) in product(SEEDS, REPORTED, methods.items())
    ]


def factors(sizes: Sizes, rate: float = 1.5e-2) -> list[Run]:
    """Pairs of factors at about equal parameters, large left or large right, and the two layouts."""
    pairs = [(64, 4), (4, 64), (32, 4), (4, 32), (16, 16), (8, 32), (32, 8), (2, 64), (64, 2)]
    methods = {
        f"krona {o},{i}": ("--adapter_type", "krona", "--krona_a_out", str(o), "--krona_a_in", str(i)) for o, i in pairs
    }
    methods["krona 64,4 diffusekrona"] = (*METHODS["krona 64,4"], "--layout", "diffusekrona")
    return [
        Run("factors", method, flags, rate, seed, subject, sizes)
        for seed, subject, (method, flags) in product(SEEDS, REPORTED, methods.items())
    ]


def quick() -> list[Run]:
    """Does everything run?  Two subjects, as an interval needs; the numbers say nothing."""
    return [
        Run("stability", method, METHODS[method], 1e-2, 0, subject, QUICK)
        for subject, method in product(REPORTED[:2], ("krona 64,4", "lora r=1"))
    ]


EXPERIMENTS = {"stability": stability, "parameters": parameters, "factors": factors}

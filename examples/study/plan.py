# SPDX-License-Identifier: Apache-2.0
"""Which trainings the study consists of, and in which order.  Nothing here runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import product

# Settings may be chosen on these, and are reported on the others.
CHOOSING = ("robot", "teapot", "guitar", "mushroom", "boot", "dog", "owl")
REPORTED = ("unicorn", "duck", "teddy_bear", "snowman", "ghost", "backpack", "potted_plant", "cupcake")
SEEDS = (0, 1, 2)

# Flags of examples/dreambooth_kron.py, and the parameters on the layers that the demo adapts (demo.TARGETS).  LoRA's
# smallest rank and LoKr's default, both of whose matrices are full here, have as many as KronA (64, 8), and a sixth
# more than (64, 4).  LoKr of factor 2 has as many as LoRA r=4.
METHODS = {
    "krona 64,4": ("--adapter_type", "krona", "--krona_a_out", "64", "--krona_a_in", "4"),  # 66,992
    "krona 64,8": ("--adapter_type", "krona", "--krona_a_out", "64", "--krona_a_in", "8"),  # 77,272
    "lora r=1": ("--adapter_type", "lora", "--rank", "1"),  # 77,952
    "lora r=4": ("--adapter_type", "lora", "--rank", "4"),  # 311,808
    "lokr": ("--adapter_type", "lokr", "--rank", "8"),  # 78,448; 8 is PEFT's default
    "lokr f=2": ("--adapter_type", "lokr", "--rank", "8", "--lokr_factor", "2"),  # 312,264
}
STEP = 10 ** (2.5 / 6)  # between neighbouring rates: seven of them are 2.5 decades
# The middle of each method's seven rates, as a step of `rate`, stated before any reported subject was trained: about
# the best of the experiment "choosing" on its first subject, with attention alone adapted.  One exception: LoRA r=4 and
# LoKr went a step down after the first reported subject, on which their highest rate ended in a loss that is no number.
CENTRES = {"krona 64,4": 0, "krona 64,8": 0, "lora r=1": -1, "lora r=4": -1, "lokr": 0, "lokr f=2": 0}


def rate(step: int) -> float:
    """Learning rates are 1e-2 times a power of `STEP`, so that those of two methods can be the same."""
    return float(f"{1e-2 * STEP**step:.4g}")


def rates_of(method: str) -> tuple[float, ...]:
    return tuple(rate(CENTRES[method] + step) for step in range(-3, 4))


ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")  # what the paper adapts
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")
CONVOLUTIONS = ("proj_in", "proj_out", "conv1", "conv2", "conv_shortcut")
# What is adapted, all that the demo adapts, and how; the rest is as the demo has it.
TRAINING = (
    *("--target_modules", *ATTENTION, *FEED_FORWARD, *CONVOLUTIONS),
    *("--lr_scheduler", "cosine", "--repeats", "8", "--mixed_precision", "bf16"),
)


@dataclass(frozen=True)
class Sizes:
    """How much each training gets, and how many pictures are judged."""

    steps: int = 50
    batch: int = 8
    sampler_steps: int = 10
    backgrounds: int = 7  # of those that no instance picture has
    each: int = 2  # pictures of each background
    unrelated: int = 6  # prompts that the adapter should leave alone


DEMO = Sizes(steps=400, each=4)  # as `make demo`, which draws in 30 sampling steps
DEMO_RATE = 7e-3  # that of examples/dreambooth/demo.py, chosen on CHOOSING
DEMO_DECAY = 1.0  # the demo's weight decay, chosen on CHOOSING too; the other experiments have 1e-2, as the paper
QUICK = Sizes(steps=2, batch=1, sampler_steps=2, backgrounds=1, each=1, unrelated=1)


@dataclass(frozen=True)
class Run:
    """One training and what is judged of it."""

    method: str  # its name in a report
    flags: tuple[str, ...]
    learning_rate: float
    seed: int
    subject: str
    sizes: Sizes = Sizes()
    images: int = 5  # instance pictures that it gets

    def key(self, pipeline: str) -> str:
        """What tells this run from any other one; `pipeline` is the fingerprint of the base model.  Experiments share
        the runs that are the same but for a name."""
        fields = {k: v for k, v in asdict(self).items() if k not in ("sizes", "flags", "method")}
        fields = {"flags": " ".join((*self.flags, *TRAINING)), **fields, **asdict(self.sizes), "base": pipeline}
        return "; ".join(f"{k}={v}" for k, v in fields.items())


def krona(a_out: int, a_in: int, r: int = 1) -> tuple[str, ...]:
    terms = ("--rank", str(r)) if r > 1 else ()
    return ("--adapter_type", "krona", "--krona_a_out", str(a_out), "--krona_a_in", str(a_in), *terms)


def turned(part: str) -> tuple[str, ...]:
    """KronA (64, 4), but (4, 64) on one of the projections q, k, v, o."""
    return (*krona(64, 4), f"--krona_unet_{part}_a_out", "4", f"--krona_unet_{part}_a_in", "64")


def stability() -> list[Run]:
    """Which share of 2.5 decades of learning rates serves each method."""
    return [
        Run(method, flags, lr, seed, subject)
        for seed, subject, (method, flags) in product(SEEDS, REPORTED, METHODS.items())
        for lr in rates_of(method)
    ]


def choosing() -> list[Run]:
    """Where the rates of each method lie, on other subjects than the reported ones."""
    return [
        Run(method, flags, rate(step), 0, subject)
        for subject, step, (method, flags) in product(("robot", "owl", "mushroom"), (0, -1, 1, -2, 2), METHODS.items())
    ]


# Beside those of METHODS.  KronA with one term takes the rate of (64, 4), and 1 / sqrt(r) of it with r terms: both were
# found in regressions and on an earlier pipeline (docs/math.md).  Others take the geometric mean of two methods' rates.
SHAPES = {f"krona {o},{i}": krona(o, i) for o, i in ((32, 4), (16, 4), (4, 4), (64, 16))}
SHAPES |= {"krona 64,4 r=2": krona(64, 4, 2), "krona 64,4 r=4": krona(64, 4, 4)}
OTHERS = {
    "lora r=2": (("--adapter_type", "lora", "--rank", "2"), ("lora r=1", "lora r=4")),
    "lora r=8": (("--adapter_type", "lora", "--rank", "8"), ("lora r=4", "lora r=4")),
    "lokr f=4": (("--adapter_type", "lokr", "--rank", "8", "--lokr_factor", "4"), ("lokr", "lokr f=2")),
}
FACTORS = {f"krona {o},{i}": krona(o, i) for o, i in ((64, 4), (4, 64), (32, 8), (8, 32), (16, 16))}
FACTORS |= {f"krona 64,4; {part} 4,64": turned(part) for part in "qkvo"}
FACTORS |= {"krona 64,4 diffusekrona": (*krona(64, 4), "--layout", "diffusekrona")}
FACTORS |= {"krona 64,16": krona(64, 16), "krona 64,4 r=2": krona(64, 4, 2)}  # 126,188 and 133,984 parameters
LAYERS = {
    f"{name}, {where}": (*METHODS[name], *flags)
    for name in ("krona 64,4", "lora r=4")
    for where, flags in {
        "attention": ("--target_modules", *ATTENTION),
        "attention and feed-forward": ("--target_modules", *ATTENTION, *FEED_FORWARD),
        "all layers": (),
    }.items()
}


def terms(flags: tuple[str, ...]) -> int:
    return int(flags[flags.index("--rank") + 1]) if "--rank" in flags and flags[1] == "krona" else 1


def at(rates: Mapping[str, float], flags: tuple[str, ...], between: tuple[str, str] = ("krona 64,4",) * 2) -> float:
    """The rate of a method that has no curve of its own, from those that have."""
    one, other = (rates[name] for name in between)
    return float(f"{(one * other / terms(flags)) ** 0.5 if one != other else one * terms(flags) ** -0.5:.4g}")


def parameters(rates: Mapping[str, float]) -> list[Run]:
    """Quality by parameters, KronA, LoRA and LoKr.  On this pipeline KronA and LoRA both begin at a quarter of LoRA
    r=4's parameters; fewer are not to be had."""
    methods = {name: (flags, rates[name]) for name, flags in METHODS.items()}
    methods |= {name: (flags, at(rates, flags)) for name, flags in SHAPES.items()}
    methods |= {name: (flags, at(rates, flags, between)) for name, (flags, between) in OTHERS.items()}
    return [
        Run(name, flags, lr, seed, subject)
        for seed, subject, (name, (flags, lr)) in product(SEEDS, REPORTED, methods.items())
    ]


def factors(rates: Mapping[str, float]) -> list[Run]:
    """Large left or large right, in all projections or one; the two layouts; two terms for one."""
    return [
        Run(name, flags, at(rates, flags), seed, subject)
        for seed, subject, (name, flags) in product(SEEDS, REPORTED, FACTORS.items())
    ]


def one_image(rates: Mapping[str, float]) -> list[Run]:
    """One instance picture in place of five; the runs with five are those of "stability"."""
    methods = ("krona 64,4", "lora r=1", "lora r=4", "lokr")
    return [
        Run(f"{name}, {images} image{'s' * (images > 1)}", METHODS[name], rates[name], seed, subject, images=images)
        for seed, subject, name, images in product(SEEDS, REPORTED, methods, (1, 5))
    ]


def layers(rates: Mapping[str, float]) -> list[Run]:
    """Which layers are adapted: attention, as the paper has it, with the feed-forward layers, or convolutions too."""
    return [
        Run(name, flags, rates[name.partition(", ")[0]], seed, subject)
        for seed, subject, (name, flags) in product(SEEDS, REPORTED, LAYERS.items())
    ]


DECAYED = (*METHODS["krona 64,4"], "--adam_weight_decay", str(DEMO_DECAY))


def default() -> list[Run]:
    """What `make demo` does, on all subjects."""
    return [
        Run("krona 64,4", DECAYED, DEMO_RATE, seed, subject, DEMO)
        for seed, subject in product(SEEDS, (*CHOOSING, *REPORTED))
    ]


def decay() -> list[Run]:
    """The same with the usual weight decay, and with the demo's."""
    return [
        Run(f"krona 64,4, decay {number:g}", flags, DEMO_RATE, seed, subject, DEMO)
        for seed, subject in product(SEEDS, REPORTED)
        for number, flags in ((DEMO_DECAY, DECAYED), (1e-2, METHODS["krona 64,4"]))
    ]


# their rates are stated in this file
FREE = {"choosing": choosing, "default": default, "decay": decay, "stability": stability}
# theirs follow from "stability"
TUNED = {"one_image": one_image, "layers": layers, "factors": factors, "parameters": parameters}
EXPERIMENTS = (*FREE, *TUNED)
USUAL = ("default", "decay", "stability", *TUNED)
STATED = {method: rate(centre) for method, centre in CENTRES.items()}


def planned(experiment: str, rates: Mapping[str, float] = STATED) -> list[Run]:
    """The runs of one experiment; `rates`: each method's of METHODS, for those that need them."""
    return FREE[experiment]() if experiment in FREE else TUNED[experiment](rates)


def ordered(runs: Mapping[str, list[Run]]) -> list[tuple[str, Run]]:
    """All runs, so that any first part of them is a fair study: seeds outermost; of a seed "stability" first, because
    the others take their rates from it, then subject by subject, all experiments of it."""
    places = {subject: i for i, subject in enumerate((*CHOOSING, *REPORTED))}
    found = [(name, run) for name, some in runs.items() for run in some]
    return sorted(found, key=lambda x: (x[1].seed, x[0] not in FREE, places[x[1].subject]))


def quick() -> dict[str, list[Run]]:
    """Does every experiment run?  Two subjects, as an interval needs; the numbers say nothing."""
    two = REPORTED[:2]
    wanted = {
        "default": {"krona 64,4": (DECAYED, (DEMO_RATE,))},
        "decay": {"krona 64,4, decay 0.01": (METHODS["krona 64,4"], (DEMO_RATE,))},
        "stability": {"krona 64,4": (METHODS["krona 64,4"], (1e-3, 1e-2)), "lora r=1": (METHODS["lora r=1"], (1e-2,))},
        "parameters": {"lokr f=4": (OTHERS["lokr f=4"][0], (1e-2,))},
        "factors": {"krona 64,4; q 4,64": (FACTORS["krona 64,4; q 4,64"], (1e-2,))},
        "layers": {"krona 64,4, attention": (LAYERS["krona 64,4, attention"], (1e-2,))},
        "one_image": {"krona 64,4, 1 image": (METHODS["krona 64,4"], (1e-2,))},
    }
    return {
        experiment: [
            replace(Run(name, flags, lr, 0, subject, QUICK), images=1 if experiment == "one_image" else 5)
            for subject, (name, (flags, rates)) in product(two, methods.items())
            for lr in rates
        ]
        for experiment, methods in wanted.items()
    }

# SPDX-License-Identifier: Apache-2.0
"""Claims, each with the number that decides about it and the bounds that it has to keep, stated before anything ran."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import Any

HOLDS, FAILS, OPEN, NOT_RUN = "holds here", "does not hold here", "can't be told", "not run"
ENOUGH = 5  # subjects: with fewer, nothing is said


@dataclass(frozen=True)
class Claim:
    """`number`: the path of an interval in the study's summary; it holds where the whole interval is between `low` and
    `high`, and does not where the whole interval is outside."""

    claim: str
    source: str
    number: str
    measured: str
    low: float = 0.0
    high: float = inf

    def verdict(self, interval: Mapping[str, float] | None) -> str:
        if interval is None:
            return NOT_RUN
        if interval["subjects"] < ENOUGH:
            return OPEN
        if self.low < interval["low"] and interval["high"] < self.high:
            return HOLDS
        return FAILS if interval["high"] < self.low or interval["low"] > self.high else OPEN


PAIR = "stability/paired/{}/{}"
CLAIMS = (
    Claim(
        "KronA is stabler than LoRA: it serves over a wider range of learning rates", "paper",
        "stability/wider/rates/lora r=4", "decades of rates within 5 points of the best, KronA (64, 4) minus LoRA r=4",
    ),
    Claim(
        "the same, LoRA with as many parameters", "paper", "stability/wider/rates/lora r=1",
        "as above, minus LoRA r=1",
    ),
    Claim(
        "the same, measured on what the updates are and not on the rate that they were made with", "paper",
        "stability/wider/norms/lora r=4", "decades of the norm of dW, KronA (64, 4) minus LoRA r=4",
    ),
    Claim(
        "KronA's best learning rate is five times LoRA's", "paper (5e-4 and 1e-4)", "stability/rates/lora r=4",
        "ratio of the best rates, LoRA r=4; bounds 2.5 and 10", 2.5, 10,
    ),
    Claim(
        "better subject fidelity than LoRA r=4 (CLIP-I, DINO)", "paper, tables 3 and 4",
        PAIR.format("lora r=4", "similarity"), "similarity by EfficientNet-Lite0, KronA (64, 4) minus LoRA r=4",
    ),
    Claim(
        "better text alignment than LoRA r=4 (CLIP-T)", "paper, tables 3 and 4",
        PAIR.format("lora r=4", "alignment"), "our judge's cosine with the prompt, KronA (64, 4) minus LoRA r=4",
    ),
    Claim(
        "as good as LoRA r=4 with a third fewer parameters (here 79 % fewer)", "paper; README",
        PAIR.format("lora r=4", "both_right"), "right subject on the right background, minus LoRA r=4; bound -0.05",
        -0.05,
    ),
    Claim(
        "better than LoRA at equal parameters", "README, as a question", PAIR.format("lora r=1", "both_right"),
        "right subject on the right background, KronA (64, 4) minus LoRA r=1, which has 16 % more",
    ),
    Claim(
        "better than LoKr", "paper, tables 7 and 8", PAIR.format("lokr", "both_right"),
        "right subject on the right background, KronA (64, 4) minus LoKr, which has 17 % more",
    ),
    Claim(
        "(64, 4) has better fidelity than (64, 8)", "paper, table 7", PAIR.format("krona 64,8", "similarity"),
        "similarity by EfficientNet-Lite0, (64, 4) minus (64, 8)",
    ),
    Claim(
        "the large factor belongs to the output side: (64, 4), not (4, 64)", "paper",
        "factors/paired/krona 4,64/both_right", "right subject on the right background, (64, 4) minus (4, 64)",
    ),
    Claim(
        "small factors fail the prompt", "paper (both at most 8)", "parameters/paired/krona 4,4/both_right",
        "right subject on the right background, (64, 4) minus (4, 4)",
    ),
    Claim(
        "a rate above the best ignores the text", "paper (above twice the best)",
        "stability/beside/higher/background_right",
        "right background, KronA (64, 4) at its best rate minus at 2.6 times it",
    ),
    Claim(
        "a rate below the best ignores the subject", "paper (below a fifth of the best)",
        "stability/beside/lower/subject_right", "right subject, KronA (64, 4) at its best rate minus at 1/2.6 of it",
    ),
    Claim(
        "long prompts are followed better than by LoRA", "paper", PAIR.format("lora r=4", "long_right"),
        "both right in four long prompts, KronA (64, 4) minus LoRA r=4",
    ),
    Claim(
        "one picture is enough to learn from", "paper", "one_image/fewer/krona 64,4/both_right",
        "right subject on the right background, one instance picture minus five; bound -0.1", -0.1,
    ),
    Claim(
        "one picture serves KronA better than LoRA", "paper", "one_image/paired/lora r=4, 1 image/both_right",
        "one instance picture, KronA (64, 4) minus LoRA r=4",
    ),
    Claim(
        "training takes about 5 % longer than with LoRA", "paper, table 2", "cost/ratios/lora r=4/seconds_update",
        "ratio of the CPU time of an update, KronA (64, 4) to LoRA r=4; bounds 1 and 1.1", 1.0, 1.1,
    ),
    Claim(
        "merged, an adapter costs nothing", "README", "cost/merged/krona 64,4",
        "ratio of the CPU times of a forward pass, merged to the plain base model; bounds 0.95 and 1.05", 0.95, 1.05,
    ),
    Claim(
        "the layout of the released code learns as well as the plain product", "README, docs/settings.md",
        "factors/paired/krona 64,4 diffusekrona/both_right", "plain minus released layout; bounds -0.1 and 0.1",
        -0.1, 0.1,
    ),
    Claim(
        "several terms serve better than one at equal parameters", "CDKA", "factors/terms/both_right",
        "(64, 4) with two terms, 133,984 parameters, minus (64, 16) with one, 126,188",
    ),
    Claim(
        "a weight decay of 1 in place of 1e-2 keeps other things more as they are (the demo's recipe)", "README",
        "decay/paired/krona 64,4, decay 0.01/drift", "drift, decay 1 minus 1e-2; bound below 0", -inf, 0.0,
    ),
    Claim(
        "and takes nothing from the subject", "README", "decay/paired/krona 64,4, decay 0.01/both_right",
        "right subject on the right background, decay 1 minus 1e-2; bound -0.05", -0.05,
    ),
    Claim(
        "adapting the feed-forward layers beside attention gains nothing", "paper", "layers/feed_forward/both_right",
        "both right, with feed-forward layers minus attention alone; bound 0.05", -inf, 0.05,
    ),
    Claim(
        "more than attention has to be adapted (the demo's recipe)", "README",
        "layers/paired/krona 64,4, attention/both_right", "both right, all layers minus attention alone",
    ),
)  # fmt: skip


def at(summary: Mapping[str, Any], path: str) -> Any:
    """What lies at a path of a summary; None where there is nothing."""
    found: Any = summary
    for part in path.split("/"):
        if not isinstance(found, Mapping) or part not in found:
            return None
        found = found[part]
    return found


def decided(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row a claim."""
    rows = []
    for claim in CLAIMS:
        interval = at(summary, claim.number)
        rows.append(
            {"claim": claim.claim, "source": claim.source, "measured": claim.measured, "interval": interval,
             "verdict": claim.verdict(interval)}
        )  # fmt: skip
    return rows

# SPDX-License-Identifier: Apache-2.0
"""The study's statistics against computations that share no code with them, and what its report makes of them."""

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")

from examples.measure.intervals import interval
from examples.study import claims, plan, plots, report, rules, statistics, summary, tables
from tests.test_study import KRONA, curve_of, record

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("y", "expected"),
    [
        ([0.0, 0.5, 0.9, 0.5, 0.0], (2 - 0.05 / 0.4, 2 + 0.05 / 0.4, False)),
        ([0.9, 0.9, 0.87, 0.8, 0.0], (0, 2 + 0.02 / 0.07, True)),  # the low end was not reached
        ([0.0, 0.9, 0.86, 0.88, 0.86], (1 - 0.05 / 0.9, 4, True)),
        ([0.9, 0.5, 0.9, 0.5, 0.9], (0, 0.125, True)),  # the unbroken part about the first best
        ([0.3], (0, 0, True)),
    ],
)
def test_span(y, expected):
    found = statistics.span(np.arange(len(y), dtype=float), np.array(y))
    assert found == pytest.approx(expected)
    fine = np.linspace(0, len(y) - 1, 100_001)  # by brute force
    above = np.interp(fine, np.arange(len(y)), y) >= max(y) - statistics.WITHIN
    best = int(np.argmin(np.abs(fine - int(np.argmax(y)))))
    low = best - int(np.argmin(above[: best + 1][::-1])) + 1 if not above[: best + 1].all() else 0
    high = best + int(np.argmin(above[best:])) - 1 if not above[best:].all() else len(fine) - 1
    assert (found.low, found.high) == pytest.approx((fine[low], fine[high]), abs=2e-4)


def test_widths_resample_subjects():
    """Two subjects: each resampled curve is one of three, whose widths are known."""
    curve = statistics.Curve(
        np.array([1.0, 10.0, 100.0]), np.array([2.0, 20.0, 2000.0]), ("a", "b"),
        np.array([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0]]), np.zeros(3), 1,
    )  # fmt: skip
    found = statistics.widths({"m": curve}, "rates")["m"]
    own, a, b = 0.1 + 0.05, 1.05, 0.05 + 0.05
    assert found[0] == pytest.approx(own)
    counts = {w: int(np.isclose(found[1:], w).sum()) for w in (own, a, b)}
    assert sum(counts.values()) == statistics.RESAMPLES
    assert counts[own] == pytest.approx(statistics.RESAMPLES / 2, rel=0.1)  # binomial, 4 standard deviations
    at = statistics.percentiles(found, 2)
    assert at == pytest.approx((own, b, a, 2))
    norms = statistics.widths({"m": curve}, "norms")["m"]
    assert norms[0] == pytest.approx(0.1 + 0.05 * 2)  # two decades from the second to the third


def test_dropped_rates_keep_their_distance():
    nan = float("nan")
    curve = statistics.Curve(
        np.array([1.0, 10.0, 100.0]), np.ones(3), ("a", "b"), np.array([[nan, 0.9, 0.9], [nan, 0.7, 0.7]]),
        np.array([0.4, 0.0, 0.0]), 1,
    )  # fmt: skip
    assert curve.mean().tolist() == pytest.approx([0.4, 0.8, 0.8])
    assert curve.mean(np.array([0, 0])).tolist() == pytest.approx([0.5, 0.9, 0.9])


def test_a_subject_has_no_say_in_the_rate_it_is_judged_at():
    quality = {1.0: {"a": 1.0, "b": 0.4, "c": 0.4}, 2.0: {"a": 0.0, "b": 0.5, "c": 0.5}}
    assert statistics.left_out(quality) == {"a": 2.0, "b": 1.0, "c": 1.0}


def test_balanced():
    def some(*pairs):
        return [{"subject": s, "seed": k, "x": v} for s, k, v in pairs]

    cells = {("m", 1.0): some(("a", 0, 1), ("a", 1, 3), ("b", 0, 5)), ("n", 1.0): some(("a", 0, 1), ("a", 1, 1))}
    pairs = statistics.balanced(cells)
    assert pairs == {("a", 0), ("a", 1)}
    assert statistics.by_subject(cells["m", 1.0], pairs, "x") == {"a": 2.0}
    assert statistics.balanced(cells | {("o", 1.0): []}) == set()


def study(shares: dict[str, list[float]], shift=None, few=None) -> dict:
    """A study of stability alone, made up; `shift`: {subject: of all its shares}; `few`: methods with one subject."""
    records = {}
    for method, own in (few or {}).items():
        records |= curve_of(method, own, plan.REPORTED[:1])
    for method, own in shares.items():
        records |= curve_of(method, own, plan.REPORTED)
    for r in records.values():
        r["both_right"] += (shift or {}).get(r["subject"], 0.0)
    runs = {name: plan.planned(name) for name in plan.EXPERIMENTS}
    rates, sources = rules.best_rates(records, "base")
    return summary.summarize(runs, records, "base", {"base": "base", "rates": rates, "sources": sources})


WIDE, NARROW = [0.2, 0.6, 0.6, 0.6, 0.6, 0.6, 0.2], [0.1, 0.1, 0.2, 0.6, 0.2, 0.1, 0.1]


def test_summary():
    methods = dict.fromkeys(plan.METHODS, NARROW) | {KRONA: WIDE}
    shift = {subject: i / 40 for i, subject in enumerate(plan.REPORTED)}
    found = study(methods, shift)["stability"]
    assert found["dropped"]["lokr"] == [lr for i, lr in enumerate(plan.rates_of("lokr")) if abs(i - 3) > 1]
    step = 2.5 / 6
    width = found["widths"]["rates"][KRONA]
    assert width["mean"] == pytest.approx(4 * step + 2 * step * 0.05 / 0.4, rel=1e-4) and not width["open"]
    wider = found["wider"]["rates"]["lora r=4"]
    assert wider["mean"] == pytest.approx(width["mean"] - 2 * step * 0.05 / 0.4, rel=1e-4)
    assert wider["low"] == pytest.approx(wider["mean"], rel=1e-4)  # all subjects have the same curve, only shifted
    best = found["best"][KRONA]["both_right"]
    by_subject = {s: [0.6 + shift[s]] for s in sorted(shift)}  # the order that the bootstrap draws from
    assert (best["mean"], best["low"], best["high"]) == pytest.approx(tuple(interval(by_subject))[:3], rel=1e-5)
    assert found["paired"]["lora r=4"]["both_right"]["mean"] == pytest.approx(0, abs=1e-12)
    beside = found["beside"]
    assert beside["lower"]["both_right"]["mean"] == pytest.approx(0.4) and beside["higher"]["both_right"]["mean"] == 0
    assert found["rates"]["lora r=1"]["mean"] == pytest.approx(plan.rates_of(KRONA)[1] / plan.rates_of("lora r=1")[3])


def test_runs_that_diverged_count_as_zeros_and_are_left_out_of_what_they_have_not(tmp_path):
    """Of KronA's seven rates one has no run that ended in numbers, and one has seven of eight."""
    zeros = dict.fromkeys(("both_right", "subject_right", "background_right", "long_right"), 0.0)
    records = curve_of(KRONA, WIDE, plan.REPORTED) | curve_of("lora r=4", WIDE, plan.REPORTED)
    rates = plan.rates_of(KRONA)
    for key, r in records.items():
        if r["key"].startswith("flags=--adapter_type krona"):
            if r["learning_rate"] == rates[6] or (r["learning_rate"], r["subject"]) == (rates[3], "duck"):
                kept = {k: r[k] for k in ("key", "learning_rate", "seed", "subject", "versions", "seconds_run")}
                records[key] = kept | {"diverged": True} | zeros
    runs = {name: plan.planned(name) for name in plan.EXPERIMENTS}
    found = summary.summarize(runs, records, "base", {"base": "base", "rates": dict(plan.STATED), "sources": {}})
    rows = {r["learning_rate"]: r for r in found["stability"]["rows"] if r["method"] == KRONA}
    assert [rows[lr]["diverged"] for lr in rates] == [0, 0, 0, 1, 0, 0, 8]
    assert rows[rates[6]]["norm"] is None and rows[rates[6]]["share"] == 0.0
    assert rows[rates[3]]["share"] == pytest.approx(0.6 * 7 / 8) and rows[rates[3]]["similarity"]["subjects"] == 7
    assert rows[rates[3]]["norm"] == pytest.approx(100 * rates[3]) and rows[rates[3]]["both_right"]["subjects"] == 8
    for axis in ("rates", "norms"):
        width = found["stability"]["widths"][axis][KRONA]
        assert np.isfinite([width["mean"], width["low"], width["high"]]).all()
    assert tables.curves(found).count("diverged") == 2
    json.dumps(found, allow_nan=False)
    assert plots.write(found, tmp_path)


@pytest.mark.parametrize("diverged", [("lora r=4",), (KRONA,), tuple(plan.METHODS)])
def test_methods_of_which_every_run_diverged(tmp_path, diverged):
    runs = {name: plan.planned(name) for name in plan.EXPERIMENTS}
    records = {}
    for run in (run for some in runs.values() for run in some if run.seed == 0):
        r = record(run, 0.5)
        if run.method.startswith(diverged):
            r = {k: v for k, v in r.items() if k not in (*summary.MEASURES, *summary.COSTS, "parameters")}
            r |= dict.fromkeys(summary.SHARES, 0.0) | {"seconds_run": 1.0, "diverged": True}
        records[r["key"]] = r
    rates, sources = rules.best_rates(records, "base")
    report.write(runs, records, "base", {"base": "base", "rates": rates, "sources": sources}, tmp_path)
    found = json.loads((tmp_path / "study.json").read_text())
    assert set(found["stability"].get("best", ())) == set(plan.METHODS) - set(diverged)
    assert {r["method"] for r in found["stability"]["rows"] if r["diverged"]} == set(diverged)
    assert "NaN" not in (tmp_path / "study.json").read_text()


def test_verdicts():
    claim = claims.Claim("c", "s", "x", "m", -0.1, 0.1)

    def verdict(low, high, subjects=8):
        return claim.verdict({"low": low, "high": high, "mean": 0, "subjects": subjects})

    assert verdict(-0.05, 0.05) == claims.HOLDS
    assert verdict(-0.2, 0.05) == verdict(-0.05, 0.05, subjects=4) == claims.OPEN
    assert verdict(0.15, 0.2) == verdict(-0.3, -0.15) == claims.FAILS
    assert claim.verdict(None) == claims.NOT_RUN
    assert claims.Claim("c", "s", "x", "m").verdict({"low": 0, "high": 0, "subjects": 8}) == claims.OPEN


def test_every_claim_names_a_number_that_a_whole_study_has():
    records = {}
    runs = {name: plan.planned(name) for name in plan.EXPERIMENTS}
    for some in runs.values():
        for run in some:
            records[run.key("base")] = record(run, 0.6 if run.learning_rate in plan.STATED.values() else 0.5)
    found = summary.summarize(runs, records, "base", {"rates": plan.STATED})
    missing = [c.number for c in claims.CLAIMS if claims.at(found, c.number) is None]
    assert not missing
    assert all("not run" not in text for text in tables.sections(json.loads(json.dumps(found))).values())
    empty = summary.summarize(runs, {}, "base", {"rates": plan.STATED})
    assert {row["verdict"] for row in empty["claims"]} == {claims.NOT_RUN}
    assert "Nothing has been run" in tables.sections(empty)["state"]


def test_page_is_filled_whole_or_not_at_all(tmp_path):
    runs, docs = {"stability": plan.planned("stability")}, tmp_path / "evidence"
    names = tables.sections(summary.summarize(runs, {}, "base", {}))
    page = docs.with_suffix(".md")
    with pytest.raises(ValueError, match=r"evidence\.md does not exist"):
        report.write(runs, {}, "base", {}, tmp_path / "out", docs)
    whole = "".join(f"<!-- study: {name} -->\n<!-- end -->\n" for name in names)
    for more in ("<!-- end -->\n", "<!-- study: not-one -->\n<!-- end -->\n", "<!-- study: state -->\n"):
        page.write_text(whole + more)
        found = f"of {page.read_text().count('study: ')} marks and {page.read_text().count('end -->')} ends"
        with pytest.raises(ValueError, match=f"{found}; expected each of .* once"):
            report.write(runs, {}, "base", {}, tmp_path / "out", docs)
    page.write_text("".join(f"text\n<!-- study: {name} -->\nold\n<!-- end -->\n" for name in list(names)[1:]))
    with pytest.raises(ValueError, match=r"has the sections .*expected each of .*state.* once"):
        report.write(runs, {}, "base", {}, tmp_path / "out", docs)
    assert "old" in page.read_text() and not docs.exists() and not (tmp_path / "out").exists()
    page.write_text(page.read_text() + "<!-- study: state -->\n<!-- end -->\n")
    report.write(runs, {}, "base", {}, tmp_path / "out", docs)
    text = page.read_text()
    assert "old" not in text and text.count("text\n") == len(names) - 1 and "Nothing has been run" in text
    report.write(runs, {}, "base", {}, tmp_path / "out", docs)
    assert page.read_text() == text


def test_plots_show_dropped_rates_apart(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "save", lambda figure, path: drawn.append(figure) or path)
    plots.write(study({KRONA: NARROW}), tmp_path)
    lines = drawn[0].axes[0].lines
    assert [(line.get_marker(), len(line.get_xdata())) for line in lines[:2]] == [("o", 3), ("x", 4)]


def test_the_page_of_evidence_has_the_numbers_of_its_file():
    page = ROOT / "docs" / "evidence.md"
    found = json.loads((ROOT / "docs" / "evidence" / "study.json").read_text())
    assert report.filled(page, tables.sections(found, "evidence/")) == page.read_text()
    assert [(row["claim"], row["measured"]) for row in found["claims"]] == [
        (c.claim, c.measured) for c in claims.CLAIMS
    ]
    for claim, row in zip(claims.CLAIMS, found["claims"], strict=True):
        assert row["verdict"] == claim.verdict(claims.at(found, claim.number))


def test_a_method_that_has_not_run_takes_nothing_from_the_others():
    """Runs of some methods alone, and one more of a method whose other rates are missing."""
    some = study({KRONA: WIDE, "lora r=4": NARROW}, few={"krona 64,8": WIDE})
    whole = study(dict.fromkeys(plan.METHODS, NARROW) | {KRONA: WIDE})
    for path in ("stability/wider/rates/lora r=4", "stability/paired/lora r=4/both_right", "stability/rates/lora r=4"):
        assert claims.at(some, path) == claims.at(whole, path) is not None
    assert set(some["stability"]["best"]) == {KRONA, "lora r=4"}
    assert claims.at(some, "stability/paired/lokr/both_right") is None
    assert len(some["stability"]["rows"]) == 7 * len(plan.METHODS)
    text = tables.sections(some)
    assert "lokr" not in text["best"] and "lora r=4" in text["best"]


def test_which_subjects_the_demo_s_settings_reach():
    """80 % right subjects and 90 % right backgrounds on the mean over seeds, counted by hand."""
    shares = {"robot": [(0.7, 1.0), (0.9, 0.9)], "owl": [(0.79, 1.0), (0.79, 1.0)], "duck": [(1.0, 0.9), (1.0, 0.88)]}
    own = [
        {"subject": s, "seed": seed, "subject_right": a, "background_right": b, "similarity": 0.5, "drift": 0.1}
        for s, some in shares.items()
        for seed, (a, b) in enumerate(some)
    ]
    found = summary.default(own)
    assert found["reached"] == ["robot"] and found["reached_of_the_reported"] == [] and found["seeds"] == 2
    assert found["subjects"]["duck"] == {
        "subject_right": 1.0, "background_right": 0.89, "similarity": 0.5, "drift": 0.1,
    }  # fmt: skip
    assert found["means"]["all"]["subject_right"]["mean"] == pytest.approx((0.8 + 0.79 + 1.0) / 3, rel=1e-5)
    text = tables.default({"default": found})
    assert "**1 of 3 subjects**" in text and "0 of 1. 2 seeds." in text and "| robot | chosen on | 80% | 95% |" in text

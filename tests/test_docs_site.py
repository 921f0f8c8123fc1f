# SPDX-License-Identifier: Apache-2.0
"""The docs site: it builds strictly, the code of its pages runs, and the messages that it explains are the code's."""

import os
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch
from peft import get_peft_model
from safetensors import safe_open
from torch import nn

from peft_krona import KronAConfig
from peft_krona.__main__ import main
from peft_krona.convert import read_adapter

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [DOCS / "index.md", DOCS / "from_lora.md", DOCS / "settings.md", *sorted((DOCS / "how_to").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    lines = [line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True) for line in lines]


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.stem)
def test_python_of_a_page_runs(page, tmp_path, monkeypatch):
    """All blocks of the page in turn, as one program."""
    code = "\n".join(blocks(page, "python"))
    if "from diffusers import BitsAndBytesConfig" in code and not torch.cuda.is_available():
        pytest.skip("diffusers loads 4-bit models on a GPU only")
    if "from trl import" in code and find_spec("trl") is None:
        pytest.skip("needs trl: pip install trl")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    names, announced = {"__name__": "__main__"}, []
    if "from deepspeed" in code:  # which is not installed for the tests: the loop over a model that is there
        zero = ModuleType("deepspeed.runtime.zero")
        zero.register_external_parameter = lambda module, parameter: announced.append(parameter)
        monkeypatch.setitem(sys.modules, "deepspeed.runtime.zero", zero)
        names["model"] = model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), KronAConfig(target_modules=["0"]))
    exec(compile(code, str(page), "exec"), names)
    if "from deepspeed" in code:
        assert [id(p) for p in announced] == [id(p) for p in model.parameters() if p.requires_grad]


DIFFS = [d for d in blocks(DOCS / "from_lora.md", "diff") if "\n...\n" not in d]


@pytest.mark.parametrize("side", ["-", "+"], ids=["LoRA", "KronA"])
@pytest.mark.parametrize("diff", DIFFS, ids=["script", "program"])
def test_both_sides_of_a_diff_run(diff, side, tmp_path, monkeypatch):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    lines = diff.splitlines()
    assert {line[:1] for line in lines} == {" ", "-", "+"}, "a line of a diff starts with a space, - or +"
    code = "\n".join(line[1:] for line in lines if line[0] in (" ", side))
    assert ("LoraConfig(" in code) == (side == "-") and ("KronAConfig(" in code) == (side == "+")
    exec(compile(code, "from_lora.md", "exec"), {"__name__": "__main__"})
    assert list(tmp_path.glob("output/*/*.safetensors"))
    if side == "+" and "diffusers" in code:  # and on to ComfyUI, as the page's table says
        file, base = tmp_path / "comfy.safetensors", "examples/assets/emoji-sd"
        assert main(["convert", "output/my-adapter", str(file), "--to", "auto", "--base", base]) == 0
        with safe_open(file, "pt") as written:
            assert all(key.startswith("lora_unet_") for key in written.keys())
        assert len(read_adapter(file)) == 56


def test_the_counts_of_from_lora_are_the_models_():
    """The page is what the script writes; the script counts what PEFT does."""
    from peft import LoKrConfig, LoraConfig, get_peft_model

    from docs import counts
    from peft_krona import KronAConfig, suggest_factors

    page = counts.PAGE.read_text(encoding="utf-8")
    assert counts.in_page(page) == page, "run: python docs/counts.py"
    assert [counts.krona("SDXL", 64, 4), counts.lora("SDXL", 4)] == [3_874_560, 5_806_080]  # DiffuseKronA's
    for models, rows in ((counts.NARROW_MODELS, counts.NARROW), (counts.WIDE_MODELS, counts.WIDE)):
        for name in models:
            assert all(counts.krona(name, *setting) < counts.lora(name, rank) for rank, setting in rows.items())
    plan = suggest_factors(counts.build("SD1.5"), "1M")
    assert counts.rate("SD1.5") / plan.chosen.r**0.25 == pytest.approx(plan.learning_rate, rel=1e-12)
    for name in ("SD1.5", "klein 4B"):
        targets = counts.default_target_modules(counts.build(name))
        for config, wanted in (
            (KronAConfig(a_out=8, a_in=8), counts.krona(name, 8, 8)),
            (LoraConfig(r=8, target_modules=targets), counts.lora(name, 8)),
            (LoKrConfig(r=16, decompose_factor=-1, target_modules=targets), counts.lokr(name, -1, 16)),
        ):
            model = get_peft_model(counts.build(name), config, low_cpu_mem_usage=True)
            assert sum(p.numel() for p in model.parameters() if p.requires_grad) == wanted, (name, config)
            model.unload()


def test_commands_run(tmp_path, monkeypatch):
    """`python -m peft_krona` of every page, on an adapter where they expect one."""
    from diffusers import StableDiffusionPipeline

    from peft_krona.pipelines import add_krona, save_krona_weights

    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    pipe = StableDiffusionPipeline.from_pretrained("examples/assets/emoji-sd")
    add_krona(pipe)
    save_krona_weights(pipe, "output/my-adapter")
    found = [c[3:] for page in PAGES for c in commands(page) if c[:3] == ["python", "-m", "peft_krona"]]
    assert len(found) == 5
    for arguments in found:
        assert main(arguments) == 0, arguments


def test_training_commands_parse(monkeypatch):
    from examples.dreambooth.arguments import parse_args

    found = [c for page in PAGES for c in commands(page) if c[:2] == ["accelerate", "launch"]]
    assert len(found) == 8
    for command in found:
        start = command.index("examples/dreambooth_kron.py") + 1
        assert parse_args(command[start:]).instance_data_dir == "my-dog"


def test_messages_of_the_troubleshooting_page_are_the_code_s():
    sources = [*(ROOT / "src").rglob("*.py"), *(ROOT / "examples").rglob("*.py")]
    # string literals on neighbouring lines are one message
    code = re.sub(r'"\s*\n\s*f?"', "", "\n".join(p.read_text(encoding="utf-8") for p in sources))
    quoted = re.findall(r'^\| "([^"]+)"', (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(quoted) >= 45
    plain = re.sub(r"\{[^{}]*\}", "{}", code)
    missing = [q for q in quoted if q not in code and q not in plain and q != "The loss is nan"]
    assert not missing


@pytest.mark.skipif(find_spec("mkdocs") is None, reason="needs mkdocs: pip install -e '.[docs]'")
def test_the_site_builds_strictly(tmp_path):
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    api = (tmp_path / "api" / "index.html").read_text(encoding="utf-8")
    assert "load_krona_weights" in api and "Raises" in api

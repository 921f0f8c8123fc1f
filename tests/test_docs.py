# SPDX-License-Identifier: Apache-2.0
"""The code in the README and docs runs, its links lead somewhere, and what it says of the parser is so."""

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
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    program = "\n".join(blocks(ROOT / "README.md", "python"))
    assert program.count("import") >= 4
    namespace: dict = {}
    exec(compile(program, "README.md", "exec"), namespace)
    assert namespace["image"].size == (64, 64)
    assert len(namespace["trainable"]) > 0
    assert (tmp_path / "output/my-adapter/unet/adapter_model.safetensors").is_file()

    lines = [line for block in blocks(ROOT / "README.md", "bash") for line in block.splitlines()]
    commands = [shlex.split(line, comments=True)[3:] for line in lines if line.startswith("python -m peft_krona")]
    assert len(commands) == 5
    for arguments in commands:
        if "pytorch_lora_weights.safetensors" not in arguments:  # a file that the reader has downloaded
            assert main(arguments) == 0, arguments
    for made in ("my-adapter.safetensors", "my-lora.safetensors", "adapter.png", "merged-pipeline/model_index.json"):
        assert (tmp_path / made).is_file()


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


def test_training_commands_of_the_readme_parse():
    import sys

    sys.path.insert(0, str(ROOT / "examples"))
    from dreambooth.arguments import parse_args

    commands = [c for block in blocks(ROOT / "README.md", "bash") for c in block.replace("\\\n", " ").splitlines()]
    commands = [shlex.split(c, comments=True) for c in commands]
    training = [c[3:] for c in commands if c[:3] == ["accelerate", "launch", "examples/dreambooth_kron.py"]]
    assert len(training) == 2
    for arguments in training:
        assert parse_args(arguments).instance_data_dir == "my-dog"

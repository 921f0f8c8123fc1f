# SPDX-License-Identifier: Apache-2.0
"""What a user's type checker says: a wrong setting is named on its line, and right programs pass.

The package itself is checked by `make lint`.
"""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import peft_krona

ROOT = Path(__file__).parents[1]
IMPORTS = """\
import torch
from peft_krona import KronAConfig, add_krona, kron_linear, load_krona_weights, merged
from peft_krona.choices import Layout
from peft_krona.convert import LayerUpdate, export, nearest_kronecker, read_adapter
x = torch.ones(1, 1, 1)
"""
# One a line, and what is said of it
WRONG = {
    "KronAConfig(a_outt=4)": 'Unexpected keyword argument "a_outt"',
    "KronAConfig(lora_alpha=4)": 'Unexpected keyword argument "lora_alpha"',
    'KronAConfig(a_in="4")': 'expected "int"',
    'KronAConfig(scaling="rs")': """expected "Literal['alpha', 'rank', 'rslora', 'cdka']\"""",
    'KronAConfig(layout="kronecker")': """expected "Literal['kron', 'diffusekrona']\"""",
    'KronAConfig(bias="lora_only")': """expected "Literal['none', 'all', 'krona_only']\"""",
    'KronAConfig(init_weights="gaussian")': "'kaiming'",
    "KronAConfig(factor_pattern={'to_k': 8})": '"tuple[int, int]"',
    'kron_linear(x, x, x, backend="cuda")': "'triton'",
    'kron_linear(x, x, x, order="A_first")': "'a_first'",
    'kron_linear(x, x, x, layout="lora")': "'diffusekrona'",
    'nearest_kronecker(x, 1, 1, layout="lora")': "'diffusekrona'",
    'LayerUpdate("unet", "to_q", x, x, 1.0, "lora")': "'diffusekrona'",
    'a: Layout = "transposed"': "'diffusekrona'",
    'add_krona(None, adapter="mine")': 'Unexpected keyword argument "adapter"',
    'read_adapter("file").layer': 'has no attribute "layer"; maybe "layers"?',
    "export('folder', 8)": 'incompatible type "int"',
}
RIGHT = (
    'KronAConfig(target_modules=["to_q"], r=2, alpha=8.0, scaling="cdka", init_weights=False, inference_mode=True)',
    'KronAConfig(target_modules=("to_q", "to_k"), exclude_modules={"mid_block.attn1.to_q"}, task_type="CAUSAL_LM")',
    'KronAConfig(target_modules="all-linear", factor_pattern={"to_k": (64, 8)}, layers_to_transform=None)',
    'b: Layout = KronAConfig(layout="diffusekrona").layout',
    'y: torch.Tensor = kron_linear(x, x, x, scale=0.5, layout=b, backend="torch")',
    "rank: int = KronAConfig().for_layer('to_q').r",
    "shape: tuple[int, ...] = read_adapter('file').layers[0].shape",
)
# To read all of torch, transformers and PEFT takes a minute. Read are the bases of KronAConfig; all else is "Any".
SETTINGS = """\
[mypy]
ignore_missing_imports = true
[mypy-torch.*,numpy.*,peft.*,transformers.*,huggingface_hub.*,accelerate.*,diffusers.*,bitsandbytes.*,safetensors.*]
follow_imports = skip
[mypy-peft,peft.config,peft.utils.peft_types,transformers,transformers.utils,transformers.utils.hub]
follow_imports = normal
[mypy-peft_krona.*]
ignore_errors = true
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> dict[tuple[str, int], str]:
    """{(file, line): error} of one run over all programs here."""
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("mypy is not installed (pip install mypy)")
    folder = tmp_path_factory.mktemp("typing")
    (folder / "mypy.ini").write_text(SETTINGS)
    (folder / "wrong.py").write_text(IMPORTS + "\n".join(WRONG))
    (folder / "right.py").write_text(IMPORTS + "\n".join(RIGHT))
    readme = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    (folder / "readme.py").write_text("\n".join(readme))
    result = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file=mypy.ini", "--cache-dir=cache", "--no-error-summary",
         "--hide-error-context", "--no-color-output", "wrong.py", "right.py", "readme.py"],
        cwd=folder, env={"MYPYPATH": str(Path(peft_krona.__file__).parents[1])}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode in (0, 1), result.stdout + result.stderr
    found: dict[tuple[str, int], str] = {}
    for file, line, message in re.findall(r"^(\w+\.py):(\d+): error: (.*)$", result.stdout, re.M):
        found[file, int(line)] = found.get((file, int(line)), "") + message
    return found


def test_a_wrong_setting_is_named_on_its_line(said):
    first = IMPORTS.count("\n") + 1
    got = {line: message for (file, line), message in said.items() if file == "wrong.py"}
    assert list(got) == [first + index for index in range(len(WRONG))], got
    for line, (statement, expected) in enumerate(WRONG.items(), first):
        assert expected in got[line], statement


@pytest.mark.parametrize("file", ["right.py", "readme.py"])
def test_a_right_program_passes(said, file):
    assert not {line: message for (where, line), message in said.items() if where == file}

# SPDX-License-Identifier: Apache-2.0
"""One format is one record in one file: the drill of adding one."""

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import peft_krona
from peft_krona.convert import from_tensors
from peft_krona.convert.formats import FORMATS

SOURCE = Path(peft_krona.__file__).parent
MODULE = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
TOY = '''
    # SPDX-License-Identifier: Apache-2.0
    """A toy: `<layer>.toy_left` and `.toy_right`, halved."""

    from .format import Factors, Format

    def _read(name, parts, metadata):
        return Factors(parts["toy_left"][None], parts["toy_right"][None], 2.0)

    def _write(layers, dtype):
        pairs = [layer.balanced() for layer in layers]
        return [{"toy_left": A[0].to(dtype), "toy_right": (B[0] / 2).to(dtype)} for A, B in pairs]

    def _delta(name, parts, dtype):
        (i, k), (u, v) = parts["toy_left"].shape, parts["toy_right"].shape
        product = parts["toy_left"].to(dtype)[:, None, :, None] * parts["toy_right"].to(dtype)[None, :, None, :]
        return 2 * product.reshape(i * u, k * v)

    TOY = Format("toy", ("toy_left", "toy_right"), read=_read, write=_write, delta=_delta)
'''
USE = """
    import sys, torch
    from peft_krona.convert import AdapterFile, BASES, FORMATS, LayerUpdate, export, from_tensors, read_adapter
    from peft_krona.__main__ import main

    assert "toy" in FORMATS
    layer = LayerUpdate("unet", "MODULE", torch.randn(1, 4, 2), torch.randn(1, 8, 16))
    report = export(AdapterFile((layer,)), "x", "toy", base_model=BASES["sd15"], dtype=torch.float32)
    (again,) = read_adapter("x.safetensors")
    assert report.worst_error <= 2**-23 and again.name == layer.name
    assert (again.delta_weight() - layer.delta_weight()).abs().max() <= 2**-20
    assert main(["convert", "x.safetensors", "y", "--to", "lokr", "--base", "sd15"]) == 0
    assert main(["convert", "y.safetensors", "z", "--to", "toy", "--base", "sd15"]) == 0
"""


def test_adding_a_format_touches_two_files(tmp_path):
    """The table gets a name, the new file holds the rest; reading, writing, checks and the command line follow."""
    package = tmp_path / "src" / "peft_krona"
    shutil.copytree(SOURCE, package, ignore=shutil.ignore_patterns("__pycache__"))
    formats = package / "convert" / "formats"
    (formats / "toy.py").write_text(textwrap.dedent(TOY).lstrip())
    table = (formats / "__init__.py").read_text()
    table = table.replace("from .lora import LORA\n", "from .lora import LORA\nfrom .toy import TOY\n")
    (formats / "__init__.py").write_text(table.replace("        LORA,\n", "        LORA,\n        TOY,\n"))
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(USE).replace("MODULE", MODULE)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(package.parent)},
    )
    assert result.returncode == 0, result.stderr


def test_every_record_can_be_read_or_says_why_not():
    for name, format in FORMATS.items():
        assert format.name == name and format.endings
        assert (format.read is None) == bool(format.refuses)
        assert (format.write is None) == (format.delta is None)
        assert bool(format.peft_type) == (format.read_peft is not None)


@pytest.mark.parametrize("name", [name for name, format in FORMATS.items() if format.read is None])
def test_a_format_that_is_not_read_is_refused_by_name(name):
    file = {f"lora_unet_mid_block_attentions_0_proj_in.{end}": torch.ones(2, 2) for end in FORMATS[name].endings}
    with pytest.raises(peft_krona.errors.FormatError, match=f"This is a {name} file .*which .*"):
        from_tensors(file)


def test_the_library_speaks_python_and_the_command_line_flags():
    for path in SOURCE.rglob("*.py"):
        if path.name not in ("_command_line.py", "commands.py", "plan.py", "run.py"):
            found = re.findall(r"(?<![\w-])--[a-z][\w-]*", path.read_text(encoding="utf-8"))
            assert not found, f"{path.name}: {found}"

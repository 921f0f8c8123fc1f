# SPDX-License-Identifier: Apache-2.0
"""`python -m peft_krona run`: what a script sees, and how it ends, are what python itself gives it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from peft_krona.__main__ import main
from peft_krona.errors import ConfigError

ROOT = Path(__file__).parents[1]
SCRIPT = """'''A docstring.'''
import json, os, sys
import helper  # beside the script
names = ("__name__", "__file__", "__doc__", "__package__", "__spec__", "__cached__", "__builtins__")
seen = {name: str(globals().get(name)) for name in names}
seen |= {"argv": sys.argv, "path": sys.path[0], "helper": helper.WHERE, "cwd": os.getcwd()}
seen["main"] = sys.modules["__main__"].__dict__ is globals()
print(json.dumps(seen))
"""
# one program for all cases, as each import of torch takes seconds; sys.path[0] is the folder, as with -m peft_krona
DRIVER = """
import contextlib, io, json, sys
from peft_krona.__main__ import main
for case in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        for name in ("helper", "script", "package", "package.script"):
            sys.modules.pop(name, None)
        status = main(["run", *case])
    print(json.dumps([status, out.getvalue()]))
"""
CASES = [
    ["scripts/script.py", "-v", "--", "-m", "run", "--budget=1"],
    ["link.py"],
    ["-m", "package", "-m", "x"],
    ["-mpackage.script", "--help"],
]


def python(*arguments, cwd, **kwargs) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}"}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        **kwargs,
    )


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("tree")
    (root / "scripts").mkdir()
    (root / "package").mkdir()
    (root / "scripts" / "script.py").write_text(SCRIPT)
    (root / "scripts" / "helper.py").write_text("WHERE = 'scripts'")
    (root / "scripts" / "ends.py").write_text(
        "import sys\n"
        "kind = sys.argv[1]\n"
        "if kind == 'raises': raise OSError('its own')\n"
        "if kind == 'krona': from peft_krona.errors import ConfigError; raise ConfigError('its own')\n"
        "sys.exit({'three': 3, 'none': None, 'text': 'a text'}[kind])\n"
    )
    (root / "link.py").symlink_to(root / "scripts" / "script.py")
    (root / "package" / "__init__.py").write_text("")
    (root / "package" / "__main__.py").write_text(
        "from .script import *\nfrom .script import print_all; print_all(globals())"
    )
    (root / "package" / "script.py").write_text(
        "import json, sys\n"
        "def print_all(g): print(json.dumps([g['__name__'], g['__package__'], g['__file__'], sys.argv, sys.path[0]]))\n"
        "if __name__ == '__main__': print_all(globals())\n"
    )
    (root / "config").mkdir()
    (root / "config" / "adapter_config.json").write_text(
        '{"peft_type": "KRONA", "target_modules": ["to_q"], "a_in": 8}'
    )
    (root / "plugin.py").write_text(
        "from peft import PeftConfig; print(PeftConfig.from_pretrained('config').a_in); raise SystemExit(3)"
    )
    return root


def test_a_script_sees_what_it_would_see(tree):
    (tree / "driver.py").write_text(DRIVER)
    driven = python("-m", "driver", json.dumps(CASES), cwd=tree)
    assert driven.returncode == 0, driven.stderr
    for arguments, line in zip(CASES, driven.stdout.splitlines(), strict=True):
        status, out = json.loads(line)
        wanted = python(*arguments, cwd=tree)
        assert wanted.returncode == status == 0, wanted.stderr
        assert json.loads(out) == json.loads(wanted.stdout), arguments


def test_the_command(tree):
    """And PEFT knows KRONA in a script that does not import it."""
    found = python("-m", "peft_krona", "run", "plugin.py", "three", cwd=tree)
    assert (found.returncode, found.stdout) == (3, "8\n"), found.stderr


@pytest.mark.parametrize(
    ("kind", "ends"),
    [
        ("three", SystemExit(3)),
        ("none", SystemExit()),
        ("text", SystemExit("a text")),
        ("raises", OSError("its own")),  # the other commands print such an error in one line
        ("krona", ConfigError("its own")),
    ],
)
def test_its_exit_and_errors_pass_through(kind, ends, tree, monkeypatch, capsys):
    monkeypatch.chdir(tree)
    with pytest.raises(type(ends)) as raised:
        main(["run", "scripts/ends.py", kind])
    assert raised.value.args == ends.args and not any(capsys.readouterr())


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        ([], 2, "usage: python -m peft_krona run SCRIPT"),
        (["--help"], 0, ""),
        (["no-such.py"], 2, "error: cannot run no-such.py: there is no such file.\nusage: "),
        (["tests"], 2, "error: cannot run tests: it is a folder; name a file in it.\nusage: "),
        (["-m", "no_such"], 2, "error: cannot run -m no_such: there is no such module.\nusage: "),
        (["-mno.such.module"], 2, "error: cannot run -m no.such.module: there is no such module.\nusage: "),
        (["-m", "json.no_such", "x"], 2, "error: cannot run -m json.no_such: there is no such module.\nusage: "),
        (["-m"], 2, "error: expected the name of a module behind -m.\nusage: "),
        (["-v", "x.py"], 2, "error: unknown option -v: options of the script stand behind it.\nusage: "),
    ],
    ids=str,
)
def test_bad_input(arguments, status, says, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    before = sys.argv, sys.path[:], sys.modules["__main__"]
    assert main(["run", *arguments]) == status
    out = capsys.readouterr()
    assert out.err.startswith(says) if says else out.out.startswith("usage: ")
    assert before == (sys.argv, sys.path, sys.modules["__main__"])


def test_within_a_program_everything_is_put_back(tree, capsys, monkeypatch):
    monkeypatch.chdir(tree)
    before = sys.argv, sys.path[:], sys.modules["__main__"]
    assert main(["run", "scripts/script.py", "x"]) == 0
    assert json.loads(capsys.readouterr().out)["argv"] == ["scripts/script.py", "x"]
    assert before == (sys.argv, sys.path, sys.modules["__main__"])
    sys.modules.pop("helper", None)
    with pytest.raises(SystemExit) as ended:
        main(["run", "scripts/ends.py", "three"])
    assert ended.value.code == 3 and before == (sys.argv, sys.path, sys.modules["__main__"])

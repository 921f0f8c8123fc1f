# SPDX-License-Identifier: Apache-2.0
"""python -m peft_krona run: a script or module of somebody else's, after `import peft_krona`.

PEFT has no entry points, so a program that only reads configs (`PeftConfig.from_pretrained`) cannot know KRONA before
somebody imports this package. What the program does, prints, raises and exits with is its own.
"""

from __future__ import annotations

import builtins
import importlib
import importlib.util
import os
import runpy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import SourceFileLoader
from types import ModuleType

NAME, HELP = "run", "a script or module, with KronA known to PEFT"
USAGE = """usage: python -m peft_krona run SCRIPT [ARGUMENT ...]
       python -m peft_krona run -m MODULE [ARGUMENT ...]

Runs a script as python would, after `import peft_krona`. With accelerate:
accelerate launch -m peft_krona run SCRIPT ..."""


def main(arguments: Sequence[str]) -> int:
    """Run it with the arguments behind its name; 0, or 2 where there is nothing to run. Its own exit passes through."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    first, *rest = arguments
    is_module = first.startswith("-m")
    if is_module:
        name, rest = (first[2:], rest) if first != "-m" else (rest[0] if rest else "", rest[1:])
        if not name:
            return _refuse("expected the name of a module behind -m")
    elif first.startswith("-"):
        return _refuse(f"unknown option {first}: options of the script stand behind it")
    elif not os.path.isfile(first):
        what = "it is a folder; name a file in it" if os.path.isdir(first) else "there is no such file"
        return _refuse(f"cannot run {first}: {what}")
    importlib.import_module("peft_krona")  # what all this is for
    if is_module:
        with _as_started(["-m", *rest], os.getcwd()):
            if not _is_module(name):
                return _refuse(f"cannot run -m {name}: there is no such module")
            runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        with _as_started([first, *rest], os.path.dirname(os.path.realpath(first))):
            _run_script(first)
    return 0


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError as error:
        if error.name and f"{name}.".startswith(f"{error.name}."):
            return False
        raise  # a package on the way to it imports what is missing


def _refuse(reason: str) -> int:
    print(f"error: {reason}.\n{USAGE}", file=sys.stderr)
    return 2


@contextmanager
def _as_started(argv: list[str], folder: str) -> Iterator[None]:
    """sys.argv and sys.path[0] as python sets them."""
    before = sys.argv, sys.path[:], sys.modules["__main__"]
    sys.argv = argv
    if not getattr(sys.flags, "safe_path", False):  # else nothing of ours is in front
        sys.path[:1] = [folder]
    try:
        yield
    finally:
        sys.argv, sys.path[:], sys.modules["__main__"] = before


def _run_script(path: str) -> None:
    """As python runs a file. `runpy.run_path` would leave `__file__` relative and take `__main__` away at the end."""
    file = os.path.abspath(path)
    loader = SourceFileLoader("__main__", file)
    module = ModuleType("__main__")
    vars(module).update(
        __builtins__=builtins, __file__=file, __loader__=loader, __spec__=None, __package__=None, __cached__=None
    )
    sys.modules["__main__"] = module
    exec(loader.source_to_code(loader.get_data(file), file), vars(module))

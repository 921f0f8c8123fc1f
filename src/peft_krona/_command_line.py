# SPDX-License-Identifier: Apache-2.0
"""The arguments of `python -m peft_krona` and `peft-krona`, and what is the same for all commands. Imports no torch.

Python imports a package before the module in it that it was asked to run, and this package imports torch and PEFT:
three seconds, also for a help text. So `__init__` calls `begin` first. In a process that is this program, and in no
other, it parses the arguments, and argparse answers `--help`, `--version` and wrong usage at once.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from . import plan, run
from ._version import __version__
from .choices import DTYPES, LAYOUTS

SCRIPT = "peft-krona"
TRACEBACK = "PEFT_KRONA_TRACEBACK"
STOPPED, NO_READER = 130, 141  # what a shell reports for a program that SIGINT or SIGPIPE has ended


def is_program(argv: Sequence[str], orig_argv: Sequence[str]) -> bool:
    """Whether a process with this command line is ours, asked while the package is being imported.

    Args:
        argv: `sys.argv`, whose first entry is "-m" while Python looks for the module. orig_argv: `sys.orig_argv`.

    >>> is_program(["-m", "--help"], ["python", "-X", "dev", "-m", "peft_krona", "--help"])
    True
    >>> is_program(["-m", "peft_krona"], ["python", "-m", "pytest", "peft_krona"])
    False
    """
    if not argv:
        return False
    if argv[0] == "-m":
        return orig_argv[-len(argv)] == "peft_krona"
    return os.path.basename(argv[0]) in (SCRIPT, f"{SCRIPT}.exe")


def begin() -> None:
    """Parse the arguments if this process is the program; returns in every other one, and if they are a command."""
    if not is_program(sys.argv, sys.orig_argv):
        return
    arguments = sys.argv[1:]
    if arguments[:1] == [run.NAME]:  # a program of somebody else's, whose output, errors and end are its own
        if arguments[1:2] in ([], ["-h"], ["--help"]):
            sys.exit(run.main(arguments[1:]))
        return
    with _readers_that_leave():
        parser().parse_args(arguments)
    sys.excepthook = _in_one_line  # Ctrl-C, or a broken installation, while torch is imported
    for name, notice in _NOTICES.items():
        logging.getLogger(name).addFilter(_Without(notice))


class _Without(logging.Filter):
    """Drops one message."""

    def __init__(self, notice: str) -> None:
        super().__init__()
        self.notice = notice

    def filter(self, record: logging.LogRecord) -> bool:
        return self.notice not in record.getMessage()


# {logger: what optional libraries log at import, whatever is done with them afterwards}; for these commands nothing
# follows from it. All else that they log is shown.
_NOTICES = {
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward from kernels-community",
    "transformers.utils.import_utils": "requires torchvision (not installed)",
}


def parser() -> argparse.ArgumentParser:
    """Every command with its arguments. `command` is its name."""
    program = argparse.ArgumentParser(prog=_name(), description="Kronecker adapters: files in and out.")
    program.add_argument("--version", action="version", version=f"{SCRIPT} {__version__}")
    commands = program.add_subparsers(required=True, dest="command", metavar="convert|inspect|merge|extract|plan|run")
    adapter = "PEFT folder, released DiffuseKronA checkpoint, LoKr or LoRA file, or an id on the Hub"
    scale: dict[str, Any] = {"type": float, "default": 1.0, "metavar": "S", "help": "multiply the update by S"}
    force: dict[str, Any] = {"action": "store_true", "help": "replace what is there under the output's name"}

    convert = commands.add_parser("convert", help="any adapter to a file for another tool, or to a PEFT folder")
    convert.add_argument("input", help=adapter)
    convert.add_argument("output", help="file to write; with --to peft a new folder")
    convert.add_argument(
        "--to",
        default="auto",
        metavar="FORMAT",
        help="lokr, loha, lora or diff (a file), peft (a folder), or auto: the smallest exact file",
    )
    convert.add_argument(
        "--base",
        metavar="sd15|sd2|sdxl|FOLDER",
        help="base model, for names and checks: its kind, or the folder of the pipeline or of the adapted model. If "
        "left out: the one that the adapter names, else guessed from the layers",
    )
    convert.add_argument("--dtype", choices=DTYPES, help="of the weights; fp16 for files, unchanged for peft")
    convert.add_argument("--scale", **scale)
    convert.add_argument("--split-terms", action="store_true", help="one file per Kronecker term")
    convert.add_argument("--trigger", metavar="WORDS", help="trigger words, for the metadata")
    convert.add_argument("--force", **force)

    inspect = commands.add_parser(
        "inspect",
        help="what an adapter changes, layer by layer",
        description="What an adapter changes, layer by layer. eff. rank is the number of directions that share a "
        "layer's update: the exponential of the entropy of its normalised singular values (1: all in one direction).",
    )
    inspect.add_argument("input", help=adapter)
    inspect.add_argument("--plot", metavar="OUT.png", help="draw it as well (needs matplotlib)")
    inspect.add_argument(
        "--base",
        metavar="FOLDER",
        help="folder of the base pipeline, or of the adapted model, for ||dW|| / ||W||. If left out: the one that the "
        "adapter names, where it is on disk",
    )
    inspect.add_argument("--force", **force)

    merge = commands.add_parser("merge", help="a pipeline with an adapter merged into its weights (needs diffusers)")
    merge.add_argument("pipeline", help="folder of a diffusers pipeline")
    merge.add_argument("adapter", help=adapter)
    merge.add_argument("output", help="new folder")
    merge.add_argument("--scale", **scale)
    merge.add_argument("--dtype", choices=DTYPES, help="of the weights; each component's own if left out")
    merge.add_argument("--force", **force)

    extract = commands.add_parser("extract", help="the nearest adapter to the difference of two models")
    extract.add_argument(
        "before", help="the base model: a safetensors file (a whole checkpoint too), or a component's folder"
    )
    extract.add_argument("after", help="the fine-tuned model's")
    extract.add_argument("output", help="new PEFT folder")
    extract.add_argument("--a-out", type=int, default=64, help="rows of the left factor (64)")
    extract.add_argument("--a-in", type=int, default=4, help="columns of the left factor (4)")
    extract.add_argument("--r", type=int, default=1, help="Kronecker terms (1)")
    extract.add_argument("--layout", choices=LAYOUTS, default="kron", help="where the product puts its entries (kron)")
    extract.add_argument("--component", default="unet", help="the part of the pipeline that the weights are of (unet)")
    extract.add_argument("--force", **force)

    plan.add_arguments(commands.add_parser(plan.NAME, help=plan.HELP))
    commands.add_parser(run.NAME, help=run.HELP)  # for --help: its arguments are the script's, and are not parsed here
    return program


def _name() -> str:
    name = os.path.basename(sys.argv[0]) if sys.argv else ""
    return SCRIPT if name in (SCRIPT, f"{SCRIPT}.exe") else "python -m peft_krona"


# -- how it ends -------------------------------------------------------------------------------------------------------


@contextmanager
def _readers_that_leave() -> Iterator[None]:
    """`... | head`: what is printed when nobody reads it any longer ends the program quietly."""
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        nobody_reads()
        sys.exit(NO_READER)


def nobody_reads() -> None:
    """Python flushes standard output once more at its end: give it something that takes all."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):  # it has no file behind it, in a test or a notebook
        pass


def _in_one_line(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if os.environ.get(TRACEBACK):
        sys.__excepthook__(kind, error, traceback)
    else:
        print(describe(error), file=sys.stderr)


def describe(error: BaseException) -> str:
    """One line for an error that nobody expected here, with what to do about it."""
    if isinstance(error, KeyboardInterrupt):
        return "stopped"
    while isinstance(error, ImportError) and isinstance(error.__cause__, ImportError):
        error = error.__cause__  # transformers and diffusers import lazily, and name what they were about to do
    first = next(iter(str(error).strip().splitlines()), "")
    if isinstance(error, ImportError):
        package = (error.name or "").partition(".")[0]
        extra = {"diffusers": "diffusers", "matplotlib": "plot", "triton": "triton"}.get(package)
        cure = f'pip install "peft-krona[{extra}]"' if extra else f"pip install {package}" if package else ""
        if isinstance(error, ModuleNotFoundError) and cure:
            return f"error: This needs {package}, which is not installed: {cure}"
        return f"error: {first}" + (f". Is the installation of {package} whole?" if package else "")
    if isinstance(error, MemoryError):
        return f"error: There is not enough memory. {first}".rstrip()
    return (
        f"error: {type(error).__name__}: {first} (Where it happened is shown with {TRACEBACK}=1. If the files and "
        "folders given are sound, this is a fault of peft-krona: please report it with that text.)"
    )


# The library's messages name its arguments; here they are the flags that set them.
_FLAGS = (
    (r"\bto='(\w+)'", r"--to \1"),
    (r"\bsplit_terms=True\b", "--split-terms"),
    (r"\bdtype=torch\.float32\b", "--dtype fp32"),
    (r"\bscale \(AdapterFile\.scaled\)", "--scale"),
    (r"\bbase_model=(\S+?):", r"--base \1:"),
    (r"\bbase_model: ", "--base "),
    (r"\bbase_model\b(?!_name|\.\w)", "--base"),  # nor in a tensor's key
    (r"\bcomponent='(\w+)'", r"--component \1"),
    (r"\bbudget='([^']*)'", r"--budget \1"),
    (r"(?<!KronAConfig\.)\btarget_modules\b", "--target-modules"),
    (r"\bpicture='([^']*)'", r"--plot \1"),
)


def in_flags(message: str) -> str:
    """A message of the library in the words of the command line.

    >>> in_flags("Use to='lora' or split_terms=True.")
    'Use --to lora or --split-terms.'
    """
    for argument, flag in _FLAGS:
        message = re.sub(argument, flag, message)
    return message

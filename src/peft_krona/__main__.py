# SPDX-License-Identifier: Apache-2.0
"""python -m peft_krona convert | inspect | merge | extract | plan | run, and the console script peft-krona."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence

from . import run
from ._command_line import NO_READER, STOPPED, TRACEBACK, describe, in_flags, nobody_reads, parser
from .errors import KronAError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status.

    It is 0, or 1 after an error, which is printed in one line (the traceback of an unexpected one only if
    PEFT_KRONA_TRACEBACK is set), 130 after Ctrl-C and 141 if whoever read the output has gone.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == [run.NAME]:  # the script's errors and arguments are its own
        return run.main(arguments[1:])
    options = parser().parse_args(arguments)
    may_be_empty = ("trigger", "output")  # whoever writes refuses an empty output
    empty = next((name for name, value in vars(options).items() if value == "" and name not in may_be_empty), None)
    if empty is not None:  # a shell's variable that is not set; as a path it would be the current folder
        return _fail(f"error: {empty} is empty. Was it given by a variable that is not set?")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names that the terminal's encoding has no letters for
    try:
        from . import commands  # here, so that what it cannot import is an error in one line as well

        commands.RUN[options.command](options)
        sys.stdout.flush()
    except BrokenPipeError:
        nobody_reads()
        return NO_READER
    except KronAError as error:
        return _fail(f"error: {in_flags(str(error))}")
    except OSError as error:
        return _fail(f"error: {_of_the_system(error)}")
    except KeyboardInterrupt as error:
        _fail(describe(error))
        return STOPPED
    except Exception as error:
        if os.environ.get(TRACEBACK):
            raise
        return _fail(describe(error))
    return 0


def _fail(line: str) -> int:
    if sys.stdout is not None:
        try:
            sys.stdout.flush()
        except OSError:  # the disk that it is on is full: that is the error
            nobody_reads()
    print(line, file=sys.stderr)
    return 1


def _of_the_system(error: OSError) -> str:
    """The name before the reason, in one line; messages of our own and of other libraries as they are."""
    if error.strerror and error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {error.strerror}."
    return in_flags(" ".join(str(error).split()))


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C and SIGTERM end every example with one message and one exit code, wherever in the run they come.

while importing           at once (`end_at_once`); nothing has been written yet
in the run (`handled`)    as KeyboardInterrupt, so that what is half written is taken back
in a block that must end  after it (`deferred`): an update of the training, the replacement of an adapter
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

MESSAGE = "Interrupted. Checkpoints and adapters saved before are whole."
EXIT_CODE = 130
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """The state of one process.

    Attributes:
        requested: whether a signal came. take_back: called by `ended`, to remove what is half written.
    """

    def __init__(self) -> None:
        self.requested = False
        self.take_back: list[Callable[[], None]] = []
        self._deferred: list[bool] = []  # of the blocks that run now: whether a second signal ends them

    def on_signal(self, number: int, frame: Any) -> None:
        again, self.requested = self.requested, True
        if not self._deferred or (again and all(self._deferred)):
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """Both signals raise KeyboardInterrupt in the block, or wait for the end of `deferred`."""
        if threading.current_thread() is not threading.main_thread():  # only the main one can be interrupted
            yield
            return
        self.requested, self.take_back, self._deferred = False, [], []
        before = {number: signal.signal(number, self.on_signal) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self.requested, self.take_back, self._deferred = False, [], []  # the next block is not this one's

    @contextlib.contextmanager
    def deferred(self, second_ends: bool = True) -> Iterator[None]:
        """The first signal only sets `requested`; with `second_ends` the second ends the block all the same."""
        self._deferred.append(second_ends)
        try:
            yield
        finally:
            self._deferred.pop()

    def check(self) -> None:
        """Raise KeyboardInterrupt if a signal came in a block that deferred it."""
        if self.requested:
            raise KeyboardInterrupt

    def ended(self) -> int:
        """Take back what is half written, say so, and return the exit code."""
        for number in SIGNALS:  # once more would end in the middle of this
            with contextlib.suppress(ValueError):
                signal.signal(number, signal.SIG_IGN)
        while self.take_back:
            self.take_back.pop()()
        print(MESSAGE, file=sys.stderr)
        return EXIT_CODE


interrupts = Interrupts()


def end_at_once() -> None:
    """For the time of the imports: the libraries catch exceptions in theirs, and nothing is to be taken back."""

    def end(number: int, frame: Any) -> None:
        os.write(2, f"{MESSAGE}\n".encode())
        os._exit(EXIT_CODE)

    for number in SIGNALS:
        signal.signal(number, end)


def exit_with(run: Callable[[list[str]], int]) -> None:
    """Run a command line and end the process; what is done by then is not undone by a late signal."""
    code = run(sys.argv[1:])
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    sys.exit(code)


def left_to_the_main_process(worker: int) -> None:
    """For workers that load data: a terminal sends Ctrl-C to them too."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN if number == signal.SIGINT else signal.SIG_DFL)

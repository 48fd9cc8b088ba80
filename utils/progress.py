"""A progress bar for people, its last states as lines of a log file, and where this process stands, for a watchdog."""

import sys
import threading
import time
from typing import NamedTuple, TextIO

from tqdm import tqdm

from utils.processes import perhaps_unread

PAUSE = 30   # seconds between two lines
tqdm.set_lock(threading.RLock())   # its own is shared with forked processes: one that is killed would leave it taken


class Place(NamedTuple):
    """Where this process stands: in the phase of this number and name; `since`: when it last moved (monotonic)."""

    phase: int
    name: str
    since: float


_place = Place(0, "the start", time.monotonic())


def enter(name: str) -> None:
    """This process begins the next phase, as all processes of a run do in the same order."""
    global _place
    _place = Place(_place.phase + 1, name, time.monotonic())


def place() -> Place:
    return _place


class _Lines:
    """Takes what a bar draws over and over, and writes a line of it now and then, and the last."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.text, self.due = stream, "", time.monotonic() + PAUSE

    def write(self, text: str) -> None:
        self.text = text.strip() or self.text
        if self.text and (text == "\n" or time.monotonic() >= self.due):   # with a line's end alone a bar is closed
            with perhaps_unread(self.stream):
                self.stream.write(f"{self.text}\n")
            self.text, self.due = "", time.monotonic() + PAUSE

    def flush(self) -> None:
        with perhaps_unread(self.stream):
            self.stream.flush()


class _Bar(tqdm):
    def update(self, n: float | None = 1) -> bool | None:
        """Also of a bar that is not shown, as on all processes but the first: the process moves within its phase."""
        global _place
        _place = _place._replace(since=time.monotonic())
        return super().update(n)


def progress_bar(items=None, desc: str | None = None, **options) -> tqdm:
    """tqdm with its arguments; where stderr is no terminal, a line every half minute, and the last state."""
    if not sys.stderr.isatty():   # position: bars within others do not move the cursor
        options |= {"file": _Lines(sys.stderr), "position": 0}
    return _Bar(items, desc, dynamic_ncols=True, **options)

"""A progress bar for people, and its last states as lines of a log file."""

import sys
import threading
import time
from typing import TextIO

from tqdm import tqdm

PAUSE = 30   # seconds between two lines
tqdm.set_lock(threading.RLock())   # its own is shared with forked processes: one that is killed would leave it taken


class _Lines:
    """Takes what a bar draws over and over, and writes a line of it now and then, and the last."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.text, self.due = stream, "", time.monotonic() + PAUSE

    def write(self, text: str) -> None:
        self.text = text.strip() or self.text
        if self.text and (text == "\n" or time.monotonic() >= self.due):   # with a line's end alone a bar is closed
            self.stream.write(f"{self.text}\n")
            self.text, self.due = "", time.monotonic() + PAUSE

    def flush(self) -> None:
        self.stream.flush()


def progress_bar(items=None, desc: str | None = None, **options) -> tqdm:
    """tqdm with its arguments; where stderr is no terminal, a line every half minute, and the last state."""
    if not sys.stderr.isatty():   # position: bars within others do not move the cursor
        options |= {"file": _Lines(sys.stderr), "position": 0}
    return tqdm(items, desc, dynamic_ncols=True, **options)

"""Processes that do not outlive the one that started them, signals that ask them to end, and folders of one process."""

import ctypes
import fcntl
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from utils.errors import UserError

PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)   # ask to end; SLURM sends SIGUSR1 if told to
IMPATIENT = 2   # seconds after the first such signal from which on another one kills


class Stopped(BaseException):
    """A signal of STOPS asked this process to end. number: the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class _Asked:
    """pid: of the process that heeds the signals, not those it forked; number: the first signal's, 0 before one came;
    since: when that was; put_off: whether it is only noted."""

    pid, number, since, put_off = 0, 0, 0.0, False


@contextmanager
def stops_heeded() -> Iterator[None]:
    """Within it the first signal of STOPS raises Stopped; IMPATIENT seconds later another one kills this process."""
    _Asked.pid, _Asked.number, _Asked.put_off = os.getpid(), 0, False
    with stops_given_to(_heed):
        yield


@contextmanager
def stops_given_to(handler: Callable[[int, object], None]) -> Iterator[None]:
    """Within it the signals of STOPS go to `handler`, but for those that are ignored, as a hang-up is under nohup."""
    heeded = [number for number in STOPS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in heeded}
    try:
        yield
    finally:
        for number, own in before.items():
            signal.signal(number, own)


def _heed(number: int, _frame: object) -> None:
    late = _Asked.number and time.monotonic() - _Asked.since > IMPATIENT
    if late or os.getpid() != _Asked.pid:   # or of a forked process
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    elif not _Asked.number:
        _Asked.number, _Asked.since = number, time.monotonic()
        if not _Asked.put_off:
            raise Stopped(number)


def stop_asked() -> int:
    """The number of the first signal of STOPS that came in `stops_heeded`, 0 before."""
    return _Asked.number


@contextmanager
def stops_put_off(on: bool = True) -> Iterator[None]:
    """Within it a signal of STOPS is only noted, for `stop_asked`; on=False: it raises Stopped again, also a noted one.
    """
    before, _Asked.put_off = _Asked.put_off, on
    try:
        if not on and _Asked.number:
            raise Stopped(_Asked.number)
        yield
    finally:
        _Asked.put_off = before


@contextmanager
def perhaps_unread(stream: TextIO) -> Iterator[None]:
    """Within it a stream whose reader has gone (a closed terminal, `tee` after Ctrl-C) is no error, nor is it later."""
    try:
        yield
    except OSError:
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def ignore_stops() -> None:
    """For a process that ends with its parent, and not before it: signals often go to whole groups of processes."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)


def end_with(parent: int) -> None:
    """From here on this process is killed when its parent ends, even by SIGKILL; at once where it is gone already."""
    ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def children(parent: int) -> list[int]:
    """The processes that a process started and that have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, of = path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[:2]
            found += [int(path.parent.name)] if int(of) == parent and state != "Z" else []
    return found


def lock(folder: Path) -> TextIO:
    """Keeps other processes out of `folder` until the returned file is closed or this process ends, however it ends.

    A record lock: forked workers do not share it, and network folders know it. Raises UserError where another holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "a+", encoding="utf-8")  # noqa: SIM115
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        raise UserError(f"{folder}: {file.read() or 'another process'} trains here; wait for it, or end it") from None
    except OSError as error:   # of a file system without locks
        logging.getLogger("wsss").warning("%s cannot be locked (%s): start nothing else there", folder, error.strerror)
        return file
    file.truncate(0)
    print(f"process {os.getpid()} of {socket.gethostname()}", end="", file=file, flush=True)
    return file

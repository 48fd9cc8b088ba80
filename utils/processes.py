"""Processes that do not outlive the one that started them, and folders that one process alone writes."""

import ctypes
import fcntl
import logging
import os
import signal
import socket
from pathlib import Path
from typing import TextIO

from utils.errors import UserError

PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux


def end_with(parent: int) -> None:
    """From here on this process is killed when its parent ends, even by SIGKILL; at once where it is gone already."""
    ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


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

"""What a run tells: a readable log, and its numbers as JSON lines and in TensorBoard."""

import json
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from utils.files import naming, replacing
from utils.processes import perhaps_unread

NAME = "wsss"
_excepthook = threading.excepthook


class _ConsoleHandler(logging.Handler):
    """Lines on stdout that do not tear a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        with perhaps_unread(sys.stdout):
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()


class _LogFile(logging.FileHandler):
    """A line that cannot be written is an error like that of any other file."""

    def handleError(self, record: logging.LogRecord) -> None:
        with naming(self.baseFilename):
            raise


def setup_logger(path: str | os.PathLike | None = None, main: bool = True) -> logging.Logger:
    """The logger of this process: to stdout and, where `path` is given, appended to that file.

    main: False on every rank but the first, whose logger then says nothing below an error.
    A second call replaces the handlers of the first.
    """
    logger = logging.getLogger(NAME)
    close_logger()
    logger.propagate = False
    logger.setLevel(logging.INFO if main else logging.ERROR)
    handlers: list[logging.Handler] = [_ConsoleHandler()]
    if path is not None and main:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        handlers.append(_LogFile(path, encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%Y-%m-%d %H:%M:%S"))
        logger.addHandler(handler)
    return logger


def close_logger() -> None:
    """Takes the handlers off the logger and closes its file."""
    logger = logging.getLogger(NAME)
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()


class MetricsWriter:
    """metrics.jsonl and TensorBoard events of one run.

    A line of metrics.jsonl is {"iteration": n, "time": seconds since 1970, name: value, ...}, a value that is not
    finite being null. `start` is the iteration a resumed run goes on with: lines and events of iterations >= start,
    and a last line cut by a kill, are dropped, so that the file is that of a run without interruption.
    """

    def __init__(self, folder: str | os.PathLike, start: int = 0):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        threading.excepthook = _but_of_tensorboard
        _keep_lines_before(self.path, start)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start)

    def scalars(self, iteration: int, values: Mapping[str, float], prefix: str = "") -> None:
        """Appends one line and writes each value as the TensorBoard scalar prefix + name."""
        values = {prefix + name: float(value) for name, value in values.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        line = {"iteration": iteration, "time": round(time.time(), 3), **finite}
        with naming(self.path):
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
            for name, value in values.items():
                self._board.add_scalar(name, value, iteration)

    def image(self, iteration: int, name: str, picture: np.ndarray) -> None:
        """Shows uint8 (H, W, 3) in TensorBoard."""
        with naming(self._board.log_dir):
            self._board.add_image(name, picture, iteration, dataformats="HWC")

    def close(self) -> None:
        with naming(self.path):
            self._file.close()
            self._board.close()


def _but_of_tensorboard(arguments: threading.ExceptHookArgs) -> None:
    """What the disk refuses TensorBoard's thread, the next call to its writer raises, too: no traceback is needed."""
    of_tensorboard = "tensorboard" in type(arguments.thread).__module__
    if not (of_tensorboard and isinstance(arguments.exc_value, OSError)):
        _excepthook(arguments)


def read_metrics(path: str | os.PathLike) -> list[dict]:
    """The lines of a metrics.jsonl, without a last one cut by a kill."""
    lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    return [json.loads(line) for line in lines if _is_whole(line)]


def _keep_lines_before(path: Path, start: int) -> None:
    if not path.exists():
        return
    kept = [line for line in read_metrics(path) if line["iteration"] < start]
    with replacing(path) as part:
        part.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")


def _is_whole(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except json.JSONDecodeError:
        return False

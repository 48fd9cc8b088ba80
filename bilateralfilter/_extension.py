"""Finds the compiled filter, or compiles it."""

import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

FOLDER = Path(__file__).resolve().parent
SOURCE = FOLDER / "filter.cpp"
FLAGS = ["-O3", "-fopenmp", "-ffp-contract=off"]  # setup.py has the same; no contraction: equal bits on every CPU


@functools.cache
def load_extension() -> None:
    """Makes torch.ops.bilateralfilter.filter be there.

    Takes the one that `pip install ./bilateralfilter` compiled from this very source, else the one compiled earlier in
    this checkout (bilateralfilter/build/), else compiles it there: 15 to 60 seconds, by one process while others wait.
    Raises UserError where there is no compiler, or the folder cannot be written, or the source does not compile.
    """
    source_hash = hashlib.sha1(SOURCE.read_bytes()).hexdigest()[:10]
    installed = importlib.util.find_spec(f"_bilateralfilter_{source_hash}")
    if installed is not None:
        with contextlib.suppress(OSError):  # compiled for another torch
            torch.ops.load_library(installed.origin)
            return
    library = FOLDER / "build" / f"filter-{source_hash}-torch{torch.__version__}.so"
    if not library.exists():
        _compile(library)
    torch.ops.load_library(library)


def _compile(library: Path) -> None:
    from utils.errors import UserError  # an installed copy has no utils, and never comes here

    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    if shutil.which(compiler) is None:
        raise UserError(
            f"bilateralfilter: no C++ compiler ({compiler} is not on PATH): install one (g++) or name it in CXX"
        )
    work = library.with_suffix("")
    try:
        work.mkdir(parents=True, exist_ok=True)
        with _locked(library.with_suffix(".lock")):
            if not library.exists():  # nobody compiled it while we waited
                _compile_in(work, library)
    except OSError as error:
        raise UserError(f"bilateralfilter: cannot write to {library.parent} ({error.strerror})") from error
    except RuntimeError as error:
        log = library.with_suffix(".log")
        log.write_text(str(error), encoding="utf-8")
        raise UserError(f"bilateralfilter: {SOURCE.name} does not compile with {compiler}: see {log}") from error


def _compile_in(work: Path, library: Path) -> None:
    from torch.utils import cpp_extension  # slow to import

    print("compiling bilateralfilter, once (15 to 60 seconds)", file=sys.stderr, flush=True)
    (work / "lock").unlink(missing_ok=True)  # torch's own lock, left by a compilation that was killed
    with _on_path(Path(sys.executable).parent):  # ninja lives there when it came from pip
        cpp_extension.load(
            "filter",
            [str(SOURCE)],
            extra_cflags=FLAGS,
            extra_ldflags=["-fopenmp"],
            build_directory=str(work),
            is_python_module=False,
        )
    os.replace(work / "filter.so", library)  # all at once: whoever sees the file sees all of it


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds the file's lock, which ends with the process whatever happens to it."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _on_path(folder: Path) -> Iterator[None]:
    before = os.environ.get("PATH")
    os.environ["PATH"] = os.pathsep.join(filter(None, (str(folder), before)))
    try:
        yield
    finally:
        if before is None:
            del os.environ["PATH"]
        else:
            os.environ["PATH"] = before

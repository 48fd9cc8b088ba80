"""Finds the compiled operators, or compiles them, or falls back on plain PyTorch."""

import contextlib
import fcntl
import functools
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch

from . import _cuda_toolkit
from ._cuda_toolkit import Toolkit

FOLDER = Path(__file__).resolve().parent
# without contraction of products and sums, which breaks ties of features that lie on the border of two simplices
FLAGS = ["-O3", "-fopenmp", "-ffp-contract=off"]
NVCC_FLAGS = ["-O3", "--extended-lambda", "--fmad=false"]
KEYS = {"cpu": "CPU", "cuda": "CUDA"}  # device type -> torch's name of its operators; each has a library of its own
OPERATORS = "build", "apply", "add_", "mean_field", "par_affinity", "par_refine"  # else of pytorch.py, par.py
_lock = threading.Lock()


def sources(cuda: bool) -> list[Path]:
    """The files to compile."""
    return sorted((FOLDER / "csrc").glob("*.cu" if cuda else "*.cpp"))


def source_hash() -> str:
    """Ten letters that change with the sources and flags: a library made from others is never loaded."""
    texts = [path.read_bytes() for path in sorted((FOLDER / "csrc").iterdir())]
    return hashlib.sha1(b"".join([*texts, str(FLAGS + NVCC_FLAGS).encode()])).hexdigest()[:10]


def name_of(kind: str, toolkit: Toolkit | None, prefix: str = "_bilateralfilter_") -> str:
    """What a library is called: after the sources, the device and the cards it is compiled for."""
    architectures = [f"_sm{name.replace('+PTX', 'ptx')}" for name in toolkit.architectures] if toolkit else []
    return f"{prefix}{source_hash()}_{kind}{''.join(architectures)}"


@torch.compiler.assume_constant_result
def load(device_type: str) -> bool:
    """Makes the operators be there for tensors on this type of device. Returns whether they are compiled ones.

    Takes those that `pip install ./bilateralfilter` compiled from these very sources, else those compiled earlier in
    this checkout (bilateralfilter/build/), both only if they are for this device and the cards at hand; else compiles
    them there: a minute or two; one process does while the others wait, and a failure is remembered until
    sources or compilers change. What cannot be compiled is replaced by plain PyTorch operators; one warning says why.
    """
    with _lock:  # of threads; the one of processes is a file's
        return _load(device_type)


@functools.cache
def _load(device_type: str) -> bool:
    key = KEYS.get(device_type)
    if key is None:
        return True  # other devices: torch says that it has no such operator
    reason = _load_library(device_type)
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    compiled = has_kernel("bilateralfilter::build", key)
    if not compiled:
        warnings.warn(f"bilateralfilter runs as slow plain PyTorch on {device_type}: {reason}", stacklevel=4)
    from . import par, pytorch
    from .lattice import library

    for name in OPERATORS:
        if not has_kernel(f"bilateralfilter::{name}", key):
            library.impl(name, getattr(par if name.startswith("par") else pytorch, name), key)
    return compiled


def _load_library(kind: str) -> str:
    """Loads the compiled operators, after compiling them if need be; returns why not, or an empty string."""
    cards = _cuda_toolkit.cards() if kind == "cuda" else set()
    installed = (path for folder in sys.path for path in Path(folder).glob(f"{name_of(kind, None)}*.so"))
    prefix = f"lattice-torch{torch.__version__}-"
    folders = dict.fromkeys((FOLDER / "build", _build_folder()))  # the first may be there and not writable
    built = (path for folder in folders for path in folder.glob(f"{name_of(kind, None, prefix)}*.so"))
    for library in (*installed, *built):
        architectures = re.findall(r"_sm(\d+[af]?(?:ptx)?)", library.name)
        if _cuda_toolkit.covers([name.replace("ptx", "+PTX") for name in architectures], cards):
            with contextlib.suppress(OSError):  # compiled for another torch, or on another machine
                torch.ops.load_library(library)
                return ""
    try:
        toolkit = _cuda_toolkit.find(cards) if kind == "cuda" else None
        library = _build_folder() / f"{name_of(kind, toolkit, prefix)}.so"
        reason = _compile(library, toolkit)
        if not reason:
            torch.ops.load_library(library)
    except LookupError as error:
        return str(error)
    except OSError as error:
        return f"{library} cannot be loaded: delete it ({error})"
    return reason


def _build_folder() -> Path:
    """build/ beside the sources, or, where nobody may write there, a folder of the user's."""
    folder = FOLDER / "build"
    with contextlib.suppress(OSError):
        folder.mkdir(exist_ok=True)
    if os.access(folder, os.W_OK):
        return folder
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "bilateralfilter"


def _compile(library: Path, toolkit: Toolkit | None = None) -> str:
    """Returns why it cannot be done, or an empty string. toolkit: for CUDA."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None:
        return f"no C++ compiler ({compiler[0]} is not on PATH): install one (g++) or name it in CXX"
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout.partition("\n")[0]
    who = f"{shlex.join(compiler)} ({version})" + (f", {toolkit}" if toolkit else "") + "\n"
    work, log = library.with_suffix(""), library.with_suffix(".log")
    try:
        work.mkdir(parents=True, exist_ok=True)
        with _locked(library.with_suffix(".lock")):
            if library.exists():  # somebody compiled it while we waited
                return ""
            if not log.exists() or not log.read_text(encoding="utf-8").startswith(who):  # nor did these fail before
                try:
                    _compile_in(work, library, toolkit)
                    return ""
                except Exception as error:  # whatever it is, there are operators that need no compiler
                    log.write_text(f"{who}{error}", encoding="utf-8")
    except OSError as error:
        return f"cannot write to {library.parent} ({error.strerror})"
    return f"the sources do not compile: see {log}, and delete it to try again"


def _compile_in(work: Path, library: Path, toolkit: Toolkit | None) -> None:
    from torch.utils import cpp_extension

    how = f"with {toolkit}, two minutes; if it fails, see {library.with_suffix('.log')}" if toolkit else "two minutes"
    print(f"compiling bilateralfilter, once ({how})", file=sys.stderr, flush=True)
    (work / "lock").unlink(missing_ok=True)  # torch's own lock, left by a compilation that was killed
    name = re.sub(r"\W", "_", library.stem)  # of its own, for torch changes a name that it meets again
    folders = _cuda_toolkit.runtime_folder(work) if toolkit else []
    with _on_path(Path(sys.executable).parent), _using(cpp_extension, toolkit):  # ninja lives there when it is pip's
        cpp_extension.load(
            name,
            [str(path) for path in sources(toolkit is not None)],
            extra_cflags=FLAGS,
            extra_cuda_cflags=NVCC_FLAGS + (toolkit.flags() if toolkit else []),
            extra_ldflags=["-fopenmp", *(f"-L{shlex.quote(folder)}" for folder in folders)],
            build_directory=str(work),
            is_python_module=False,
            with_cuda=toolkit is not None,
        )
    os.replace(work / f"{name}.so", library)  # all at once: whoever sees the file sees all of it
    library.with_suffix(".log").unlink(missing_ok=True)


@contextlib.contextmanager
def _using(cpp_extension: ModuleType, toolkit: Toolkit | None) -> Iterator[None]:
    """torch's own idea of where CUDA is, corrected."""
    before = cpp_extension.CUDA_HOME
    cpp_extension.CUDA_HOME = str(toolkit.home) if toolkit else before
    try:
        yield
    finally:
        cpp_extension.CUDA_HOME = before


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

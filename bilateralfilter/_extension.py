"""Finds the compiled operators, or compiles them, or falls back on plain PyTorch."""

import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import os
import shlex
import shutil
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

FOLDER = Path(__file__).resolve().parent
# without contraction of products and sums, which breaks ties of features that lie on the border of two simplices
FLAGS = ["-O3", "-fopenmp", "-ffp-contract=off"]
NVCC_FLAGS = ["-O3", "--extended-lambda", "--fmad=false"]
_lock = threading.Lock()
KEYS = {"cpu": "CPU", "cuda": "CUDA"}     # device type -> torch's name of its operators


def sources(cuda: bool) -> list[Path]:
    """The files to compile."""
    suffixes = (".cpp", ".cu") if cuda else (".cpp",)
    return sorted(path for path in (FOLDER / "csrc").iterdir() if path.suffix in suffixes)


def source_hash() -> str:
    """Ten letters that change with the sources and flags: a library made from others is never loaded."""
    texts = [path.read_bytes() for path in sorted((FOLDER / "csrc").iterdir())]
    return hashlib.sha1(b"".join([*texts, str(FLAGS + NVCC_FLAGS).encode()])).hexdigest()[:10]


def cuda_compiler() -> str | None:
    """Where nvcc is, if this torch has CUDA at all."""
    if torch.version.cuda is None:
        return None
    from torch.utils.cpp_extension import CUDA_HOME  # slow to import

    return shutil.which("nvcc", path=f"{CUDA_HOME}/bin") if CUDA_HOME else None


@torch.compiler.assume_constant_result
def load(device_type: str) -> bool:
    """Makes the operators be there for tensors on this type of device. Returns whether they are compiled ones.

    Takes those that `pip install ./bilateralfilter` compiled from these very sources, else those compiled earlier in
    this checkout (bilateralfilter/build/), else compiles them there: half a minute, two with CUDA; one process does
    while the others wait. What cannot be compiled is replaced by plain PyTorch operators; one warning says why.
    """
    with _lock:  # of threads; the one of processes is a file's
        return _load(device_type)


@functools.cache
def _load(device_type: str) -> bool:
    reason = _load_library()
    key = KEYS.get(device_type)
    if key is None or torch._C._dispatch_has_kernel_for_dispatch_key("bilateralfilter::build", key):
        return True  # other devices: torch says that it has no such operator
    from . import pytorch
    from .lattice import library

    reason = reason or f"the operators were compiled without {key}, for there was no nvcc"
    warnings.warn(f"bilateralfilter runs as slow plain PyTorch on {device_type}: {reason}", stacklevel=4)
    for name in ("build", "apply", "add_") + (("mean_field",) if key == "CPU" else ()):
        library.impl(name, getattr(pytorch, name), key)
    return False


@functools.cache
def _load_library() -> str:
    """Loads the compiled operators, after compiling them if need be; returns why not, or an empty string."""
    installed = importlib.util.find_spec(f"_bilateralfilter_{source_hash()}")
    if installed is not None:
        with contextlib.suppress(OSError):  # compiled for another torch
            torch.ops.load_library(installed.origin)
            return ""
    for kind in (_gpus(), "cpu") if torch.cuda.is_available() and cuda_compiler() else ("cpu",):
        library = _build_folder() / f"lattice-{source_hash()}-torch{torch.__version__}-{kind}.so"
        reason = "" if library.exists() else _compile(library, cuda=kind != "cpu")
        if not reason:
            torch.ops.load_library(library)
            break
    return reason


def _gpus() -> str:
    """What the code for the GPUs of this machine is called: `sm80-sm90`."""
    capabilities = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return "-".join(f"sm{major}{minor}" for major, minor in sorted(capabilities))


def _build_folder() -> Path:
    """build/ beside the sources, or, where nobody may write there, a folder of the user's."""
    folder = FOLDER / "build"
    with contextlib.suppress(OSError):
        folder.mkdir(exist_ok=True)
    if os.access(folder, os.W_OK):
        return folder
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "bilateralfilter"


def _compile(library: Path, cuda: bool) -> str:
    """Returns why it cannot be done, or an empty string."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    if shutil.which(compiler) is None:
        return f"no C++ compiler ({compiler} is not on PATH): install one (g++) or name it in CXX"
    work = library.with_suffix("")
    try:
        work.mkdir(parents=True, exist_ok=True)
        with _locked(library.with_suffix(".lock")):
            if not library.exists():  # nobody compiled it while we waited
                _compile_in(work, library, cuda)
    except OSError as error:
        return f"cannot write to {library.parent} ({error.strerror})"
    except RuntimeError as error:
        log = library.with_suffix(".log")
        log.write_text(str(error), encoding="utf-8")
        return f"the sources do not compile: see {log}"
    return ""


def _compile_in(work: Path, library: Path, cuda: bool) -> None:
    from torch.utils import cpp_extension

    print("compiling bilateralfilter, once (half a minute, two with CUDA)", file=sys.stderr, flush=True)
    (work / "lock").unlink(missing_ok=True)  # torch's own lock, left by a compilation that was killed
    with _on_path(Path(sys.executable).parent):  # ninja lives there when it came from pip
        cpp_extension.load(
            "lattice",
            [str(path) for path in sources(cuda)],
            extra_cflags=FLAGS,
            extra_cuda_cflags=NVCC_FLAGS,
            extra_ldflags=["-fopenmp"],
            build_directory=str(work),
            is_python_module=False,
            with_cuda=cuda,
        )
    os.replace(work / "lattice.so", library)  # all at once: whoever sees the file sees all of it


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

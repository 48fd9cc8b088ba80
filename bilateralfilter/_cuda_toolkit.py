"""Finds the CUDA compiler that fits: an nvcc of the installed torch's CUDA that can compile for the cards at hand."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

SYSTEM = Path("/usr/local/cuda")


class Toolkit(NamedTuple):
    home: Path  # what torch calls CUDA_HOME
    version: str  # 13.0
    architectures: tuple[str, ...]  # to compile for, of those it can: 90, 90a, 80+PTX

    def __str__(self) -> str:
        return f"{self.home}/bin/nvcc (CUDA {self.version}) for sm_{', sm_'.join(self.architectures)}"

    def flags(self) -> list[str]:
        """nvcc's, for the architectures."""
        pairs = [(name.removesuffix("+PTX"), name.endswith("+PTX")) for name in self.architectures]
        codes = [(name, f"sm_{name}") for name, _ in pairs] + [(name, f"compute_{name}") for name, ptx in pairs if ptx]
        flags = [f"-gencode=arch=compute_{name},code={code}" for name, code in codes]
        return [*flags, "--threads=0"] if len(flags) > 1 else flags  # each on a core


def cards() -> set[int]:
    """The GPUs of this machine by their compute capability: 90 for 9.0."""
    capabilities = (torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
    return {10 * major + minor for major, minor in capabilities}


def covers(architectures: Collection[str], cards: Collection[int]) -> bool:
    """Whether every card runs code for one of these: of its generation, not newer than itself, or any older PTX."""
    def runs(name: str, card: int) -> bool:
        code, feature, ptx = re.fullmatch(r"(\d+)([af]?)(\+PTX)?", name).groups()
        return int(code) == card or (not feature and int(code) < card and (ptx or int(code) // 10 == card // 10))

    return all(any(runs(name, card) for name in architectures) for card in cards)


def listed() -> list[str]:
    """TORCH_CUDA_ARCH_LIST, '8.0 9.0+PTX', as 80, 90+PTX; empty where it is not set or says it in other words."""
    names = re.split(r"[ ;,]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip())
    found = [re.fullmatch(r"(\d+)\.(\d[af]?(\+PTX)?)", name) for name in names]
    return [match[1] + match[2] for match in found] if all(found) else []


def find(cards: Collection[int]) -> Toolkit:
    """The first toolkit that fits, for the cards, or for TORCH_CUDA_ARCH_LIST where that covers them.

    Raises LookupError, with one line that says what to do, where there is none.
    """
    if torch.version.cuda is None:
        raise LookupError("this torch was built without CUDA")
    if not cards:
        raise LookupError("torch finds no GPU, and TORCH_CUDA_ARCH_LIST names none as in '8.0 9.0+PTX'")
    others = []
    for nvcc in _candidates():
        home, version, codes = _ask(nvcc)
        nearest = {max((c for c in codes if c <= card and c // 10 == card // 10), default=None) for card in cards}
        if version.split(".")[0] != torch.version.cuda.split(".")[0] or None in nearest:
            others.append(f"{nvcc}, CUDA {version}, does not fit")
            continue
        architectures = listed()
        possible = all(int(re.match(r"\d+", name)[0]) in codes for name in architectures)
        if not architectures or not possible or not covers(architectures, cards):
            architectures = [str(code) for code in sorted(nearest)]
            if os.environ.get("TORCH_CUDA_ARCH_LIST", "native") != "native":
                print(f"bilateralfilter: TORCH_CUDA_ARCH_LIST={os.environ['TORCH_CUDA_ARCH_LIST']} is not for the "
                      f"cards here, or not for CUDA {version}: compiling for the cards", file=sys.stderr)
        return Toolkit(home, version, tuple(architectures))
    names, found = ", ".join(f"sm_{card}" for card in sorted(cards)), "".join(f" ({other})" for other in others)
    todo = f"pip install '{package()}'" if package() else "install that CUDA toolkit"
    raise LookupError(f"no nvcc of CUDA {torch.version.cuda} for {names} was found{found}: {todo}")


def package() -> str:
    """What pip needs to install nvcc of the torch's very CUDA; empty for CUDA 12, whose wheels have no nvcc."""
    cuda = torch.version.cuda
    return f"cuda-toolkit[nvcc,cccl]=={cuda}.*" if cuda and int(cuda.split(".")[0]) >= 13 else ""


def missing() -> str:
    """What utils/install.sh has pip install: `package()`, or nothing where an nvcc fits or there is no card."""
    try:
        if cards():
            find(cards())
    except LookupError as error:
        if not package():
            print(f"warning: {error}", file=sys.stderr)
        return package()
    return ""


def _candidates() -> Iterator[Path]:
    """nvcc where the user says it is, on PATH, in the system's usual place, among pip's packages."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    places = [Path(home, "bin", "nvcc") for home in homes if home]
    places += [Path(shutil.which("nvcc") or ""), SYSTEM / "bin" / "nvcc"]
    pip = importlib.util.find_spec("nvidia")
    for folder in pip.submodule_search_locations if pip else ():
        places += sorted(Path(folder).glob("*/bin/nvcc"))
    return (place for place in dict.fromkeys(places) if os.access(place, os.X_OK) and place.is_file())


def _ask(nvcc: Path) -> tuple[Path, str, set[int]]:
    """The toolkit's folder, version and architectures. nvcc may be a script or a link that lies elsewhere."""
    def answer(pattern: str, *arguments: str) -> list[str]:
        try:
            run = subprocess.run([nvcc, *arguments], capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.SubprocessError):
            return []
        return re.findall(pattern, run.stdout + run.stderr, re.MULTILINE)

    tops = [Path(top).resolve() for top in answer(r"^#\$ TOP=(.*)$", "-v", "--dryrun", "-x", "cu", os.devnull)]
    homes = [*tops, nvcc.resolve().parent.parent, nvcc.parent.parent]
    version = answer(r"release (\d+\.\d+)", "--version") or ["unknown"]
    codes = {int(code) for code in answer(r"^sm_(\d+)$", "--list-gpu-code")}
    return next((home for home in homes if (home / "bin" / "nvcc").exists()), homes[-1]), version[0], codes


def runtime_folder(parent: Path) -> list[str]:
    """A folder with libcudart.so, as the linker wants it: the very one that torch runs on (pip's has another name)."""
    loaded = re.search(r"/.*/libcudart[^/]*$", Path("/proc/self/maps").read_text(), re.MULTILINE)
    if loaded is None:
        return []
    folder = parent / "cuda-runtime"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "libcudart.so").unlink(missing_ok=True)
    (folder / "libcudart.so").symlink_to(loaded[0])
    return [str(folder)]

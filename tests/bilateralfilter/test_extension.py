"""Compilation on first use: by one process, behind a lock; plain PyTorch and one warning when it cannot be done."""

import inspect
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from bilateralfilter import DenseCRF, _cuda_toolkit, _extension, bilateral_filter
from tests.bilateralfilter.slow import random, smooth_images


def test_one_compiles_while_the_others_wait(tmp_path, monkeypatch):
    compiled = []

    def slow(work: Path, library: Path, toolkit: None) -> None:
        compiled.append(work)
        time.sleep(0.2)
        library.write_text("done")

    monkeypatch.setattr(_extension, "_compile_in", slow)
    library = tmp_path / "build" / "lattice.so"
    with ThreadPoolExecutor(3) as pool:
        reasons = list(pool.map(lambda _: _extension._compile(library), range(3)))
    assert reasons == [""] * 3
    assert len(compiled) == 1
    assert library.read_text() == "done"


def test_no_compiler_is_one_plain_line(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -v")
    reason = _extension._compile(tmp_path / "lattice.so")
    assert reason.startswith("no C++ compiler (no-such-compiler is not on PATH)")
    assert "\n" not in reason
    assert not list(tmp_path.iterdir())


def test_a_failed_compilation_names_its_log_and_is_remembered(tmp_path, monkeypatch):
    tries = []

    def fail(work: Path, library: Path, toolkit: None) -> None:
        tries.append(work)
        raise RuntimeError("line 1\nline 2")

    monkeypatch.setattr(_extension, "_compile_in", fail)
    log = tmp_path / "lattice.log"
    for _ in range(2):
        reason = _extension._compile(tmp_path / "lattice.so")
        assert str(log) in reason and "delete it to try again" in reason
        assert "\n" not in reason
    assert len(tries) == 1
    assert log.read_text().endswith(")\nline 1\nline 2")
    compiler = tmp_path / "other"
    compiler.write_text("#!/bin/sh\necho other compiler\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    _extension._compile(tmp_path / "lattice.so")
    log.unlink()
    _extension._compile(tmp_path / "lattice.so")
    assert len(tries) == 3


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "build").write_text("a file where the folder should be")
    assert f"cannot write to {tmp_path / 'build'}" in _extension._compile(tmp_path / "build" / "lattice.so")


def test_what_was_compiled_in_a_checkout_that_cannot_be_written_is_loaded(tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr(_extension, "FOLDER", tmp_path)
    (tmp_path / "csrc").mkdir()
    library = tmp_path / "build" / f"{_extension.name_of('cpu', None, f'lattice-torch{torch.__version__}-')}.so"
    script(library, "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    assert _extension._load_library("cpu") == "" and loaded == [library]


def test_ninja_of_the_environment_is_found_during_compilation_only(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with _extension._on_path(Path(sys.executable).parent):
        assert os.environ["PATH"].split(":") == [str(Path(sys.executable).parent), "/nowhere"]
    assert os.environ["PATH"] == "/nowhere"


def test_the_library_is_named_after_all_sources(tmp_path, monkeypatch):
    before = _extension.source_hash()
    folder = shutil.copytree(_extension.FOLDER / "csrc", tmp_path / "csrc")
    monkeypatch.setattr(_extension, "FOLDER", tmp_path)
    assert _extension.source_hash() == before
    for path in folder.iterdir():
        text = path.read_bytes()
        path.write_bytes(text + b" ")
        assert _extension.source_hash() != before
        path.write_bytes(text)


def filtered(images, maps):
    """The filter of float32 and of float64 maps, each with its gradient."""
    found = []
    for m in (maps, maps.double()):
        m = m.requires_grad_()
        out = bilateral_filter(images, m, 15, 20)
        out.square().sum().backward()
        found += [out.detach(), m.grad]
    return found


FALLBACK = inspect.getsource(filtered) + """
import sys
import warnings
import torch

sys.path.insert(0, sys.argv[1])
from bilateralfilter import DenseCRF, _cuda_toolkit, _extension, bilateral_filter

images, maps, prob = torch.load(sys.argv[2])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    outs = filtered(images, maps)
    outs += [DenseCRF(iterations=3)(images, prob), DenseCRF(iterations=3, compatibility=-torch.eye(3))(images, prob)]
    compiled = torch.compile(bilateral_filter, fullgraph=True, backend="aot_eager")
    outs.append(compiled(images, maps, 15.0, 20.0).detach())
ours = [str(w.message) for w in caught if "bilateralfilter" in str(w.message)]
assert not _extension.load("cpu")
torch.save((outs, ours), sys.argv[3])
"""


@pytest.mark.skipif(not _extension.load("cpu"), reason="nothing can be compiled here")
def test_falls_back_on_plain_pytorch_with_one_warning(tmp_path):
    package = tmp_path / "bilateralfilter"
    shutil.copytree(_extension.FOLDER, package, ignore=shutil.ignore_patterns("build", "__pycache__"))
    images, maps, prob = smooth_images(2, 17, 15), random(2, 5, 17, 15), random(2, 3, 17, 15)
    torch.save((images, maps, prob), tmp_path / "in.pt")
    # -I: neither the checkout nor PYTHONPATH
    command = [sys.executable, "-I", "-c", FALLBACK, str(tmp_path), str(tmp_path / "in.pt"), str(tmp_path / "out.pt")]
    environment = {**os.environ, "CXX": "no-such-compiler"}
    run = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    outs, warned = torch.load(tmp_path / "out.pt")
    assert len(warned) == 1
    assert "slow plain PyTorch on cpu: no C++ compiler (no-such-compiler is not on PATH)" in warned[0]

    expected = filtered(images, maps)
    for out, same in zip(outs, expected, strict=False):
        assert out.dtype == same.dtype
        assert (out - same).abs().max() <= (2e-6 if out.dtype == torch.float32 else 1e-14) * same.abs().max()
    assert (outs[4] - DenseCRF(iterations=3)(images, prob)).abs().max() <= 2e-5
    assert (outs[5] - outs[4]).abs().max() <= 2e-5
    assert (outs[6] - expected[0]).abs().max() <= 2e-6 * expected[0].max()


@pytest.mark.skipif(not _extension.load("cpu"), reason="nothing can be compiled here")
def test_load_says_whether_operators_are_compiled_and_loads_once():
    libraries = set(torch.ops.loaded_libraries)
    assert _extension.load("cpu") is True
    assert set(torch.ops.loaded_libraries) == libraries
    assert any(_extension.source_hash() in str(path) for path in libraries)


# ---- CUDA, without a GPU: nvcc is a script that writes down what it is asked to compile, and fails ----

NVCC = """#!/bin/sh
case "$*" in
    --version) echo "Cuda compilation tools, release {version}, V{version}.88" ;;
    --list-gpu-code) printf 'sm_80\\nsm_86\\nsm_90\\n' ;;
    *--dryrun*) echo "#$ TOP={home}/bin/.." >&2 ;;
    *) echo "$0 $*" >> {log}; echo "no such luck" >&2; exit 1 ;;
esac
"""
MACHINE = """
import sys
import torch

sys.path[:0] = sys.argv[1:]
torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1
torch.cuda.get_device_capability = lambda *_: (9, 0)
from bilateralfilter import _extension
print(_extension.load("cuda"))
"""


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def stub(home: Path, version: str = torch.version.cuda) -> Path:
    return script(home / "bin" / "nvcc", NVCC.format(version=version, home=home, log=home / "log"))


@pytest.fixture
def machine(tmp_path):
    """Starts Pythons that see a GPU, with a copy of the package and a C++ compiler that fails; returns their words."""
    shutil.copytree(_extension.FOLDER, tmp_path / "copy/bilateralfilter", ignore=shutil.ignore_patterns("build"))
    script(tmp_path / "c++", f"""#!/bin/sh\n[ "$1" != -MMD ] && exec {shutil.which('c++')} "$@"\nexit 1\n""")

    def run(path: Path, count: int = 1, installed: Path = tmp_path, **environment: str) -> list[str]:
        kept = {name: value for name, value in os.environ.items() if name not in ("CUDA_HOME", "CUDA_PATH")}
        kept.update(environment, CXX=str(tmp_path / "c++"), PATH=f"{path}:{os.environ['PATH']}")
        command = [sys.executable, "-I", "-c", MACHINE, str(tmp_path / "copy"), str(installed)]
        runs = [subprocess.Popen(command, env=kept, stdout=-1, stderr=-1, text=True) for _ in range(count)]
        words = [run.communicate() for run in runs]
        assert [run.returncode for run in runs] == [0] * count, words
        assert [out for out, _ in words] == ["False\n"] * count
        return [error for _, error in words]

    return run


needs_cuda = pytest.mark.skipif(torch.version.cuda is None, reason="a torch without CUDA")


@needs_cuda
def test_nvcc_fails_once_for_all_processes(machine, tmp_path):
    nvcc = stub(tmp_path / "toolkit")
    words = machine(nvcc.parent, count=2) + machine(nvcc.parent)
    assert len((tmp_path / "toolkit/log").read_text().splitlines()) == 1
    log, = (tmp_path / "copy/bilateralfilter/build").glob("*.log")
    assert "no such luck" in log.read_text()
    for error in words:
        assert f"slow plain PyTorch on cuda: the sources do not compile: see {log}" in error
    said = [line for error in words for line in error.splitlines() if line.startswith("compiling")]
    assert said == [f"compiling bilateralfilter, once (with {nvcc} (CUDA {torch.version.cuda}) for sm_90, two minutes; "
                    f"if it fails, see {log})"]


@needs_cuda
def test_a_script_that_calls_nvcc_is_looked_through_and_the_card_at_hand_compiled_for(machine, tmp_path):
    nvcc = stub(tmp_path / "toolkit")
    wrapper = script(tmp_path / "bin" / "nvcc", f'#!/bin/sh\nexec {nvcc} "$@"\n')
    error, = machine(wrapper.parent, TORCH_CUDA_ARCH_LIST="7.5")
    called = (tmp_path / "toolkit/log").read_text()
    assert f"-isystem {tmp_path}/toolkit/include" in called
    assert f"-isystem {tmp_path}/include" not in called
    assert re.findall("code=sm_([0-9]+)", called) == ["90"]
    log, = (tmp_path / "copy/bilateralfilter/build").glob("*.log")
    assert log.stem.endswith("_cuda_sm90")
    assert "TORCH_CUDA_ARCH_LIST=7.5 is not for the cards here" in error


@needs_cuda
@pytest.mark.skipif(not _extension.load("cpu"), reason="nothing can be compiled here")
def test_an_installed_library_without_cuda_is_not_taken_for_cuda(machine, tmp_path):
    library = next(path for path in torch.ops.loaded_libraries if _extension.source_hash() in str(path))
    shutil.copy(library, tmp_path / f"{_extension.name_of('cpu', None)}.so")
    shutil.copy(library, tmp_path / f"{_extension.name_of('cuda', None)}_sm80.so")  # for older cards
    machine(stub(tmp_path / "toolkit").parent)
    assert "code=sm_90" in (tmp_path / "toolkit/log").read_text()


@pytest.mark.parametrize(("architectures", "cards", "answer"), [
    (["90"], {90}, True), (["80"], {86}, True), (["86"], {80}, False), (["80"], {90}, False), (["80+PTX"], {120}, True),
    (["90a"], {90}, True), (["100a+PTX"], {103}, False), (["80", "90"], {80, 90}, True), (["80"], {80, 90}, False),
    ([], {90}, False), ([], set(), True),
])
def test_which_cards_run_what(architectures, cards, answer):
    assert _cuda_toolkit.covers(architectures, cards) is answer


@needs_cuda
def test_the_first_nvcc_that_fits_is_taken(tmp_path, monkeypatch, capsys):
    major, _ = torch.version.cuda.split(".")
    monkeypatch.setenv("CUDA_HOME", str(stub(tmp_path / "a", "11.8").parents[1]))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "native")
    monkeypatch.setenv("PATH", f"{stub(tmp_path / 'b', f'{major}.7').parent}:{os.environ['PATH']}")
    monkeypatch.setattr(_cuda_toolkit, "SYSTEM", tmp_path)
    monkeypatch.setattr(_cuda_toolkit.importlib.util, "find_spec", lambda name: None)
    assert _cuda_toolkit.find({80, 90}) == (tmp_path / "b", f"{major}.7", ("80", "90"))
    assert _cuda_toolkit.find({87}).architectures == ("86",)
    for wanted, architectures in (("8.0 9.0", ("80", "90")), ("8.0+PTX;9.0a", ("80+PTX", "90a")), ("8.6", ("90",)),
                                  ("Hopper", ("90",)), ("5.0 9.0", ("90",))):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wanted)
        assert _cuda_toolkit.find({90}).architectures == architectures
        assert bool(capsys.readouterr().err) == (architectures == ("90",))
    monkeypatch.setattr(_cuda_toolkit, "cards", lambda: {120})
    with pytest.raises(LookupError) as caught:
        _cuda_toolkit.find({120})
    for part in ("for sm_120", f"{tmp_path}/a/bin/nvcc, CUDA 11.8", f"{tmp_path}/b/bin/nvcc", _cuda_toolkit.missing()):
        assert part in str(caught.value)
    if int(major) >= 13:
        assert _cuda_toolkit.missing() == f"cuda-toolkit[nvcc,cccl]=={torch.version.cuda}.*"
    monkeypatch.setattr(_cuda_toolkit, "cards", set)
    assert _cuda_toolkit.missing() == ""

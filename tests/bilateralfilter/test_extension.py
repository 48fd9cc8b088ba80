"""Compilation on first use: by one process, behind a lock; plain PyTorch and one warning when it cannot be done."""

import inspect
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from bilateralfilter import DenseCRF, _extension, bilateral_filter
from tests.bilateralfilter.slow import random, smooth_images


def test_one_compiles_while_the_others_wait(tmp_path, monkeypatch):
    compiled = []

    def slow(work: Path, library: Path, cuda: bool) -> None:
        compiled.append(work)
        time.sleep(0.2)
        library.write_text("done")

    monkeypatch.setattr(_extension, "_compile_in", slow)
    library = tmp_path / "build" / "lattice.so"
    with ThreadPoolExecutor(3) as pool:
        reasons = list(pool.map(lambda _: _extension._compile(library, False), range(3)))
    assert reasons == [""] * 3
    assert len(compiled) == 1
    assert library.read_text() == "done"


def test_no_compiler_is_one_plain_line(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -v")
    reason = _extension._compile(tmp_path / "lattice.so", False)
    assert reason.startswith("no C++ compiler (no-such-compiler is not on PATH)")
    assert "\n" not in reason
    assert not list(tmp_path.iterdir())


def test_a_failed_compilation_names_its_log(tmp_path, monkeypatch):
    def fail(work: Path, library: Path, cuda: bool) -> None:
        raise RuntimeError("line 1\nline 2")

    monkeypatch.setattr(_extension, "_compile_in", fail)
    reason = _extension._compile(tmp_path / "lattice.so", False)
    log = tmp_path / "lattice.log"
    assert str(log) in reason
    assert "\n" not in reason
    assert log.read_text() == "line 1\nline 2"


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "build").write_text("a file where the folder should be")
    assert f"cannot write to {tmp_path / 'build'}" in _extension._compile(tmp_path / "build" / "lattice.so", False)


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
from bilateralfilter import DenseCRF, _extension, bilateral_filter

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

"""Compilation on first use: by one process, behind a lock, with one line when it cannot be done."""

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from bilateralfilter import _extension, bilateral_filter
from utils.errors import UserError


def test_one_compiles_while_the_others_wait(tmp_path, monkeypatch):
    compiled = []

    def slow(work: Path, library: Path) -> None:
        compiled.append(work)
        time.sleep(0.2)
        library.write_text("done")

    monkeypatch.setattr(_extension, "_compile_in", slow)
    library = tmp_path / "build" / "filter.so"
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(_extension._compile, [library] * 3))
    assert len(compiled) == 1
    assert library.read_text() == "done"


def test_no_compiler_is_one_plain_line(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -v")
    with pytest.raises(UserError, match="no C\\+\\+ compiler \\(no-such-compiler is not on PATH\\)") as error:
        _extension._compile(tmp_path / "filter.so")
    assert "\n" not in str(error.value)


def test_a_failed_compilation_names_its_log(tmp_path, monkeypatch):
    def fail(work: Path, library: Path) -> None:
        raise RuntimeError("line 1\nline 2")

    monkeypatch.setattr(_extension, "_compile_in", fail)
    with pytest.raises(UserError, match="see .*filter.log") as error:
        _extension._compile(tmp_path / "filter.so")
    assert "\n" not in str(error.value)
    assert (tmp_path / "filter.log").read_text() == "line 1\nline 2"


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "build").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="cannot write to .*build"):
        _extension._compile(tmp_path / "build" / "filter.so")


def test_ninja_of_the_environment_is_found_during_compilation_only(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with _extension._on_path(Path(sys.executable).parent):
        assert _extension.os.environ["PATH"].split(":") == [str(Path(sys.executable).parent), "/nowhere"]
    assert _extension.os.environ["PATH"] == "/nowhere"


def test_setup_compiles_with_the_same_flags():
    assert str(_extension.FLAGS).replace("'", '"') in (_extension.FOLDER / "setup.py").read_text()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_maps_of_a_gpu_come_back_to_it():
    images, maps = torch.rand(1, 3, 9, 9) * 255, torch.rand(1, 2, 9, 9)
    out = bilateral_filter(images.cuda(), maps.cuda(), 15, 50)
    assert out.is_cuda
    assert torch.equal(out.cpu(), bilateral_filter(images, maps, 15, 50))

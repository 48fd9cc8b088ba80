"""utils/install.sh: makes .venv once, and says what it lacks."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def house(tmp_path):
    """A project without requirements, so that nothing is downloaded."""
    root = tmp_path / "a house"
    (root / "utils").mkdir(parents=True)
    shutil.copy(ROOT / "utils/install.sh", root / "utils")
    (root / "requirements.txt").write_text("")
    return root


def install(house, path=os.environ["PATH"]):
    command = ["bash", str(house / "utils/install.sh"), "requirements.txt"]
    environment = {**os.environ, "PATH": path}
    return subprocess.run(command, cwd=house.parent, env=environment, capture_output=True, text=True, timeout=120)


def test_the_second_call_does_nothing(house):
    first = install(house)
    assert first.returncode == 0 and "making" in first.stdout and "installing" in first.stdout, first.stderr
    second = install(house)
    assert (second.returncode, second.stdout) == (0, "")
    (house / "requirements.txt").write_text("# other requirements\n")
    assert "installing" in install(house).stdout


def test_no_python_that_is_new_enough(house, tmp_path):
    for name in ("python3", "python3.13", "python3.12", "python3.11", "python3.10"):
        (tmp_path / name).write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.1\nexit 1\n')
        (tmp_path / name).chmod(0o755)
    result = install(house, f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert result.returncode == 2
    assert result.stderr.startswith("error: Python 3.10 or newer is needed, found Python 3.9.1")


@pytest.mark.parametrize(("cards", "needed", "status"), [
    ("GPU 0: NVIDIA H100", "cuda-toolkit[nvcc,cccl]==13.0.*", 0), ("GPU 0: NVIDIA H100", "cuda-toolkit[nvcc]==0", 1),
    ("GPU 0: NVIDIA H100", "", 0), ("No devices found.", "cuda-toolkit[nvcc,cccl]==13.0.*", 0),
])
def test_nvcc_of_pip_is_installed_once_where_a_gpu_lacks_one(house, tmp_path, cards, needed, status):
    """Python and nvidia-smi are scripts here: the one says which nvcc is needed and writes down what pip is to do."""
    for path, lines in {
        tmp_path / "nvidia-smi": f"echo '{cards}'\nsleep 0.2\necho '{cards}'",   # line by line
        house / ".venv/bin/python": f"""case "$*" in
            *missing*) echo '{needed}' ;;
            *"pip install"*)
                echo "$*" >> '{tmp_path}/pip'
                case "$*" in *cuda-toolkit*) echo ERROR >&2; exit {status} ;; esac ;;
            esac""",
    }.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{lines}\n")
        path.chmod(0o755)
    results = [install(house, f"{tmp_path}{os.pathsep}{os.environ['PATH']}") for _ in range(2)]
    assert [result.returncode for result in results] == [0, 0]
    asked = [line.rpartition(" ")[2] for line in (tmp_path / "pip").read_text().splitlines()[1:]]
    assert asked == ([needed] if needed and cards.startswith("GPU") else [])
    warnings = [line for result in results for line in result.stderr.splitlines()]
    assert len(warnings) == status
    assert all(line.startswith("warning: nvcc was not installed") and needed in line for line in warnings)

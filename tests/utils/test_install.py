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

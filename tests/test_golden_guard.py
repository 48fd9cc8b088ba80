"""tests/goldens/plugin.py: a golden that no test compares makes the run fail."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]

TESTS = """
def test_a(golden):
    assert golden("more/a.npz")["x"] == 1

def test_b(golden):
    assert golden.files("more/*") == ["more/a.npz", "more/b.txt"]
    assert golden("more/b.txt") == "text"
"""


@pytest.fixture
def project(tmp_path):
    """A project with tests/goldens and two goldens; "other" is of a method it does not have."""
    (tmp_path / "tests/goldens").mkdir(parents=True)
    shutil.copy(ROOT / "tests/goldens/plugin.py", tmp_path / "tests/goldens")
    (tmp_path / "tests/conftest.py").write_text('pytest_plugins = ["tests.goldens.plugin"]')
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "tests/test_slow.py").write_text("import pytest\n\n@pytest.mark.slow\ndef test_slow(): ...\n")
    for method in ("more", "other"):
        (tmp_path / "goldens" / method).mkdir(parents=True)
        np.savez(tmp_path / "goldens" / method / "a.npz", x=1)
        (tmp_path / "goldens" / method / "b.txt").write_text("text")
    return tmp_path


def run(project, tests, *arguments, goldens="goldens"):
    (project / "tests/goldens/test_goldens.py").write_text(tests)
    environment = {**os.environ, "GOLDENS_DIR": str(project / goldens)}
    environment.pop("PYTEST_ADDOPTS", None)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("arguments", [[], ["-n", "2"]])
def test_everything_compared(project, arguments):
    result = run(project, TESTS, *arguments)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("arguments", [[], ["tests/goldens"], ["-n", "2"]])
def test_an_uncompared_golden_fails_the_run(project, arguments):
    result = run(project, TESTS.partition("def test_b")[0], *arguments)
    assert result.returncode == 1
    assert "ERROR goldens that no test compared: more/b.txt\n" in result.stdout


@pytest.mark.parametrize("arguments", [
    ["-k", "test_a"], ["-k", "test_a", "-n", "2"], ["tests/goldens/test_goldens.py::test_a"], ["--collect-only"],
])
def test_a_part_of_the_tests_may_leave_goldens(project, arguments):
    assert run(project, TESTS, *arguments).returncode == 0


def test_without_goldens_the_tests_are_skipped(project):
    result = run(project, TESTS, goldens="nowhere")
    assert result.returncode == 0 and "2 skipped" in result.stdout and "set GOLDENS_DIR" in result.stdout

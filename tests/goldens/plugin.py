"""Access to the goldens, and the guard that none of them stays uncompared: a plugin of pytest, see tests/conftest.py.

The folder is $GOLDENS_DIR, by default ../shared/goldens next to the project. A file counts as compared once a test
took it from the fixture `golden`. When this whole folder of tests was run, a file that no test took fails the run;
pytest-xdist's workers tell the process that started them what they took.
"""

import os
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
METHODS = ("more", "afa", "acr")  # the folders of goldens whose method the project has
ENDINGS = (".npz", ".safetensors", ".txt")


class Goldens:
    """Takes files: golden("more/par.npz") gives arrays, a .safetensors a dict of tensors, a .txt its text."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.taken: set[str] = set()
        self.deselected = False

    def files(self, pattern: str = "*") -> list[str]:
        """Names such as "more/par.npz" of the goldens that match `pattern`."""
        self._skip_without_folder()
        return [name for name in self._all() if Path(name).match(pattern)]

    def path(self, name: str) -> Path:
        """The file, which from now on counts as compared; the test is skipped where there are no goldens."""
        self._skip_without_folder()
        self.taken.add(name)
        return self.folder / name

    def __call__(self, name: str):
        path = self.path(name)
        if path.suffix == ".npz":
            return np.load(path, allow_pickle=False)
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file  # here, as it takes a second to import

            return load_file(path)
        return path.read_text(encoding="utf-8")

    def uncompared(self) -> list[str]:
        """Names of the goldens that no test took."""
        return [name for name in self._all() if name not in self.taken]

    def _all(self) -> list[str]:
        found = [path for method in METHODS for path in (self.folder / method).rglob("*") if path.suffix in ENDINGS]
        return sorted(path.relative_to(self.folder).as_posix() for path in found)

    def _skip_without_folder(self) -> None:
        if not self.folder.is_dir():
            pytest.skip(f"no goldens: {self.folder} does not exist (set GOLDENS_DIR)")


GOLDENS = Goldens(Path(os.environ.get("GOLDENS_DIR") or ROOT.parent / "shared" / "goldens").resolve())


@pytest.fixture(scope="session")
def golden() -> Goldens:
    return GOLDENS


def pytest_deselected(items):
    GOLDENS.deselected |= any(HERE in item.path.parents for item in items)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    taken, deselected = getattr(node, "workeroutput", {}).get("goldens", ((), False))
    GOLDENS.taken.update(taken)
    GOLDENS.deselected |= deselected


def _everything_was_run(session: pytest.Session) -> bool:
    """Whether no option or argument left out a test of this folder."""
    config = session.config
    left_out = (config.option.collectonly, config.option.ignore, config.option.ignore_glob, GOLDENS.deselected)
    if any(left_out) or session.shouldstop or session.shouldfail:
        return False
    selected = [(config.invocation_params.dir / argument).resolve() for argument in config.args if "::" not in argument]
    return any(HERE.is_relative_to(path) for path in selected)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["goldens"] = sorted(GOLDENS.taken), GOLDENS.deselected
    elif exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) and _everything_was_run(session):
        left = GOLDENS.uncompared()
        if left:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
            reporter = session.config.pluginmanager.get_plugin("terminalreporter")
            reporter.write_line("")
            reporter.write_line(f"ERROR goldens that no test compared: {', '.join(left)}", red=True)

"""What a run came from."""

import importlib.metadata
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from engine.config import RunConfig, portable, save_config
from utils.files import ROOT, naming

PACKAGES = ("torch", "torchvision", "timm", "numpy", "opencv-python-headless", "pydensecrf2", "safetensors")


def save_provenance(config: RunConfig, folder: str | os.PathLike, iteration: int = 0, changed: str = "") -> None:
    """Writes what a run came from into its folder.

    config.yaml: the resolved config of a start at iteration 0. provenance.jsonl: one line for each start (a resumed run
    adds one) with the time, the iteration, what changed in the config since, in words, the whole config, the command
    line, the git commit (null outside of git) and the versions of Python and of the packages.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if iteration == 0:
        save_config(config, folder / "config.yaml")
    start = {
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        "iteration": iteration,
        "settings_changed": changed,
        "settings": portable(config),
        "command": [sys.executable, *sys.argv],
        **_git_commit(),
        "versions": {"python": sys.version.split()[0], **{name: _version(name) for name in PACKAGES}},
    }
    path = folder / "provenance.jsonl"
    with naming(path), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(start) + "\n")


def _git_commit() -> dict[str, Any]:
    """{'commit': hash or None, 'changed': whether tracked files differ from it} of the folder this code lies in."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != ROOT:
            return {"commit": None, "changed": None}
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "changed": None}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None

"""What happens to a method: training, inference, evaluation, checkpoints."""

import importlib.util
from pathlib import Path

from utils.files import ROOT

PACKAGES = ("benchmarks", "bilateralfilter", "datasets", "model", "report", "utils")

for _name in PACKAGES:   # Hugging Face, too, has a package `datasets`
    _spec = importlib.util.find_spec(_name)
    _place = _spec.origin if _spec else "nowhere"
    if ROOT not in Path(_place or "/").resolve().parents:
        raise ImportError(
            f"{_place} hides this project's package '{_name}': use an environment without it (run_demo.sh makes one in "
            f".venv), or set PYTHONPATH={ROOT}"
        )

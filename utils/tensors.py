"""torch files of strangers."""

import warnings
from pathlib import Path
from typing import Any, BinaryIO

import torch


def load_tensors(file: BinaryIO | Path) -> Any:
    """What a torch file holds, on the CPU. Runs no code of the file and warns of nothing; may raise anything."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")   # of odd files, which are refused all the same
        return torch.load(file, map_location="cpu", weights_only=True)

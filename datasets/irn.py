"""The files of irn's make_cam (Ahn et al., CVPR 2019): maps of an image's classes in a pickled dictionary."""

import io
import pickle
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from utils.errors import UserError

IRN_NAMES = {"numpy.ndarray", "numpy.dtype", "numpy.core.multiarray._reconstruct", "numpy.core.numeric._frombuffer",
             "collections.OrderedDict", "torch._utils._rebuild_tensor_v2"}   # what arrays and tensors are made with


def irn_ids(path: Path, bkg: float, num_ids: int, size: tuple[int, int]) -> np.ndarray:
    """Ids uint8 (H, W) of a file as irn's make_cam writes it: the largest map's class, 0 where it is <= bkg.

    The maps are high_res; where there is none, cam brought to `size` (H, W). num_ids: K + 1. No code of the file runs.
    Raises UserError, naming the file, for any other content.
    """
    try:
        with open(path, "rb") as file:
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_1_0(file)
            content = _IrnReader(file).load().item()
        which = "high_res" if "high_res" in content else "cam"
        keys, maps = (torch.tensor(np.asarray(content[name])) for name in ("keys", which))
        if len(keys) == len(maps) == 0:
            return np.zeros(size, np.uint8)
        maps = maps.float() if which == "high_res" else F.interpolate(maps[None].float(), size, mode="bilinear")[0]
        if keys.shape != maps.shape[:-2] or not maps.isfinite().all() or ((keys < 0) | (keys >= num_ids - 1)).any():
            raise ValueError(f"finite maps {tuple(maps.shape)} of keys {keys.tolist()}, which are 0..{num_ids - 2}?")
    except Exception as error:   # a broken pickle can raise anything
        raise UserError(f"{path}: no dictionary of keys and high_res or cam, as irn's ({error!r})") from None
    value, index = maps.max(0)
    return np.array([0, *(keys + 1)], np.uint8)[torch.where(value <= bkg, 0, index + 1)]


class _IrnReader(pickle.Unpickler):
    """Knows what arrays and tensors are made with, and nothing else."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return lambda data: torch.load(io.BytesIO(data), "cpu", weights_only=True)
        if f"{module}.{name}".replace("numpy._core", "numpy.core") not in IRN_NAMES:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)

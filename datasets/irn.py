"""The files of irn's make_cam (Ahn et al., CVPR 2019): maps of an image's classes in a pickled dictionary."""

import io
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from datasets.onehot import Reader, read_dictionary
from utils.errors import UserError
from utils.tensors import load_tensors


def irn_ids(path: Path, bkg: float, num_ids: int, size: tuple[int, int]) -> np.ndarray:
    """Ids uint8 (H, W) of a file as irn's make_cam writes it: the largest map's class, 0 where it is <= bkg.

    The maps are high_res; where there is none, cam brought to `size` (H, W). num_ids: K + 1. No code of the file runs.
    Raises UserError, naming the file, for any other content.
    """
    try:
        content = read_dictionary(path.read_bytes(), _IrnReader)
        which = "high_res" if "high_res" in content else "cam"
        keys, maps = _values(content["keys"]), _values(content[which])
        if len(keys) == len(maps) == 0:
            return np.zeros(size, np.uint8)
        whole = keys.dtype.kind in "iu" and keys.ndim == 1 and 0 <= keys.min() <= keys.max() < num_ids - 1
        whole = whole and keys.shape == maps.shape[:-2] and len(keys) < num_ids and maps.dtype.kind in "fiu"
        with np.errstate(over="ignore"):
            maps = maps.astype(np.float32) if whole else maps
        if not whole or not np.isfinite(maps).all():
            raise ValueError(f"finite maps {maps.shape} of keys {keys.tolist()}, which are 0..{num_ids - 2}?")
        maps = torch.tensor(maps)
        maps = maps if which == "high_res" else F.interpolate(maps[None], size, mode="bilinear")[0]
        value, index = maps.max(0)
        return np.array([0, *(keys + 1)], np.uint8)[torch.where(value <= bkg, 0, index + 1)]
    except Exception as error:   # a broken pickle can raise anything
        raise UserError(f"{path}: no dictionary of keys and high_res or cam, as irn's ({error!r})") from None


def _values(recorded: object) -> np.ndarray:
    if isinstance(recorded, Tensor | list | tuple):
        return np.asarray(recorded)
    return recorded.values()


class _IrnReader(Reader):
    """Knows the tensors of torch, too."""

    def __init__(self, stream: io.BytesIO):
        super().__init__(stream)

        def load(data: bytes) -> object:
            return load_tensors(io.BytesIO(data))

        def rebuild(storage: object, offset: int, shape: tuple, strides: tuple, *_: object) -> Tensor:
            flat = torch._utils._rebuild_tensor(storage, 0, (storage._size(),), (1,))
            if math.prod(shape) > len(flat):   # strides of 0 would make any size of it
                raise ValueError(f"a tensor {shape} of {len(flat)} numbers")
            return flat.as_strided(shape, strides, offset)   # raises where that goes over its end

        self.names |= {("torch.storage", "_load_from_bytes"): load, ("torch._utils", "_rebuild_tensor_v2"): rebuild}

"""Reader of the released cls_labels_onehot.npy: a pickled dictionary, read without executing anything it asks for.

A pickle names functions and their arguments. Here every name it may use stands for a small recorder of our own, and
any other name is refused, so the file can choose values but never code. The arrays are built afterwards.
"""

import io
import math
import pickle
import re
from collections import Counter
from pathlib import Path

import numpy as np

from utils.errors import UserError

_KINDS = re.compile(r"f[248]|[iu][1248]|b1|[US]\d{1,4}")   # numbers, truth values, names
_VOC_NUMBER = re.compile(r"20\d{8}")   # 2007000032 of 2007_000032, as irn's lists have it


class _Dtype:
    """Stands for numpy.dtype(kind, align, copy): keeps the kind and the byte order."""

    __slots__ = ("kind", "order")

    def __init__(self, kind: str, *_: object):
        self.kind, self.order = kind, "="

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1]

    def numpy(self) -> np.dtype:
        if not _KINDS.fullmatch(self.kind) or self.order not in ("<", ">", "|", "="):
            raise ValueError(f"arrays of type {self.kind!r} are not read")
        return np.dtype(self.order + self.kind)


class _Array:
    """Stands for an array: its state is (version, shape, dtype, Fortran order, bytes)."""

    __slots__ = ("data", "dtype", "order", "shape")

    def __setstate__(self, state: tuple) -> None:
        _, self.shape, self.dtype, fortran, self.data = state
        self.order = "F" if fortran else "C"

    def values(self) -> np.ndarray:
        """The array of numbers."""
        if not isinstance(self.dtype, _Dtype) or not isinstance(self.data, bytes):
            raise ValueError("no plain array of numbers")
        dtype = self.dtype.numpy()
        if len(self.data) != math.prod(self.shape) * dtype.itemsize:
            raise ValueError("an array is cut short")
        return np.frombuffer(self.data, dtype).reshape(self.shape, order=self.order)

    def vector(self) -> np.ndarray:
        """The labels of an image."""
        if isinstance(self.data, list) and len(self.shape) <= 1:   # of objects
            return _vector(self.data if self.shape else self.data[0])
        if len(self.shape) > 1:
            raise ValueError("a label is not a plain vector of numbers")
        with np.errstate(all="ignore"):   # numbers that are no labels are refused later
            return self.values().astype(np.float32)


class Reader(pickle.Unpickler):
    """Unpickler that knows a handful of names, all of them recorders, which are made anew for every file."""

    def __init__(self, stream: io.BytesIO):
        super().__init__(stream)

        class ArrayType:
            """Stands for numpy.ndarray, which only ever is an argument."""

        def reconstruct(*_: object) -> _Array:
            return _Array()

        def frombuffer(data: bytes, dtype: _Dtype, shape: tuple, order: str) -> _Array:
            if not isinstance(data, bytes | bytearray):   # bytes(10**12) would ask for a terabyte
                raise ValueError("a label vector without bytes")
            array = _Array()
            array.__setstate__((1, shape, dtype, order == "F", bytes(data)))
            return array

        def scalar(dtype: _Dtype, data: bytes) -> object:
            return np.frombuffer(data, dtype.numpy())[0].item()

        def encode(text: str, encoding: str) -> bytes:
            if encoding != "latin1":
                raise pickle.UnpicklingError(f"text encoded as {encoding!r} is not read")
            return text.encode("latin1")

        self.names = {
            ("numpy.core.multiarray", "_reconstruct"): reconstruct,
            ("numpy._core.multiarray", "_reconstruct"): reconstruct,
            ("numpy.core.multiarray", "scalar"): scalar,
            ("numpy._core.multiarray", "scalar"): scalar,
            ("numpy.core.numeric", "_frombuffer"): frombuffer,
            ("numpy._core.numeric", "_frombuffer"): frombuffer,
            ("numpy", "ndarray"): ArrayType,
            ("collections", "OrderedDict"): dict,
            ("numpy", "dtype"): _Dtype,
            ("_codecs", "encode"): encode,
        }

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in self.names:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which such files do not need")
        return self.names[module, name]


def read_onehot(path: Path) -> dict[str, np.ndarray]:
    """The dictionary name -> float32 (K,) of a cls_labels_onehot.npy, without executing any of the pickle's code.

    A number such as 2007000032 names the image 2007_000032. Raises UserError when the file is missing, broken, holds
    something else, two keys of one image among it, or asks for any other function.
    """
    try:
        content = read_dictionary(path.read_bytes())
        names = [_name(key) for key in content]
        if len({*names}) < len(names):
            raise ValueError(f"two keys are of the image {Counter(names).most_common(1)[0][0]}")
        return dict(zip(names, map(_vector, content.values()), strict=True))
    except FileNotFoundError:
        raise UserError(f"{path}: file of image labels is missing") from None
    except Exception as error:  # a hostile pickle can raise anything; whatever it is, the file is not a label file
        reason = str(error) or type(error).__name__
        raise UserError(f"{path}: not a dictionary of image labels ({' '.join(reason.split())})") from None


def _name(key: object) -> str:
    if isinstance(key, int) and _VOC_NUMBER.fullmatch(str(key)):
        return f"{key // 10**6}_{key % 10**6:06d}"
    if not isinstance(key, str | bytes):
        raise ValueError(f"{key!r} is no image name")
    return key if isinstance(key, str) else key.decode()


def _vector(value: object) -> np.ndarray:
    if isinstance(value, _Array):
        return value.vector()
    if not isinstance(value, list | tuple):
        raise ValueError("a label is not a plain vector of numbers")
    return np.asarray([float(v) for v in value], np.float32)


def read_dictionary(data: bytes, reader: type[Reader] = Reader) -> dict:
    """That of a .npy file with a pickled object, or of a bare pickle, arrays as recorders. May raise anything."""
    content = _read_pickle(data, reader)
    if isinstance(content, _Array):  # np.save wraps the dictionary in an array without dimensions
        if content.shape != () or not isinstance(content.data, list) or len(content.data) != 1:
            raise ValueError("not a dictionary")
        content = content.data[0]
    if not isinstance(content, dict):
        raise ValueError("not a dictionary of image names")
    return content


def _read_pickle(data: bytes, reader: type[Reader]) -> object:
    stream = io.BytesIO(data)
    if data.startswith(np.lib.format.MAGIC_PREFIX):
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        if read(stream)[2] != np.dtype(object):
            raise ValueError("a plain array, without image names")
    return reader(stream).load()

"""Reads one array out of MATLAB files of version 5, as SBD's masks are.

scipy's reader is not used: a file with a wrong byte can end the process.
"""

import itertools
import struct
import zlib
from collections.abc import Iterator

import numpy as np

NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}   # storage
MATRIX, COMPRESSED, STRUCT = 14, 15, 2
MOST = 1 << 28   # bytes of an unpacked variable


def read_field(data: bytes, variable: str, field: str) -> np.ndarray:
    """`variable.field`, a plain array in a struct of size 1 x 1. Raises KeyError where it is not there, ValueError and
    struct.error for what cannot be read."""
    order = {b"IM": "<", b"MI": ">"}.get(data[126:128])
    if order is None or len(data) < 136:
        raise ValueError("not a MATLAB file of version 5")
    for kind, content in _elements(memoryview(data)[128:], order):
        if kind == COMPRESSED:
            kind, content = next(_elements(memoryview(zlib.decompressobj().decompress(content, MOST)), order))
        if kind != MATRIX:
            raise ValueError(f"an element of type {kind} in the place of a variable")
        flags, _, name, *parts = _elements(content, order)
        if bytes(name[1]) == variable.encode():
            if flags[1][0 if order == "<" else 3] != STRUCT:
                raise ValueError(f"{variable} is no struct")
            (_, width), (_, names), *values = parts
            length = struct.unpack(f"{order}i", width)[0]
            if length < 1:
                raise ValueError(f"{variable} has no fields")
            fields = [bytes(names[at : at + length]).rstrip(b"\0") for at in range(0, len(names), length)]
            return _array(dict(zip(fields, values, strict=False))[field.encode()][1], order)
    raise KeyError(variable)


def _array(content: memoryview, order: str) -> np.ndarray:
    _, (_, sides), _, (kind, values) = itertools.islice(_elements(content, order), 4)
    shape = np.frombuffer(sides, f"{order}i4").tolist()
    if kind not in NUMBERS or min(shape) < 0:
        raise ValueError("not an array of numbers")
    return np.frombuffer(values, order + NUMBERS[kind]).reshape(shape, order="F")


def _elements(data: memoryview, order: str) -> Iterator[tuple[int, memoryview]]:
    """(type, content) of the elements that stand one after the other; contents of 4 bytes or less are in the tag."""
    place = 0
    while place < len(data):
        kind, size = struct.unpack_from(f"{order}II", data, place)
        start, step = place + 8, size + (-size % 8 if kind != COMPRESSED else 0)
        if kind >> 16:
            kind, size, start, step = kind & 0xFFFF, kind >> 16, place + 4, 0
        if start + size > len(data):
            raise ValueError("cut short")
        yield kind, data[start : start + size]
        place += 8 + step

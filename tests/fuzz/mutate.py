"""Files made wrong in every way that a seed gives: the same seed, the same bytes."""

import gzip
import io
import json
import random
import re
import zipfile
import zlib
from collections.abc import Callable

LAUGHS = "\n".join(["a0: &a0 [x, x]", *(f"a{i}: &a{i} [{', '.join(9 * [f'*a{i - 1}'])}]" for i in range(1, 10))])
TOKENS = [
    b"NaN", b"-Infinity", b"1e999", b"-1", b"0", b"0.5", b"4294967295", b"2000000000", b"9" * 5000, b"[" * 5000,
    b"{'a':" * 3000, b"\0", b"\xff\xfe", b"\xed\xa0\x80", b"A" * 20000, b"\n", b"\r", b"\t", b" ", b",", b": ", b"#",
    b"../../x", b"/etc/passwd", b"..", b"${oc.env:HOME}", b"\"\\x24{oc.env:HOME}\"", b"&a [*a, *a]", b"*a", b"null",
    b"true", b'""', b"[]", b"{}", b'"\\ud800"', b'"\\u0000"', b"\x1b[2J", b"!!python/object/apply:os.system ['true']",
    b"2001-99-99", b"? [a, b]\n: c\n", b"<!DOCTYPE a [<!ENTITY a 'aa'>]>", b"\x80\x04", b"cposix\nsystem\n",
    b"\xff\xff", b"\xff" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\1\0\0", LAUGHS.encode(),
]  # fmt: skip
VALUES = re.compile(rb'"[^"\n]{0,60}"|-?\d+(?:\.\d+)?|true|false|null')


def mutant(rng: random.Random, name: str, data: bytes) -> bytes:
    """Wrong bytes of a file; in half of the cases of a container what it holds is wrong, and it is whole itself."""
    if rng.random() < 0.5:
        for ending, inside in CONTAINERS.items():
            if name.endswith(ending) and not name.startswith("legacy"):
                return inside(rng, data)
    return changed(rng, data)


def changed(rng: random.Random, data: bytes) -> bytes:
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        data = rng.choice(CHANGES)(rng, data) if data else rng.choice(TOKENS)
    return data


def _span(rng: random.Random, data: bytes) -> tuple[int, int]:
    """Near the head, where headers are, as often as anywhere."""
    start = rng.randrange(min(len(data), rng.choice((64, 512, len(data)))))
    return start, min(len(data), start + rng.choice((1, 2, 4, 16, 200)))


def _flip(rng: random.Random, data: bytes) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 3, 30))):
        out[_span(rng, data)[0]] ^= 1 << rng.randrange(8)
    return bytes(out)


def _replace(rng: random.Random, data: bytes) -> bytes:
    a, b = _span(rng, data)
    return data[:a] + rng.choice((rng.randbytes(b - a), b"\0" * (b - a), b"\xff" * (b - a))) + data[b:]


def _move(rng: random.Random, data: bytes) -> bytes:
    """A slice swapped with another, doubled, or left out."""
    (a, b), (c, d) = sorted((_span(rng, data), _span(rng, data)))
    b = min(b, c)
    swapped = data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]
    return rng.choice((swapped, data[:b] + data[a:], data[:a] + data[b:]))


def _token(rng: random.Random, data: bytes) -> bytes:
    a, b = _span(rng, data)
    return data[:a] + rng.choice(TOKENS) + data[rng.choice((a, b)) :]


def _value(rng: random.Random, data: bytes) -> bytes:
    """A number or a text of a JSON, a YAML or a header becomes something else."""
    found = [match.span() for match in VALUES.finditer(data[:100000])]
    if not found:
        return _token(rng, data)
    (a, b), (c, d) = rng.choice(found), rng.choice(found)
    return data[:a] + rng.choice((rng.choice(TOKENS), data[c:d])) + data[b:]


CHANGES: list[Callable[[random.Random, bytes], bytes]] = [
    _flip, _replace, _move, _token, _value, lambda rng, data: data[: rng.randrange(len(data))],
]


def _png(rng: random.Random, data: bytes) -> bytes:
    """With the right check sum of every chunk."""
    data, place = changed(rng, data), 8
    while place + 12 <= len(data):
        end = place + 8 + int.from_bytes(data[place : place + 4], "big")
        if end + 4 > len(data):
            break
        data = data[:end] + zlib.crc32(data[place + 4 : end]).to_bytes(4, "big") + data[end + 4 :]
        place = end + 4
    return data


def _safetensors(rng: random.Random, data: bytes) -> bytes:
    """With the right length of its header; also with a changed `meta` in a header that can be read."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    if rng.random() < 0.7:
        header["__metadata__"]["meta"] = changed(rng, header["__metadata__"]["meta"].encode()).decode(errors="replace")
        text = json.dumps(header).encode()
    else:
        text = changed(rng, data[8:end])
    return len(text).to_bytes(8, "little") + text + data[end:]


def _zip(rng: random.Random, data: bytes) -> bytes:
    """With the right check sum of its members."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        names = old.namelist()
        wrong = rng.choice([name for name in names if name.endswith("data.pkl")] or names)
        for name in names:
            new.writestr(name, changed(rng, old.read(name)) if name == wrong else old.read(name))
    return out.getvalue()


def _tar(rng: random.Random, data: bytes) -> bytes:
    """With the right check sum of every header."""
    data = bytearray(changed(rng, data))
    for place in range(0, len(data) - 511, 512):
        if data[place + 257 : place + 262] == b"ustar":
            head = data[place : place + 148] + b" " * 8 + data[place + 156 : place + 512]
            data[place + 148 : place + 156] = b"%06o\0 " % sum(head)
    return bytes(data)


CONTAINERS = {
    ".png": _png, ".safetensors": _safetensors, ".zip": _zip, ".pth": _zip, ".pt": _zip, ".npz": _zip, ".tar": _tar,
    ".tgz": lambda rng, data: gzip.compress(changed(rng, gzip.decompress(data)), 1),
}

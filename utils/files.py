"""Files that are whole or not there, and their hashes."""

import hashlib
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]   # the project's folder


class replacing:
    """A temporary name beside `path` that becomes `path` at the end, so that no half-written file bears the name."""

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self.part = self.path.with_name(self.path.name + ".part")

    def __enter__(self) -> Path:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return self.part

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            os.replace(self.part, self.path)
        else:
            self.part.unlink(missing_ok=True)


def hash_of(path: str | os.PathLike, algorithm: str = "sha256") -> str:
    """Of a file's bytes, in hexadecimal."""
    digest = hashlib.new(algorithm)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()

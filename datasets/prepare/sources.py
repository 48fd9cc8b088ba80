"""Where a data set is read from: a folder, a tar, a gzipped tar or a zip, which are never changed.

    source = Source("VOCtrainval_11-May-2012.tar", ("VOCdevkit/VOC2012", "VOC2012"), ("JPEGImages",), scratch)
    source.files["JPEGImages/2007_000027.jpg"].read()
"""

import functools
import gzip
import hashlib
import io
import os
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from utils.errors import UserError
from utils.files import hash_of, replacing
from utils.images import image_size

GZIP = b"\x1f\x8b"
BLOCK = 512  # of a tar


class Blob(NamedTuple):
    """The bytes of one file: all of `path`, `size` of its bytes from `offset` on (a tar), or its member (a zip)."""

    path: Path
    offset: int = 0
    size: int | None = None
    member: str | None = None

    def __str__(self) -> str:
        return str(self.path) if self.member is None else f"{self.path}: {self.member}"

    def read(self) -> bytes:
        """Raises UserError where the archive's member cannot be read, OSError with the name of the file."""
        if self.member is not None and self.size is None:
            try:
                return _zip(self.path, os.getpid()).read(self.member)
            except Exception as error:   # a broken zip makes zipfile raise many kinds
                raise UserError(f"{self}: cannot be read ({error})") from None
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            data = file.read() if self.size is None else file.read(self.size)
        if self.size is not None and len(data) != self.size:
            raise UserError(f"{self}: cut short; is the archive complete?")
        return data

    def open(self) -> "Named":
        """The bytes as a file that names its origin in messages."""
        return Named(self.read(), str(self))

    def image_size(self) -> tuple[int, int]:
        """(height, width) of an image as it is shown. Raises UserError where it is no image."""
        return image_size(self.path if self.offset == 0 and self.member is None else self.open())


class Named(io.BytesIO):
    """Bytes whose str() is the name of the file they come from."""

    def __init__(self, data: bytes, name: str) -> None:
        super().__init__(data)
        self.label = name

    def __str__(self) -> str:
        return self.label


class Source:
    """A folder or an archive, and in it the folders `wanted` ('.': files right there) below the first of `inner`.

    Where it has none of `inner`, `wanted` are looked for at its top. Raises UserError where there is no such file.
    scratch: where a gzipped tar is unpacked to, as gzip has no way to a file in the middle.
    digest: sha256 of an archive, for a folder of its files' names and sizes.
    """

    def __init__(self, path: str | Path, inner: tuple[str, ...], wanted: tuple[str, ...], scratch: Path) -> None:
        self.path, self.inner, self.wanted, self.scratch = Path(path).expanduser(), inner, wanted, scratch
        if not self.path.exists():
            raise UserError(f"{self.path}: no such file or folder")

    @functools.cached_property
    def digest(self) -> str:
        return digest_of_listing(self.files) if self.path.is_dir() else hash_of(self.path)

    @functools.cached_property
    def files(self) -> dict[str, Blob]:
        """By their name below the inner folder.

        Raises UserError for a broken archive, one whose members point out of it, and where nothing is found.
        """
        if self.path.is_dir():
            base = next((self.path / name for name in self.inner if (self.path / name).is_dir()), self.path)
            members = _folder_files(base, self.wanted)
        else:
            tops = {PurePosixPath(name).name for name in self.inner}
            members = ((_below(name, tops), blob) for name, blob in _archive_files(self.path, self.scratch))
        files = {name: blob for name, blob in members if self._wants(PurePosixPath(name))}
        if not files:
            raise UserError(f"{self.path}: no files in {' or '.join(self.wanted)}, at its top or in {self.inner[0]}")
        return files

    def folder(self, name: str, *suffixes: str) -> dict[str, Blob]:
        """The files right in the folder `name`, by their stem."""
        paths = ((PurePosixPath(file), blob) for file, blob in self.files.items())
        return {path.stem: blob for path, blob in paths if str(path.parent) == name and path.suffix in suffixes}

    def _wants(self, path: PurePosixPath) -> bool:
        return not path.name.startswith(".") and str(path.parent) in self.wanted


def digest_of_listing(files: dict[str, Blob]) -> str:
    """sha256 of the names and sizes of files on disk."""
    lines = sorted(f"{name} {os.stat(blob.path).st_size}\n" for name, blob in files.items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _below(name: str, tops: set[str]) -> str:
    """A member's name below the first folder of tops on its way, else as it is."""
    parts = PurePosixPath(name).parts
    start = next((k + 1 for k, part in enumerate(parts[:-1]) if part in tops), 0)
    return "/".join(parts[start:])


def _folder_files(base: Path, wanted: tuple[str, ...]) -> list[tuple[str, Blob]]:
    files = []
    for folder in wanted:
        if (base / folder).is_dir():
            with os.scandir(base / folder) as entries:
                names = sorted(entry.name for entry in entries if entry.is_file())
            files += [(str(PurePosixPath(folder, name)), Blob(base / folder / name)) for name in names]
    return files


def _archive_files(path: Path, scratch: Path) -> Iterator[tuple[str, Blob]]:
    if zipfile.is_zipfile(path):
        names = [entry.filename for entry in _zip(path, os.getpid()).infolist() if not entry.is_dir()]
        _refuse_outside(path, names)
        return ((name, Blob(path, member=name)) for name in names)
    with open(path, "rb") as file:
        zipped = file.read(2) == GZIP
    return _tar_files(_unzipped(path, scratch) if zipped else path, path)


def _refuse_outside(path: Path, names: list[str]) -> None:
    for name in names:
        if name.startswith(("/", "\\")) or ".." in PurePosixPath(name.replace("\\", "/")).parts:
            raise UserError(f"{path}: refused, its member {name!r} points out of the archive")


def _tar_files(path: Path, named: Path) -> Iterator[tuple[str, Blob]]:
    """Members of an uncompressed tar, checked by tarfile's filter 'data', with their place in it."""
    with open(path, "rb") as file:
        file.seek(-min(BLOCK, path.stat().st_size), os.SEEK_END)
        if any(file.read()):  # a tar ends with blocks of zeros; tarfile takes one that is cut short for its end
            raise UserError(f"{named}: not a tar, gzipped tar or zip, or cut short; is it complete?")
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                tarfile.data_filter(member, str(path.parent))
                if member.isfile():
                    yield member.name, Blob(path, member.offset_data, member.size, member.name)
    except tarfile.FilterError as error:
        raise UserError(f"{named}: refused, {error}") from None
    except (tarfile.TarError, ValueError, ArithmeticError, LookupError, EOFError) as error:
        raise UserError(f"{named}: not a readable tar ({error}); is it complete?") from None


def _unzipped(path: Path, scratch: Path) -> Path:
    """The tar inside a gzip, unpacked once into the folder scratch."""
    place = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]   # two archives may have one name
    target = scratch / f".{path.name}.{place}.tar"
    if not target.exists():
        try:
            with replacing(target) as part, gzip.open(path) as packed, open(part, "wb") as unpacked:
                shutil.copyfileobj(packed, unpacked, 1 << 20)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UserError(f"{path}: cannot be unpacked ({error}); is it complete?") from None
    return target


@functools.lru_cache(maxsize=4)
def _zip(path: Path, _process: int) -> zipfile.ZipFile:
    """Kept open, in each process its own: they would share the place in the file."""
    try:
        return zipfile.ZipFile(path)
    except Exception as error:   # a broken one makes zipfile raise many kinds
        raise UserError(f"{path}: not a readable zip ({error}); is it complete?") from None

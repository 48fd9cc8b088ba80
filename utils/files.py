"""Files that are whole or not there, and their hashes."""

import contextlib
import fcntl
import hashlib
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]   # the project's folder
FRESH, LEFT_OVER = f".{16 * '[0-9a-f]'}.part", 86400   # what temporary names look like; seconds without a write
AGAIN = (1, 5, 15)   # seconds to wait before a write is tried again
_swept: set[Path] = set()
log = logging.getLogger("wsss.files")


@contextlib.contextmanager
def replacing(path: str | os.PathLike, durable: bool = True) -> Iterator[Path]:
    """A temporary name beside `path` that becomes `path` at the end, so that no half-written file bears the name.

    No other writer has that temporary name. A link of the name `path` is replaced, not the file it points to.
    durable: the bytes are on the disk before the file has its name, so that it is whole after a power failure, too.
    Raises UserError, naming the file, where the disk refuses it, whatever the library that writes says of that.
    """
    path = Path(path)
    part = fresh_name(path)
    try:
        with naming(path, part):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and not path.is_file():
                raise UserError(f"{path}: is no file that can be replaced; give another name")
            try:
                yield part
            except Exception as error:
                if not isinstance(error, UserError) and not getattr(error, "errno", None):
                    _ask_the_disk(error, part)
                raise
            if durable:
                with open(part, "rb") as file:
                    os.fsync(file.fileno())
            os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def retried(write: Callable[[], None]) -> None:
    """Calls `write`, which raises UserError where a disk refuses it, and again after each of AGAIN seconds."""
    for seconds in AGAIN:
        try:
            return write()
        except UserError as error:
            log.warning("%s; tried again in %d s", error, seconds)
            time.sleep(seconds)
    return write()


def fresh_name(path: Path) -> Path:
    """A temporary name beside `path` that nobody has; what killed processes left there goes after a day."""
    if path.parent not in _swept:
        _swept.add(path.parent)
        for old in path.parent.glob(FRESH):
            with contextlib.suppress(OSError):
                if time.time() - old.lstat().st_mtime > LEFT_OVER:
                    shutil.rmtree(old) if old.is_dir() else old.unlink()
    return path.with_name(f".{secrets.token_hex(8)}.part")


@contextlib.contextmanager
def naming(path: str | os.PathLike, part: Path | None = None) -> Iterator[None]:
    """Every OSError becomes a UserError that names a file: `path` where the error names none, as of a full disk, or
    `part`."""
    try:
        yield
    except OSError as error:
        name = error.filename if str(error.filename) not in ("None", str(part)) else path
        raise UserError(f"{name}: {error.strerror or error}") from None


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """One process at a time is in the block, which reads `path` and writes it again; the others wait."""
    with naming(path, lock := path.with_name(f".{path.name}.lock")):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(lock, "a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.warning("waiting for another process that writes %s", path)
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError:   # some file systems of clusters have no locks
                pass
            yield


def hash_of_names(names: Sequence[str]) -> str:
    """Their number and the first letters of their hash, to compare lists."""
    return f"{len(names)} (sha256 {hashlib.sha256(chr(10).join(names).encode()).hexdigest()[:12]})"


def hash_of(path: str | os.PathLike, algorithm: str = "sha256") -> str:
    """Of a file's bytes, in hexadecimal."""
    digest = hashlib.new(algorithm)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _ask_the_disk(error: Exception, part: Path) -> None:
    """Raises the OSError that made a library give up writing, if it was one: few libraries raise it themselves."""
    if number := re.search(r"\(os error (\d+)\)", str(error)):   # of safetensors
        raise OSError(int(number[1]), os.strerror(int(number[1])))
    with open(part, "ab") as file:
        file.write(bytes(1 << 16))
        file.flush()
        os.fsync(file.fileno())

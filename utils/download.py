"""Files the project does not hold itself: start weights, data sets, released checkpoints (weights/registry.yaml).

A file gets its name only once its size and its published hash are right. Environment: WSSS_DOWNLOADS, the folder they
lie in; WSSS_MIRROR, an address that replaces the registry's; WSSS_OFFLINE=1, no network at all.
"""

import contextlib
import json
import logging
import os
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import yaml
from safetensors import SafetensorError, safe_open

from utils.errors import UserError, did_you_mean
from utils.files import ROOT, alone, hash_of, naming, replacing
from utils.offline import is_offline
from utils.transfer import Patience, discard, transfer

REGISTRY = ROOT / "weights" / "registry.yaml"
KINDS = ("start_weights", "data", "checkpoint")
HEX = {"sha256": re.compile(r"[0-9a-f]{8,64}"), "md5": re.compile(r"[0-9a-f]{32}")}
NOT_VERIFIED = "not verified against a published hash"

log = logging.getLogger("wsss.download")


class Entry(NamedTuple):
    """A row of the registry.

    kind: one of KINDS. url: None where the file must be fetched by hand. page: where a person gets it. file: its name
    on disk. size: bytes. sha256: in full, or its first 8 digits and more. md5: where that is what is published.
    licence: None where none is stated. what: a line about it.
    """

    name: str
    kind: str
    url: str | None
    page: str
    file: str
    size: int | None
    sha256: str | None
    licence: str | None
    what: str
    md5: str | None = None

    @property
    def published(self) -> tuple[str, str] | None:
        """(algorithm, hash or its beginning), None where none is published."""
        return ("sha256", self.sha256) if self.sha256 else ("md5", self.md5) if self.md5 else None


def registry() -> dict[str, Entry]:
    """The rows of weights/registry.yaml by name. Raises UserError naming a row that is none."""
    rows = yaml.safe_load(REGISTRY.read_text(encoding="utf-8"))
    return {name: _entry(name, row) for name, row in rows.items()}


def find(name: str) -> Entry:
    """The row of that name. Raises UserError with the nearest name."""
    entries = registry()
    if name not in entries:
        raise UserError(f"'{name}' is not in {REGISTRY.name}{did_you_mean(name, entries)}")
    return entries[name]


def fetch(name: str, folder: Path | None = None, mirror: str | None = None, offline: bool | None = None) -> Path:
    """The file of a row of the registry, verified; downloaded where it is absent.

    folder: None for `default_folder()`. mirror: base address in place of the registry's, None for WSSS_MIRROR.
    offline: None for WSSS_OFFLINE. Raises UserError in every other case; then no bad file has the name.
    """
    return obtain(find(name), folder, mirror, offline)


def obtain(
    entry: Entry, folder: Path | None = None, mirror: str | None = None, offline: bool | None = None,
    patience: Patience | None = None,
) -> Path:
    """`fetch` of a row at hand."""
    path = place(entry, folder)
    mirror = mirror or os.environ.get("WSSS_MIRROR")
    offline = is_offline() if offline is None else offline
    url = f"{mirror.rstrip('/')}/{entry.file}" if mirror else entry.url
    with naming(path):
        if path.exists():
            check(entry, path)
            return path
        if offline or url is None:
            raise UserError(by_hand(entry, path.parent, "offline mode is on" if offline else "it has no address"))
        with alone(path):
            if path.exists():
                check(entry, path)
            else:
                _download(entry, url, path, patience)
    return path


def table(folder: Path) -> list[str]:
    """The registry, a line a row; `here`: yes, no, part (an unfinished download) or no, by hand."""
    rows = [("name", "kind", "size", "here", "licence", "what")]
    for entry in registry().values():
        size = f"{entry.size / 1e9:.2f} GB" if entry.size else "?"
        rows.append((entry.name, entry.kind, size, _presence(entry, folder), entry.licence or "?", entry.what))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def verify(names: Sequence[str], folder: Path) -> Iterator[tuple[str, bool]]:
    """Reads every named file, or all that are there: a line about each, and whether it is not wrong.

    Raises UserError for a name that the registry does not have.
    """
    entries = [find(name) for name in names] or [e for e in registry().values() if place(e, folder).exists()]
    for entry in entries:
        path = place(entry, folder)
        try:
            if not path.exists():
                raise UserError(f"{path}: not there")
            yield f"{entry.name}: {'right' if check(entry, path, remembered=False) else NOT_VERIFIED}, {path}", True
        except UserError as error:
            yield f"{entry.name}: WRONG, {error}", False


def place(entry: Entry, folder: Path | None = None) -> Path:
    """Where the file of a row lies, or will lie."""
    return Path(folder or default_folder()) / entry.file


def default_folder() -> Path:
    """WSSS_DOWNLOADS, else the folder torch.hub and timm keep their checkpoints in."""
    if os.environ.get("WSSS_DOWNLOADS"):
        return Path(os.environ["WSSS_DOWNLOADS"]).expanduser()
    import torch.hub  # takes seconds

    return Path(torch.hub.get_dir()) / "checkpoints"


def by_hand(entry: Entry, folder: Path, why: str) -> str:
    """The line that tells a person which file to put where."""
    known = [f"{entry.size} bytes" if entry.size else None, " ".join(entry.published or ())]
    told = ", ".join(filter(None, known)) or "size and hash are not published"
    source = f"{entry.url}, see {entry.page}" if entry.url else entry.page
    return f"{entry.name} is not in {folder} and {why}: put {entry.file} ({told}) there by hand, from {source}"


def check(entry: Entry, path: Path, remembered: bool = True) -> bool:
    """True where the file has the published hash, False where none is published and it opens as what its name says.

    remembered: trust the hash noted for a file of this size and time, so that a large file is read once.
    Raises UserError for another size or hash, or a file that does not open.
    """
    size = path.stat().st_size
    if entry.size is not None and size != entry.size:
        raise UserError(f"{path}: has {size} bytes, {entry.name} has {entry.size}: move it away and fetch it again")
    if entry.published is None:
        fault = _cannot_be_opened(path)
        if fault:
            raise UserError(f"{path}: {fault}: move it away and fetch {entry.name} again")
        return False
    algorithm, published = entry.published
    digest = (_remembered(path, algorithm) if remembered else None) or hash_of(path, algorithm)
    if not digest.startswith(published):
        raise UserError(
            f"{path}: {algorithm} is {digest[:16]}..., published for {entry.name} is {published[:16]}: "
            "another file; move it away and fetch it again"
        )
    _remember(path, algorithm, digest)
    return True


def _presence(entry: Entry, folder: Path) -> str:
    path = place(entry, folder)
    if path.exists():
        return "yes"
    if path.with_name(path.name + ".part").exists():
        return "part"
    return "no" if entry.url else "no, by hand"


def _download(entry: Entry, url: str, path: Path, patience: Patience | None) -> None:
    """Transfers, checks, and only then gives the name. A wrong file that was continued is fetched once more whole."""
    part = path.with_name(path.name + ".part")
    resumed = part.exists()
    try:
        transfer(url, part, entry.size, patience)
    except UserError as error:
        raise UserError(f"{error}; or put {entry.file} into {path.parent} by hand, see {entry.page}") from None
    fault = _fault(entry, part)
    if fault and resumed:
        log.warning("%s: %s; again from the start", url, fault)
        discard(part)
        transfer(url, part, entry.size, patience)
        fault = _fault(entry, part)
    if fault:
        discard(part)
        raise UserError(f"{url}: the server sends another file than {entry.name}: {fault}")
    os.replace(part, path)
    discard(part)
    with contextlib.suppress(FileNotFoundError):
        os.replace(_memory(part), _memory(path))
    if entry.published is None:
        log.warning("%s: %s", path, NOT_VERIFIED)


def _fault(entry: Entry, part: Path) -> str | None:
    """What is wrong with a complete partial file, None for nothing."""
    size = part.stat().st_size
    if entry.size is not None and size != entry.size:
        return f"{size} bytes, published are {entry.size}"
    if entry.published is None:
        return _cannot_be_opened(part, entry.file)
    algorithm, published = entry.published
    digest = hash_of(part, algorithm)
    if not digest.startswith(published):
        return f"{algorithm} {digest[:16]}..., published is {published[:16]}"
    _remember(part, algorithm, digest)
    return None


def _cannot_be_opened(path: Path, name: str | None = None) -> str | None:
    """Why the head of a file is not what its name (that of `path`, or another) says, None where it is."""
    name = (name or path.name).lower()
    try:
        if name.endswith((".zip", ".npz")):
            zipfile.ZipFile(path).close()
        elif name.endswith((".tar", ".tgz", ".tar.gz")):
            with tarfile.open(path) as archive:
                archive.next()
        elif name.endswith(".safetensors"):
            with safe_open(path, "np"):
                pass
        elif name.endswith((".pth", ".pt")) and not zipfile.is_zipfile(path):
            with open(path, "rb") as file:
                if file.read(1) != b"\x80":   # a pickle, torch's former format
                    return "not a torch file"
        elif path.stat().st_size == 0:
            return "empty"
    except (zipfile.BadZipFile, tarfile.TarError, SafetensorError, EOFError, zlib.error) as error:
        return f"not a readable {name.rpartition('.')[2]} file ({' '.join(str(error).split())})"
    return None


def _remembered(path: Path, algorithm: str) -> str | None:
    """The hash noted for the file as it is now."""
    try:
        note = json.loads(_memory(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return note.get("digest") if isinstance(note, dict) and {**note, "digest": ""} == _state(path, algorithm) else None


def _remember(path: Path, algorithm: str, digest: str) -> None:
    if _remembered(path, algorithm) == digest:
        return
    with contextlib.suppress(UserError), replacing(_memory(path)) as part:   # in a folder of somebody else: next time
        part.write_text(json.dumps({**_state(path, algorithm), "digest": digest}), encoding="utf-8")


def _state(path: Path, algorithm: str) -> dict:
    now = path.stat()
    return {"size": now.st_size, "time": now.st_mtime_ns, "algorithm": algorithm, "digest": ""}


def _memory(path: Path) -> Path:
    return path.with_name(f".{path.name}.checked")


def _entry(name: str, row: dict) -> Entry:
    def refuse(what: str) -> None:
        raise UserError(f"{REGISTRY.name}: {name}: {what}")

    fields = set(Entry._fields) - {"name"}
    if not isinstance(row, dict) or not fields - {"md5"} <= set(row) <= fields:
        refuse(f"expected the keys {', '.join(sorted(fields - {'md5'}))} and perhaps md5")
    entry = Entry(name=name, **row)
    if entry.kind not in KINDS:
        refuse(f"kind is {entry.kind}, expected {', '.join(KINDS)}")
    if not entry.file or Path(entry.file).name != entry.file:
        refuse(f"file is {entry.file}, expected a name without folders")
    if entry.size is not None and not (isinstance(entry.size, int) and entry.size > 0):
        refuse(f"size is {entry.size}, expected bytes or null")
    for algorithm, pattern in HEX.items():
        value = getattr(entry, algorithm)
        if value is not None and not (isinstance(value, str) and pattern.fullmatch(value)):
            refuse(f"{algorithm} is {value}, expected lower-case hexadecimal digits in quotes, or null")
    return entry

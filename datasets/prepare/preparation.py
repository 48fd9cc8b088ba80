"""What the prepare_*.py tools share: files made by several processes, each whole or not there, and a manifest of them.

    with Preparation(root, identity) as preparation:
        if not preparation.complete(workers):
            preparation.make(tasks, workers, "masks")
            preparation.finish(counts, sources)

While a preparation runs, every finished file is a line of .preparing.jsonl; at the end all go into manifest.json. A
later call of the same identity (tool, settings, digests of the sources) hashes what is there and makes only what is
missing or differs.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shlex
import signal
from argparse import ArgumentParser
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from datasets.prepare.sources import Blob, Source
from utils.errors import UserError
from utils.files import FRESH, ROOT, hash_of, naming, replacing
from utils.processes import end_with
from utils.progress import progress_bar

VERSION = 1  # of the tools: raise it when the files they make change
MANIFEST, JOURNAL, UNPACKED = "manifest.json", ".preparing.jsonl", ".*.tar"
WAITING = 4  # results a process may be ahead


class Task(NamedTuple):
    """A file to be: its name below the root, and the function that gives its bytes from the arguments."""

    name: str
    make: Callable[..., bytes]
    arguments: tuple = ()


class Link(NamedTuple):
    """A symbolic link to be, to a file that stays where it is."""

    name: str
    target: Path


class Record(NamedTuple):
    """A finished file: its name below the root, size in bytes, sha256 in hexadecimal."""

    name: str
    size: int
    sha256: str


class Preparation:
    """The work in one folder.

    identity: tool, version, settings and digests of the sources; a call of another identity is refused.
    foreign: names that may lie in the folder already.
    Raises UserError where the folder holds anything else, was prepared otherwise, or another process works in it.
    """

    def __init__(self, root: Path, identity: dict, foreign: tuple[str, ...] = ()) -> None:
        self.root, self.identity = root, json.loads(json.dumps(identity))
        root.mkdir(parents=True, exist_ok=True)
        self._refuse_others(foreign)
        self.journal = open(root / JOURNAL, "a+", encoding="utf-8", errors="replace")  # noqa: SIM115  closed by __exit__
        try:
            fcntl.flock(self.journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.journal.close()
            raise UserError(f"{root}: another process prepares data here") from None
        self.finished = (root / MANIFEST).exists()
        try:
            self.records = self._from_manifest() | self._from_journal()
        except UserError:
            self.__exit__()
            raise

    def __enter__(self) -> "Preparation":
        return self

    def __exit__(self, *_: object) -> None:
        if self.finished:
            for path in (self.root / JOURNAL, *self.root.glob(UNPACKED), *self.root.rglob(FRESH)):
                path.unlink(missing_ok=True)
        self.journal.close()

    def complete(self, workers: int) -> bool:
        """Whether an earlier call finished and every file of it is right; says which are not, and forgets them."""
        faults = find_faults(self.root, list(self.records.values()), workers)
        for record, what in faults:
            if self.finished:
                print(f"{self.root / record.name} {what}: made again", flush=True)
            del self.records[record.name]
        return self.finished and not faults

    def make(self, tasks: Iterable[Task | Link], workers: int, label: str) -> None:
        """Makes the files of the tasks that are not there yet. Raises UserError."""
        rest = [task for task in tasks if task.name not in self.records]
        for record in parallel(partial(build, self.root), rest, workers, label, len(rest)):
            self.records[record.name] = record
            self._note(record)

    def finish(self, counts: dict[str, int], sources: list[Path]) -> None:
        """Writes the manifest."""
        files = {record.name: {"size": record.size, "sha256": record.sha256} for record in self.records.values()}
        content = {**self.identity, "paths": [str(path) for path in sources], "counts": counts}
        data = to_json({**content, "files": dict(sorted(files.items()))})
        with replacing(self.root / MANIFEST) as part:
            part.write_bytes(data)
        self.finished = True

    def _refuse_others(self, foreign: tuple[str, ...]) -> None:
        """An interrupted or finished preparation may hold anything, a new one only `foreign`."""
        if (self.root / MANIFEST).exists() or (self.root / JOURNAL).exists():
            return
        other = next((path.name for path in sorted(self.root.iterdir()) if path.name not in foreign), None)
        if other is not None:
            raise UserError(f"{self.root}: holds {other}, which was not prepared by this tool; name an empty folder")

    def _from_manifest(self) -> dict[str, Record]:
        if not self.finished:
            return {}
        manifest = read_manifest(self.root)
        self._check_identity(manifest)
        return records_of(manifest)

    def _from_journal(self) -> dict[str, Record]:
        """What a call that was interrupted had done; its last line may be cut short."""
        self.journal.seek(0)
        text = self.journal.read()
        if text and not text.endswith("\n"):
            self.journal.write("\n")
        contents = []
        for line in text.splitlines():
            with contextlib.suppress(ValueError, RecursionError):
                contents.append(json.loads(line))
        contents[1:] = [content for content in contents[1:] if _is_record(content)]
        records = {content[0]: Record(*content) for content in contents[1:]}
        if not contents or (contents[0] != self.identity and not self.finished):
            for name in records:   # of a call that was not right, or gave up
                (self.root / name).unlink(missing_ok=True)
            self.journal.truncate(0)
            self._note(self.identity)
            return {}
        self._check_identity(contents[0])
        return records

    def _check_identity(self, earlier: dict) -> None:
        known = {key: earlier.get(key) for key in self.identity} if isinstance(earlier, dict) else {}
        for name, theirs, ours in _differences(known, self.identity):
            raise UserError(
                f"{self.root}: was prepared with other {name}, {_short(theirs)} instead of "
                f"{_short(ours)}; name another folder, or delete this one"
            )

    def _note(self, content: dict | Record) -> None:
        with naming(self.root / JOURNAL):
            self.journal.write(json.dumps(content) + "\n")
            self.journal.flush()


def train_command(script: str, name: str, settings: Sequence[str]) -> str:
    """The command that trains on prepared data, as it can be run here."""
    device = "0" if torch.cuda.is_available() else "cpu"
    launcher = shlex.quote(os.path.relpath(ROOT / "run_train.sh"))
    return f"bash {launcher} scripts/{script} {device} 1 29500 {shlex.quote(name)} {shlex.join(settings)}"


def identity(tool: str, settings: dict, sources: dict[str, Source | str]) -> dict:
    """What makes two calls the same. sources: by their part, with their digests."""
    digests = {part: source if isinstance(source, str) else source.digest for part, source in sources.items()}
    return {"tool": tool, "version": VERSION, "settings": settings, "sources": digests}


def parallel(function: Callable[[Any], Any], items: Iterable, workers: int, label: str, total: int) -> Iterator:
    """function of every item, in order, by `workers` processes under a progress bar; few items wait at any time.

    Raises what function raises, and UserError where a process was killed.
    """
    with progress_bar(desc=label, total=total, disable=total == 0) as bar:
        for result in map(function, items) if workers == 1 else _pooled(function, items, workers):
            bar.update()
            yield result


def _pooled(function: Callable[[Any], Any], items: Iterable, workers: int) -> Iterator:
    waiting: deque = deque()
    with ProcessPoolExecutor(workers, initializer=_tie) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= WAITING * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise UserError("a worker was killed (for lack of memory?); give the same command again") from None
        finally:
            for future in waiting:
                future.cancel()


def _tie() -> None:
    """A worker ends with its parent, even a killed one, whose lock it shares; Ctrl-C is the parent's to handle."""
    end_with(os.getppid())
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def build(root: Path, task: Task | Link) -> Record:
    """Makes one file below root. Raises UserError, naming the file, where the disk refuses it."""
    path = root / task.name
    if isinstance(task, Link):
        with naming(task.target):
            data = task.target.read_bytes()
        with replacing(path, durable=False) as part:
            part.symlink_to(task.target.resolve())
    else:
        with naming(path):
            data = task.make(*task.arguments)
        _write(path, data)
    return Record(task.name, len(data), hashlib.sha256(data).hexdigest())


def find_faults(root: Path, records: list[Record], workers: int) -> list[tuple[Record, str]]:
    """The finished files that are not what they were, and what is wrong with each."""
    found = parallel(partial(_fault, root), records, workers, "verify", len(records))
    return [(record, what) for record, what in zip(records, found, strict=True) if what is not None]


def _fault(root: Path, record: Record) -> str | None:
    path = root / record.name
    try:
        size = path.stat().st_size
        if size != record.size:
            return f"has {size} bytes instead of {record.size}"
        return None if hash_of(path) == record.sha256 else "holds other bytes than were written"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def verify(root: Path, workers: int) -> None:
    """Hashes every file of a prepared folder. Raises UserError naming the first that is not as it was written."""
    manifest = read_manifest(root)
    faults = find_faults(root, list(records_of(manifest).values()), workers)
    if faults:
        record, what = faults[0]
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise UserError(f"{root / record.name} {what}{more}; the command that prepared the folder makes it again")
    print(f"{root}: {len(manifest['files'])} files as {manifest['tool']} wrote them")


def read_manifest(root: Path) -> dict:
    """The content of a folder's manifest. Raises UserError where there is none, or another file of that name."""
    path = root / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if not all(_is_record(list(record)) for record in records_of(manifest).values()) or not manifest["tool"]:
            raise ValueError("names of files outside of it")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; the folder was not prepared, or not to its end") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: not the manifest of a prepared folder ({error!r})") from None
    return manifest


def _is_record(content: Any) -> bool:
    """Whether name, size and hash are of a file within its folder: who wrote a journal or a manifest is not known."""
    name = content[0] if isinstance(content, list) and len(content) == 3 else None
    return isinstance(name, str) and "\0" not in name and not name.startswith("/") and ".." not in name.split("/")


def records_of(manifest: dict) -> dict[str, Record]:
    return {name: Record(name, file["size"], file["sha256"]) for name, file in manifest["files"].items()}


def image_task(name: str, blob: Blob, how: str) -> Task | Link:
    """The image `name`, copied, or linked where it is a file of its own. how: link or copy."""
    return Link(name, blob.path) if how == "link" and blob.member is None else Task(name, blob.read)


def list_task(split: str, lines: Iterable[str]) -> Task:
    """The split list ImageSets/Segmentation/SPLIT.txt."""
    return Task(f"ImageSets/Segmentation/{split}.txt", str.encode, ("".join(f"{line}\n" for line in lines),))


def to_json(content: Any) -> bytes:
    return (json.dumps(content, indent=0, ensure_ascii=False) + "\n").encode()


def _differences(theirs: dict, ours: dict, within: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(name, their value, our value) of the entries that differ, names with the dictionaries they stand in."""
    for key in {**ours, **theirs}:
        pair = theirs.get(key), ours.get(key)
        if all(isinstance(value, dict) for value in pair):
            yield from _differences(*pair, f"{within}{key} ")
        elif pair[0] != pair[1]:
            yield f"{within}{key}", *pair


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def add_arguments(parser: ArgumentParser) -> None:
    """Those of every tool."""
    parser.add_argument("out", type=Path, help="folder to make, new or of an earlier call, which then goes on")
    parser.add_argument("--workers", type=_positive, default=len(os.sched_getaffinity(0)), help="processes")
    parser.add_argument("--verify", action="store_true", help="only hash what an earlier call wrote to the folder")


def _positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def _write(path: Path, data: bytes) -> None:
    with replacing(path, durable=False) as part:   # a later call compares the hash
        part.write_bytes(data)

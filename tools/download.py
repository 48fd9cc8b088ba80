"""Lists, downloads and verifies start weights, data sets and released checkpoints (weights/registry.yaml).

    python tools/download.py list
    python tools/download.py get vit_base_imagenet voc2012_trainval --folder DATA
    python tools/download.py verify

An interrupted download goes on where it stopped. A file gets its name only once its size and hash are right.
"""

import argparse
from pathlib import Path

from engine.launch import run_script
from utils.download import NOT_VERIFIED, Entry, check, default_folder, fetch, find, place, registry
from utils.errors import UserError

HEADER = ("name", "kind", "size", "here", "licence", "what")


def show(folder: Path) -> None:
    """Prints the registry as a table; `here`: yes, no, part (an unfinished download) or no, by hand."""
    rows = [HEADER]
    for entry in registry().values():
        size = f"{entry.size / 1e9:.2f} GB" if entry.size else "?"
        rows.append((entry.name, entry.kind, size, _presence(entry, folder), entry.licence or "?", entry.what))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(f"\nfolder: {folder}\n?: not published where we looked")


def get(names: list[str], folder: Path, mirror: str | None, offline: bool | None) -> None:
    """Fetches in the order given and prints where each file lies."""
    for entry in [find(name) for name in names]:
        path = fetch(entry.name, folder, mirror, offline)
        print(f"{entry.name}: {path}" + ("" if entry.published else f" ({NOT_VERIFIED})"))


def verify(names: list[str], folder: Path) -> None:
    """Reads every named file, or all that are there, and compares it with the registry, a line each.

    Raises UserError with the number of those that are missing or wrong.
    """
    entries = [find(name) for name in names] or [e for e in registry().values() if place(e, folder).exists()]
    wrong = 0
    for entry in entries:
        path = place(entry, folder)
        try:
            if not path.exists():
                raise UserError(f"{path}: not there")
            print(f"{entry.name}: {'right' if check(entry, path, remembered=False) else NOT_VERIFIED}, {path}")
        except UserError as error:
            wrong += 1
            print(f"{entry.name}: WRONG, {error}")
    if wrong:
        raise UserError(f"{wrong} of {len(entries)} files are missing or wrong")
    if not entries:
        print(f"{folder} has no file of the registry")


def _presence(entry: Entry, folder: Path) -> str:
    path = place(entry, folder)
    if path.exists():
        return "yes"
    if path.with_name(path.name + ".part").exists():
        return "part"
    return "no" if entry.url else "no, by hand"


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    lister = commands.add_parser("list", help="show what there is and what is here")
    getter = commands.add_parser("get", help="download files that are not here")
    verifier = commands.add_parser("verify", help="compare files that are here with the registry, reading all of each")
    getter.add_argument("names", nargs="+", metavar="NAME")
    verifier.add_argument("names", nargs="*", metavar="NAME", help="default: all that are here")
    for command in (lister, getter, verifier):
        command.add_argument("--folder", type=Path, help="default: WSSS_DOWNLOADS, else torch.hub's checkpoints")
    getter.add_argument("--mirror", metavar="URL", help="take URL/FILE in place of every address; default: WSSS_MIRROR")
    getter.add_argument("--offline", action="store_true", default=None,
                        help="no network: say which file to put where; default: WSSS_OFFLINE=1")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    arguments = parse(argv)
    folder = arguments.folder or default_folder()
    if arguments.command == "list":
        show(folder)
    elif arguments.command == "get":
        get(arguments.names, folder, arguments.mirror, arguments.offline)
    else:
        verify(arguments.names, folder)


if __name__ == "__main__":
    run_script(main)

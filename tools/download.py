"""Lists, downloads and verifies start weights, data sets and released checkpoints (weights/registry.yaml).

    python tools/download.py list
    python tools/download.py get vit_base_imagenet voc2012_trainval --folder DATA
    python tools/download.py verify

An interrupted download goes on where it stopped. A file gets its name only once its size and hash are right.
"""

import argparse
from pathlib import Path

from engine.launch import run_script
from utils.cli import Parser
from utils.download import NOT_VERIFIED, default_folder, fetch, find, table, verify
from utils.errors import UserError


def main(argv: list[str]) -> None:
    options = parse(argv)
    folder = options.folder or default_folder()
    if options.command == "list":
        print("\n".join([*table(folder), "", f"folder: {folder}", "?: not published where we looked"]))
    elif options.command == "get":
        for entry in [find(name) for name in options.names]:
            path = fetch(entry.name, folder, options.mirror, options.offline)
            print(f"{entry.name}: {path}" + ("" if entry.published else f" ({NOT_VERIFIED})"))
    else:
        right = []
        for line, is_right in verify(options.names, folder):
            print(line)
            right.append(is_right)
        if not all(right):
            raise UserError(f"{right.count(False)} of {len(right)} files are missing or wrong")
        if not right:
            print(f"{folder} has no file of the registry")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="list|get|verify")
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


if __name__ == "__main__":
    run_script(main)

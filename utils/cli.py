"""One dialect for all tools that take settings: TOOL CHECKPOINT [INPUTS] [--options] [key=value ...].

Options are of the tool itself, key=value pairs change the config, that of the checkpoint where there is one.
"""

import argparse
import os
from collections.abc import Sequence
from typing import NoReturn

from utils.errors import UserError

CHECKPOINT = "weights of a run, a folder as released, a name of weights/registry.yaml or of the Hub, a released .pth"
SHARED = {   # options that several tools have
    "device": {"choices": ("cpu", "cuda"), "help": "default: a GPU, if there is one"},
    "batch": {"metavar": "COUNT", "help": "images of one size computed together; default: 1, on a GPU up to 8"},
    "crf": {"action": "store_true", "help": "label maps with the dense CRF"},
    "multi-scale": {"action": "store_true", "help": "maps that a threshold decides over evaluate.multi_scales"},
    "overwrite": {"action": "store_true", "help": "make again what is there already"},
}
FORMER = {   # key=value of version 0.1 that are no keys of the config
    "checkpoint": "the path alone, first", **{name: f"--{name} VALUE" for name in ("config", "format", "map", "split")},
    **{name: f"--{name} VALUE" for name in ("output", "high", "low")},
}
AS_SETTINGS = {   # shared options that stand for a key of the config
    "batch": "evaluate.images_at_once={}", "crf": "evaluate.crf=true", "multi_scale": "evaluate.multi_scale=true",
}


class Parser(argparse.ArgumentParser):
    """argparse with the tool's docstring as its help. A mistake is a UserError, of one line."""

    def __init__(self, text: str | None = None, **options) -> None:
        super().__init__(description=text, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help says more")

    def read(self, argv: Sequence[str]) -> argparse.Namespace:
        """The options, and `settings`: the key=value pairs, after those that shared options stand for.

        What exists as a file is no pair. Raises UserError.
        """
        for item in argv:
            name, equals, _ = item.partition("=")
            if equals and name in FORMER:
                raise UserError(f"{item}: write {FORMER[name]} in its place; --help says more")
        pairs = [item for item in argv if "=" in item and not item.startswith("-") and not os.path.exists(item)]
        options = self.parse_intermixed_args([item for item in argv if item not in pairs])
        given = {name: getattr(options, name, None) for name in AS_SETTINGS}
        options.settings = [AS_SETTINGS[name].format(value) for name, value in given.items() if value]
        options.settings += pairs
        return options


class CheckpointParser(Parser):
    """The parser of a tool that takes a checkpoint; it has CHECKPOINT, --config and key=value already."""

    def __init__(self, text: str | None, more: str, *shared: str, nargs: str | None = None) -> None:
        """more: of the usage line, what is the tool's own. shared: of its options, those that SHARED has.

        nargs: `?` where the tool has something to do without a checkpoint.
        """
        first = "[CHECKPOINT]" if nargs else "CHECKPOINT"
        super().__init__(text, usage=f"%(prog)s {first} {more}[options] [key=value ...]")
        self.add_argument("checkpoint", metavar="CHECKPOINT", nargs=nargs, help=CHECKPOINT)
        self.add_argument("--config", metavar="NAME", help="a config's name or file; default: the checkpoint's own")
        for name in shared:
            self.add_argument(f"--{name}", **SHARED[name])


def count(text: str) -> int:
    """For argparse: an integer of at least 1. Raises ArgumentTypeError."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no number of 1 or more")
    return int(text)

"""The names of classes, in the order of their ids 1..K; background (id 0) and ignore (255) are none."""

import re
from collections.abc import Iterable

from utils.errors import UserError

CONTROL = re.compile(r"[\0-\x1f\x7f]")   # characters that no name of a file or a line can have
BACKGROUND, IGNORED = "background", "ignore"
_SPELLINGS = {"background": BACKGROUND, "bg": BACKGROUND}
_SPELLINGS |= dict.fromkeys(("ignore", "ignored", "void", "unlabeled", "unlabelled"), IGNORED)
# of YAML and JSON, of tables with ids or colours, comments
_FOREIGN = re.compile(r"""[-"'\[{#]|\d+ *[:,]|.*[,\t]|.*:$|\.*$""")


def reserved(name: str) -> str | None:
    """What a name such as `Background`, `__background__`, `0: bg` or `__ignore__` stands for; None for a class."""
    return _SPELLINGS.get(re.sub(r"[\W\d_]+", "", name).lower())


def class_list(names: Iterable[str], source: object) -> tuple[str, ...]:
    """The classes, without a background in front, nor ignore and background, as labelme begins its lists.

    Raises UserError where background or ignore stand elsewhere, as ids would be shifted, for a comment, where two names
    differ by case and blanks alone, and where no name is left.
    """
    names = [name.strip() for name in names]
    head = [reserved(name) for name in names[:2]]
    names = names[2:] if head == [IGNORED, BACKGROUND] else names[head[:1] == [BACKGROUND] :]
    known: dict[str, str] = {}
    for name in names:
        if reserved(name) or _FOREIGN.match(name) or CONTROL.search(name):
            what = "names alone are expected, and no background but in front of them"
            raise UserError(f"{source}: {name!r} is no class; {what}")
        key = "".join(name.replace("/", "_").casefold().split())   # as folders are named by it
        if key in known:
            alike = f"not {known[key]!r} and {name!r}"
            raise UserError(f"{source}: expected the names of the classes, all different, {alike}")
        known[key] = name
    if not names:
        raise UserError(f"{source}: expected the names of the classes, one or more")
    return tuple(names)

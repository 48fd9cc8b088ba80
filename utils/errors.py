"""The one exception for a user's mistake, and words for its line."""

import difflib
from collections.abc import Iterable

NAMED = 5   # names a message lists
LONGEST = 2000   # characters of a message


class UserError(Exception):
    """A bad file, key, shape or option: one line that names the culprit and says what to do.

    Entry points print the line without a traceback and exit with a code that is not 0.
    """


def one_line(text: str) -> str:
    """The text for a terminal or a file: printable characters alone, in one line, a very long one without its middle.

    Messages quote what files hold: control sequences, halves of surrogates, megabytes.
    """
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(text.split()))
    return text if len(text) <= LONGEST else f"{text[: LONGEST * 2 // 3]} ... {text[-LONGEST // 4 :]}"


def nearest(name: str, known: Iterable[str]) -> str:
    """The known word most like `name`."""
    return max(known, key=lambda other: likeness(name, other))


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """'; did you mean X?' for a word that is not known; '' where nothing is known."""
    known = list(known)
    return f"; did you mean '{nearest(name, known)}'?" if known else ""


def name_some(names: Iterable[str]) -> str:
    """'a, b, c and 4 more'."""
    names = list(names)
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def likeness(a: str, b: str) -> float:
    """0 for words without a letter in common, 1 for the same."""
    return difflib.SequenceMatcher(None, a.lower(), b.lower()).ratio()

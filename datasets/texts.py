"""Texts that a user hands in: lists, tables, JSON files, in the encodings and with the line ends people have."""

import codecs
import json
from collections import Counter
from pathlib import Path
from typing import Any

from utils.errors import UserError


def decoded(data: bytes, source: object) -> str:
    """Bytes in UTF-8, or in UTF-16 with its mark, as text with \\n line ends.

    Raises UserError for any other encoding: which of the old ones it is cannot be told, a guess may be other names.
    """
    try:
        text = data.decode("utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise UserError(f"{source}: is no text in UTF-8; save it as UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_text(path: Path) -> str:
    """The `decoded` content of a file. Raises UserError."""
    try:
        return decoded(path.read_bytes(), path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def lines_of(text: str) -> list[str]:
    """Its lines, without blanks around them and without empty ones."""
    return [line.strip() for line in text.split("\n") if line.strip()]


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises UserError, also where a name stands twice in one object."""
    try:
        return json.loads(read_text(path), object_pairs_hook=_mapping)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from None


def _mapping(pairs: list[tuple[str, Any]]) -> dict:
    if len(mapping := dict(pairs)) < len(pairs):
        raise ValueError(f"{Counter(name for name, _ in pairs).most_common(1)[0][0]!r} stands there twice")
    return mapping

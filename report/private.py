"""Keeps what is private out of a page that is passed on: secrets and the names of home folders."""

import os
import re

HIDDEN = "***"
_NAMED = re.compile(
    r"(?i)((?:^|[\s.\-_?&;,{'\"])[\w.\-]*(?:password|passwd|secret|api[_-]?key|access[_-]?key|auth|credentials?|"
    r"(?:hf|hub|access|api|bearer|wandb|github)[_-]?token)[\w\-]*['\"]?\s*[=:]\s*)\S+"
)
_SHAPED = re.compile(r"\b(?:hf_|ghp_|gho_|github_pat_|glpat-|sk-|xox[abp]-|AKIA)[\w\-]{8,}")
_IN_URL = re.compile(r"(\w+://)[^/\s@]+@")
_HOMES = re.compile(r"(?<![\w.])(?:/home/[^/\s'\":,]+|/Users/[^/\s'\":,]+|/root)(?=/|[\s'\":,\])}]|$)")


def public(text: str) -> str:
    """The text without passwords, tokens and keys, known by their names or forms, and with `~` for home folders."""
    text = _IN_URL.sub(rf"\1{HIDDEN}@", text)
    text = _SHAPED.sub(HIDDEN, _NAMED.sub(rf"\1{HIDDEN}", text))
    home = os.path.expanduser("~")
    if len(home) > 1:
        text = re.sub(rf"(?<![\w.]){re.escape(home)}(?=/|\W|$)", "~", text)
    return _HOMES.sub("~", text)

"""What must be alike on all nodes: settings, data, weights, the folder all write to. All processes call these."""

import os
import socket
from collections.abc import Mapping, Sequence
from typing import Any

from engine.distributed import gather
from utils.errors import UserError, name_some
from utils.files import hash_of


def check_same(facts: Mapping[str, Any]) -> None:
    """Raises UserError where a fact, by its name, is not the same on all processes."""
    (host, ours), *others = gather((socket.gethostname(), dict(facts)))
    for rank, (other, theirs) in enumerate(others, 1):
        for name in (name for name in ours if theirs.get(name) != ours[name]):
            what = f"rank 0 ({host}) has {ours[name]}, rank {rank} ({other}) has {theirs.get(name)}"
            raise UserError(f"not the same on all nodes: {name}: {what}; give every node the same")


def check_same_file(file: str) -> None:
    """The same of the content of a file that each of several nodes reads from its own disk."""
    if int(os.environ.get("GROUP_WORLD_SIZE", 1)) > 1:
        check_same({f"the content of {file}": hash_of(file)[:12]})


def check_all_there(missing: Sequence[str], count: int, folder: str | os.PathLike) -> None:
    """Raises UserError where a process misses files in a folder after all have written theirs."""
    for rank, (host, names) in enumerate(gather((socket.gethostname(), missing))):
        if names:
            lacking = f"{len(names)} of {count} files, as {name_some(names)}"
            raise UserError(f"{folder}: rank {rank} ({host}) misses {lacking}: all nodes must share this folder")

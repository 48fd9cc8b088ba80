"""Whether the network may be used."""

import os


def is_offline() -> bool:
    """Whether WSSS_OFFLINE forbids the network."""
    return os.environ.get("WSSS_OFFLINE", "").lower() not in ("", "0", "false", "no")

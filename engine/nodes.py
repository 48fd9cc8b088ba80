"""Several machines that run one command together: what torchrun is told, and how the launchers end together.

Environment: NNODES, NODE_RANK (0 to NNODES - 1), MASTER_ADDR (of node 0), MASTER_PORT where PORT is auto; MAX_RESTARTS,
how often all processes are started again after one of them died (0); NODES_TIMEOUT, how many seconds a node waits for
the others at the start and after such a death (600).
"""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import NamedTuple

from utils.errors import UserError
from utils.processes import STOPS, children

STORE = "WSSS_STORE"   # HOST:PORT of the store of the launchers, where it is not at MASTER_ADDR:MASTER_PORT
GRACE = 20   # seconds in which the processes of this node end by themselves after another one has gone


class Nodes(NamedTuple):
    """How many there are, which is this one, where the first one is, and how often processes are started again."""

    count: int = 1
    rank: int = 0
    address: str = "127.0.0.1"
    restarts: int = 0
    timeout: int = 600

    def options(self, port: int) -> list[str]:
        """torchrun's. With restarts its nodes meet again each time (c10d); the first process may then be on any."""
        options = ["--nnodes", str(self.count), "--max-restarts", str(self.restarts)]
        if self.count == 1 or not self.restarts:
            options += ["--node-rank", str(self.rank), "--master-addr", self.address, "--master-port", str(port)]
            return [*options, "--rdzv-conf", f"timeout={self.timeout}"]
        os.environ[STORE] = f"{self.address}:{port}"
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"   # the processes' store is a new one after each meeting
        family, kind, *_, there = socket.getaddrinfo(self.address, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:   # sends nothing
            probe.connect(there)
            own = probe.getsockname()[0]
        options += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{self.address}:{port}", "--rdzv-id", str(port)]
        waits = f"join_timeout={self.timeout},is_host={int(self.rank == 0)}"
        return [*options, "--local-addr", own, "--rdzv-conf", waits]


ONE = Nodes()


def nodes_from_environment() -> Nodes:
    """Raises UserError, naming the variable."""
    count, restarts = _number("NNODES", 1, least=1), _number("MAX_RESTARTS", 0)
    timeout = _number("NODES_TIMEOUT", 600, least=1)
    if count == 1:
        if _number("NODE_RANK", 0) > 0:
            raise UserError(f"NODE_RANK is {os.environ['NODE_RANK']}, but NNODES is 1: set NNODES too")
        return Nodes(restarts=restarts, timeout=timeout)
    for name in ("NODE_RANK", "MASTER_ADDR"):
        if not os.environ.get(name):
            raise UserError(f"NNODES is {count}, but {name} is not set: give this node's number and node 0's address")
    rank, address = _number("NODE_RANK", 0), os.environ["MASTER_ADDR"]
    if rank >= count:
        raise UserError(f"NODE_RANK is {rank}: expected 0 to {count - 1}, as NNODES is {count}")
    try:
        socket.getaddrinfo(address, None)
    except OSError:
        raise UserError(f"MASTER_ADDR is '{address}': this machine knows no such host") from None
    return Nodes(count, rank, address, restarts, timeout)


def _number(name: str, default: int, least: int = 0) -> int:
    text = os.environ.get(name) or str(default)
    if not text.isdecimal() or int(text) < least:
        raise UserError(f"{name} is '{text}': expected a number, {least} or more")
    return int(text)


class Company:
    """The launchers of the other nodes: one that ends for a reason says it to them, and they end with it."""

    def __init__(self, nodes: Nodes, port: int, take: Callable[[str], None]) -> None:
        """take: gets the line that another launcher ended with, or that it has gone."""
        self.nodes, self.port, self.take, self.over = nodes, port, take, threading.Event()
        self.thread = threading.Thread(target=self._listen, daemon=True)

    def tell(self, line: str) -> None:
        """All end with this line; the first word counts."""
        if line and self.nodes.count > 1:
            with contextlib.suppress(RuntimeError, OSError):   # their store has gone
                self._store(5).compare_set("over", "", line)
                self.over.wait(3)   # until they have heard it: the store may end with this process

    def __enter__(self) -> "Company":
        if self.nodes.count > 1:
            self.signals, self.written = socket.socketpair()   # Python heeds no signal while torch waits for others
            self.signals.setblocking(False)
            self.written.setblocking(False)
            signal.set_wakeup_fd(self.written.fileno(), warn_on_full_buffer=False)
            self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.over.set()
        signal.set_wakeup_fd(-1)
        if self.nodes.count > 1:
            self.thread.join()   # within torch it would not outlive Python

    def _signalled(self) -> int:
        """The number of a signal that asks to end and has come, 0 for none."""
        with contextlib.suppress(BlockingIOError):
            return next((number for number in self.signals.recv(64) if number in STOPS), 0)
        return 0

    def _store(self, seconds: float):
        import torch.distributed as dist

        socket.create_connection((self.nodes.address, self.port), seconds).close()   # soon, where nobody listens
        wait = timedelta(seconds=seconds)
        return dist.TCPStore(self.nodes.address, self.port, is_master=False, wait_for_workers=False, timeout=wait)

    def _listen(self) -> None:
        store, met, lost = None, False, 0.0
        while not self.over.wait(0.5):
            if (number := self._signalled()) and not children(os.getpid()):
                print("\ninterrupted while it waited for the other nodes", file=sys.stderr, flush=True)
                os._exit(128 + number)
            try:
                store = store or self._store(1)
                line = store.get("over").decode() if store.check(["over"]) else None
                met, lost = True, 0.0
            except (RuntimeError, OSError):
                store, lost = None, lost + 1.5   # seconds, of the wait and of the attempt
                line = f"node 0 ({self.nodes.address}) does not answer any more" if met and lost > GRACE else None
            if line and not self.over.wait(2):   # what ends here by itself has its own line
                self.take(line)
                kill_children(os.getpid())
                return


def kill_children(launcher: int) -> None:
    """SIGKILL to the processes that a launcher started, but not to this one: stopped ones heed no other signal."""
    for child in set(children(launcher)) - {os.getpid()}:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)

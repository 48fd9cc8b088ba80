"""Ends a training in which nothing moves any more, with one line that names the process that is behind.

Every process enters the same phases in the same order (`utils.progress.enter`), and a thread of it tells the others
where it stands. The run hangs where all processes of the earliest phase have not moved for `train.timeout` seconds: the
others wait for them. Each process measures by its own monotonic clock; no clocks are compared.
"""

import json
import os
import socket
import threading
import time
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from engine.launch import ERROR_FILE, HUNG_CODE, HUNG_MARK, leave, report
from engine.nodes import STORE, kill_children
from utils.progress import place

ENDED = 1 << 62   # phase of a process that is through
PATIENCE = 4   # beats after which a process that sends none has stopped
# what a process tells; idle: seconds without a move
Beat = namedtuple("Beat", "number phase name idle host process")


class Watch:
    """The beats of all processes, as this one received them."""

    def __init__(self, world: int, timeout: float, now: float) -> None:
        self.timeout, self.interval = timeout, min(5.0, timeout / 10)
        nothing = Beat(0, 0, "the start", 0.0, "", 0)
        self.beats, self.heard = dict.fromkeys(range(world), nothing), dict.fromkeys(range(world), now)
        self.awake = self.last = now

    def tick(self, now: float) -> None:
        """To be called every `interval`; where it was not, this process had been stopped, and all times begin anew."""
        if now - self.last > max(self.timeout / 2, PATIENCE * self.interval):
            self.awake, self.heard = now, dict.fromkeys(self.heard, now)
        self.last = now

    def take(self, rank: int, beat: Beat, now: float) -> None:
        if beat.number != self.beats[rank].number or beat.process != self.beats[rank].process:
            self.beats[rank], self.heard[rank] = beat, now

    def verdict(self, now: float) -> str | None:
        """The line to end with, None while something moves."""
        first = min(beat.phase for beat in self.beats.values())
        behind = [rank for rank, beat in self.beats.items() if beat.phase == first]
        silent = {rank: now - self.heard[rank] for rank in behind}
        idle = [min(self.beats[rank].idle + silent[rank], now - self.awake) for rank in behind]
        if first == ENDED or min(idle) < self.timeout:
            return None
        stopped = [rank for rank in behind if silent[rank] > PATIENCE * self.interval]
        names = ", ".join(map(self._named, stopped or behind))
        what = f"{'stopped or gone' if stopped else 'no move'} for {min(idle):.0f} s"
        at = self.beats[(stopped or behind)[0]].name
        return f"{names}: {what}, at {at}: the run is ended; resume=auto goes on from the last checkpoint {HUNG_MARK}"

    def _named(self, rank: int) -> str:
        beat = self.beats[rank]
        return f"rank {rank} ({beat.host}, process {beat.process})" if beat.process else f"rank {rank} (never heard of)"


@contextmanager
def watching(timeout: float | None) -> Iterator[None]:
    """Within it this process is ended with code 4 where the run hangs; the launcher ends the others. None: never."""
    over = threading.Event()
    thread = threading.Thread(target=_keep_watch, args=(timeout, over), daemon=True)
    if timeout is not None:
        thread.start()
    try:
        yield
    finally:
        over.set()
        if timeout is not None:
            thread.join(5)


def _keep_watch(timeout: float, over: threading.Event) -> None:
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    watch, store, number, ended = Watch(world, timeout, time.monotonic()), None, 0, False
    while not ended:
        ended = number > 0 and over.wait(watch.interval)
        now, number, at = time.monotonic(), number + 1, place()
        watch.tick(now)
        phase, idle = (ENDED, 0.0) if ended else (at.phase, now - max(at.since, watch.awake))
        own = Beat(number, phase, at.name, idle, socket.gethostname(), os.getpid())
        watch.take(rank, own, now)
        if world > 1:
            try:
                store = store or _connect(watch.interval)
                store.set(f"beat/{rank}", json.dumps(own))
                for other in (one for one in range(world) if one != rank and store.check([f"beat/{one}"])):
                    watch.take(other, Beat(*json.loads(store.get(f"beat/{other}"))), time.monotonic())
            except RuntimeError:   # of a store that does not answer: its node may be gone; the next beat tries again
                store = None
        if not ended and (line := watch.verdict(time.monotonic())):
            report(line)
            if ERROR_FILE in os.environ:   # by the launcher
                kill_children(os.getppid())
            leave(HUNG_CODE)
            return


def _connect(interval: float) -> dist.Store:
    """The launcher's store, under a name that no earlier start of these processes had."""
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    started = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
    at, _, own = os.environ.get(STORE, f"{host}:{port}").rpartition(":")
    wait = timedelta(seconds=max(interval, 2))
    store = dist.TCPStore(at, int(own), is_master=False, wait_for_workers=False, timeout=wait)
    return dist.PrefixStore(f"watchdog/{port if STORE in os.environ else started}", store)

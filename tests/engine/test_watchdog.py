"""engine/watchdog.py on beats and a clock that the test gives."""

import threading

import pytest

from engine import watchdog
from engine.watchdog import ENDED, Beat, Watch
from utils import progress


def watch_of(beats, heard, now=100.0, timeout=30.0):
    """beats: {rank: (phase, name, idle)}; heard: when, while this process ticked all the time."""
    watch = Watch(len(beats), timeout, 0.0)
    for second in range(int(now) + 1):
        watch.tick(float(second))
    for rank, (phase, name, idle) in beats.items():
        watch.take(rank, Beat(7, phase, name, idle, f"host{rank}", 40 + rank), heard[rank])
    return watch


@pytest.mark.parametrize(("beats", "heard", "line"), [
    # those that wait for the one that is behind are not named
    ([(9, "the step", 95.0), (8, "the batch", 31.0)], [100, 99],
     "rank 1 (host1, process 41): no move for 32 s, at the batch: the run is ended; resume=auto"),
    # one that is stopped cannot speak
    ([(9, "the step", 31.0), (9, "the step", 0.0)], [100, 69],
     "rank 1 (host1, process 41): stopped or gone for 31 s, at the"),
    # one of the last moves: as in a validation, whose first to end wait for the others
    ([(9, "validation", 2.0), (9, "validation", 90.0), (10, "the sum", 90.0)], [100, 100, 100], None),
    # all stand; one that has ended has no part in it
    ([(9, "the step", 33.0), (9, "the step", 32.0), (ENDED, "", 0.0)], [100, 100, 1],
     "rank 0 (host0, process 40), rank 1 (host1, process 41): no move for 32 s"),
    ([(ENDED, "", 0.0), (ENDED, "", 0.0)], [1, 1], None),
])
def test_who_is_named(beats, heard, line):
    verdict = watch_of(dict(enumerate(beats)), heard).verdict(100.0)
    assert (verdict or "").startswith(line or "") and (verdict is None) == (line is None)


def test_a_process_that_never_came_is_named():
    watch = watch_of({0: (1, "the start", 40.0)}, {0: 100.0})
    watch.beats[1], watch.heard[1] = Watch(1, 30.0, 0.0).beats[0], 0.0
    assert watch.verdict(100.0).startswith("rank 1 (never heard of): stopped or gone for 100 s, at the start")


def test_a_process_that_was_stopped_itself_begins_anew():
    """As after Ctrl-Z, fg: an hour without a tick is nobody's fault."""
    watch = watch_of({0: (9, "the step", 1.0), 1: (9, "the step", 1.0)}, {0: 100.0, 1: 100.0})
    watch.tick(3700.0)
    assert watch.verdict(3700.0) is None and watch.verdict(3729.0) is None
    assert "rank 0" in watch.verdict(3731.0)


def test_a_single_process_that_hangs_ends_itself_whatever_the_clock_on_the_wall_says(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "WSSS_ERROR_FILE"):
        monkeypatch.delenv(name, raising=False)
    ended, lines = threading.Event(), []
    monkeypatch.setattr("time.time", lambda: 0.0)   # jumped back
    monkeypatch.setattr(watchdog, "report", lines.append)
    monkeypatch.setattr(watchdog, "leave", lambda code: (lines.append(code), ended.set()))
    progress.enter("the batch of iteration 1")
    with watchdog.watching(0.3):
        bar = progress.progress_bar(total=9, disable=True)
        for _ in range(8):   # while it moves nothing happens, also with a bar that is not shown
            bar.update()
            assert not ended.wait(0.1)
        assert ended.wait(5)
    assert lines[1] == 4 and "at the batch of iteration 1" in lines[0] and "rank 0" in lines[0]

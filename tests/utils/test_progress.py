"""A log file gets lines, now and then."""

import multiprocessing
import threading
import time

from utils import progress


def test_a_killed_process_leaves_no_bar_waiting(capsys):
    def hold(taken):
        progress.tqdm.get_lock().acquire()
        taken.set()
        time.sleep(60)

    list(progress.progress_bar(range(2)))
    context = multiprocessing.get_context("fork")
    taken = context.Event()
    process = context.Process(target=hold, args=(taken,))
    process.start()
    assert taken.wait(20)
    process.kill()
    process.join()
    drawing = threading.Thread(target=lambda: list(progress.progress_bar(range(2))), daemon=True)
    drawing.start()
    drawing.join(10)
    assert not drawing.is_alive()


def test_lines_where_there_is_no_terminal(capsys, monkeypatch):
    list(progress.progress_bar(range(1000), "work", mininterval=0))
    (line,) = capsys.readouterr().err.splitlines()   # \r ends a line here, too
    assert line.startswith("work: 100%") and "1000/1000" in line
    with progress.progress_bar(range(2), "outer"):   # of a training that validates
        list(progress.progress_bar(range(3), "inner", mininterval=0, miniters=1))
    assert [line.partition(":")[0] for line in capsys.readouterr().err.splitlines()] == ["inner", "outer"]
    monkeypatch.setattr(progress, "PAUSE", 0)
    list(progress.progress_bar(range(3), mininterval=0, miniters=1))
    assert [f"{n}/3" in line for n, line in enumerate(capsys.readouterr().err.splitlines()[:4])] == [True] * 4

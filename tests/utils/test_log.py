"""utils/log.py: the log, and metrics that survive a kill."""

import json
import time

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from utils.log import MetricsWriter, read_metrics, setup_logger


def test_log_goes_to_stdout_and_file(tmp_path, capsys):
    path = tmp_path / "run" / "train.log"
    setup_logger(path).info("hello")
    setup_logger(path).info("again")
    assert [line.split("  ", 1)[1] for line in path.read_text().splitlines()] == ["hello", "again"]
    assert capsys.readouterr().out.count("hello") == 1


def test_other_ranks_are_silent(tmp_path, capsys):
    setup_logger(tmp_path / "train.log", main=False).info("hello")
    assert capsys.readouterr().out == "" and not (tmp_path / "train.log").exists()


def test_metrics_lines_and_events(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.scalars(0, {"total": np.float32(1.5), "seg": float("nan")}, prefix="loss/")
    writer.image(0, "picture", np.zeros((4, 5, 3), np.uint8))
    writer.close()
    (line,) = (json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert line.pop("time") > 0
    assert line == {"iteration": 0, "loss/total": 1.5, "loss/seg": None}
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Scalars("loss/total")[0].value == 1.5 and events.Tags()["images"] == ["picture"]


def _write(folder, start, end):
    writer = MetricsWriter(folder, start)
    for iteration in range(start, end):
        writer.scalars(iteration, {"loss": iteration})
    writer.close()


def test_resumed_metrics_are_those_of_an_uninterrupted_run(tmp_path):
    _write(tmp_path, 0, 6)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 6, "lo')
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 6
    time.sleep(1)   # events are read in the order of their files' names, which begin with the second
    _write(tmp_path, 4, 8)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["iteration"] for line in lines] == [line["loss"] for line in lines] == list(range(8))
    assert [path.name for path in tmp_path.glob("metrics*")] == ["metrics.jsonl"]
    steps = [event.step for event in EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")]
    assert steps == list(range(8))


def test_a_new_run_starts_empty(tmp_path):
    _write(tmp_path, 0, 3)
    _write(tmp_path, 0, 1)
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1

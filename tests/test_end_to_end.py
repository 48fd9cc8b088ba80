"""Train and evaluate through the launchers, as a user does."""

import json
import math
import re
import signal
import subprocess
import time

import pytest

from tests import tiny
from utils.log import read_metrics

TERMS = ("cls", "cls_aux", "token", "ptc", "certain", "uncertain", "seg", "energy", "total")


def terms(run):
    """[iteration][term] of a run's training lines."""
    lines = [line for line in read_metrics(run / "metrics.jsonl") if "train/total" in line]
    return [{name: line[f"train/{name}"] for name in TERMS} for line in lines]


@pytest.fixture(scope="module")
def run(voc_root, tmp_path_factory):
    """One finished run."""
    output = tmp_path_factory.mktemp("runs")
    done = tiny.train(voc_root, output)
    assert done.returncode == 0, done.stderr
    return output / "tiny"


def test_a_run_leaves_what_it_should(run):
    for name in ("config.yaml", "train.log", "metrics.jsonl", "tensorboard", "checkpoints/best.weights.safetensors"):
        assert (run / name).exists(), name
    assert {p.name for p in (run / "checkpoints").glob("*.state.pt")} == {f"iter_00000{i}.state.pt" for i in (3, 6)}
    losses = terms(run)
    assert len(losses) == tiny.ITERATIONS
    assert all(math.isfinite(value) for line in losses for value in line.values())
    log = (run / "train.log").read_text()
    last = [line for line in read_metrics(run / "metrics.jsonl") if "train/total" in line][-1]
    assert last["train/memory_gb"] > 0.1 and f"  {last['train/memory_gb']:.2f} GB  eta 0:00:00" in log
    assert "validation at 6" in log and "8 training images" in log


def test_evaluation_on_one_and_on_two_processes(run):
    weights = tiny.last_weights(run)
    for done in (tiny.fork("tools/infer_voc.py", weights), tiny.bash("run_evaluate_voc.sh", "cpu", 2, weights)):
        assert done.returncode == 0, done.stderr
        assert "mIoU" in done.stdout and "val" in done.stdout and "4 images" in done.stdout
    more = json.loads((run / "results.json").read_text())
    assert len(more) == 6 and {row["map"] for row in more[:3]} == {"cam", "lam", "seg"}
    own = {"seconds": 0, "evaluation": None}
    for one, two in zip(more[:3], more[3:], strict=True):
        assert {**one, **own} == {**two, **own}
    folders = [run / "evaluation" / row["evaluation"] for row in (more[0], more[3])]
    first, second = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders)
    assert first == second


def test_two_processes_follow_one(voc_root, tmp_path):
    """The same global batches: 20 steps on two gloo processes stay within 1e-5 of one process, also where the launcher
    was asked to end, and the run goes on from the step at which both did."""
    steps = ["train.iterations=20", "train.validate_every=20", "train.lr=1e-4", "train.checkpoint_every=20"]
    done = tiny.train_alone(voc_root, tmp_path, *steps, tag="on_1")
    assert done.returncode == 0, done.stderr
    command = ["bash", "run_train.sh", "scripts/train_voc.py", "cpu", "2", "auto", "on_2", f"data.root={voc_root}"]
    command += [f"output={tmp_path}", *tiny.SETTINGS, *steps]
    process = subprocess.Popen(command, cwd=tiny.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics, deadline = tmp_path / "on_2" / "metrics.jsonl", time.time() + 120
    while not (metrics.is_file() and metrics.stat().st_size) and time.time() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert error.endswith("interrupted; resume=auto goes on from the last checkpoint\n")
    (stopped,) = re.findall(r"SIGTERM: stopped after iteration (\d+), whose state is written; resume=auto goes on", out)
    assert int(stopped) == len(terms(tmp_path / "on_2")) < 20
    done = tiny.train(voc_root, tmp_path, *steps, "resume=auto", tag="on_2", count=2)
    assert done.returncode == 0 and f"resumed after iteration {stopped}" in done.stdout, done.stderr
    one, two = terms(tmp_path / "on_1"), terms(tmp_path / "on_2")
    assert len(one) == len(two) == 20
    for alone, shared in zip(one, two, strict=True):
        assert shared == pytest.approx(alone, rel=1e-5, abs=1e-7)


def test_a_second_run_of_the_same_tag_needs_resume(voc_root, run):
    done = tiny.train_alone(voc_root, run.parent)
    assert done.returncode == 2
    assert "resume=auto" in done.stderr and "Traceback" not in done.stderr


def test_from_another_folder(voc_root, run, tmp_path):
    done = tiny.train(voc_root, "here", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert terms(tmp_path / "here" / "tiny") == terms(run)

"""Training on two nodes of one machine, of processes that are killed and started again, and of one that hangs."""

import os
import signal
import subprocess
import sys
import time

import pytest

from engine.launch import HUNG_CODE, check_port
from tests import tiny
from tests.engine.test_nodes import process_of
from utils.log import read_metrics

STEPS = ["train.iterations=20", "train.validate_every=20", "train.lr=1e-4", "train.picture_every=100"]


def start(root, output, tag, *settings, count=1, port="auto", **environment):
    """run_train.sh's launcher, which goes on in the background; each process has one thread."""
    command = [sys.executable, "engine/launch.py", "scripts/train_voc.py", "cpu", str(count), str(port), f"tag={tag}"]
    command += [f"data.root={root}", f"output={output}", *tiny.SETTINGS, *STEPS, *settings]
    given = {name: str(value) for name, value in {"OMP_NUM_THREADS": 1, **environment}.items()}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=tiny.ROOT, env=os.environ | given, **streams)


def start_nodes(root, output, tag, *settings, **environment):
    given = {"NNODES": 2, "MASTER_ADDR": "127.0.0.1", "port": check_port("auto"), **environment}
    return [start(root, output, tag, *settings, NODE_RANK=rank, **given) for rank in range(2)]


def ended(process, seconds=150):
    """The exit code and what was written to stderr but the bars."""
    _, error = process.communicate(timeout=seconds)
    lines = [line for line in error.replace("\r", "\n").splitlines() if line.startswith(("error", "process"))]
    assert "Traceback" not in error
    return process.returncode, lines


def wait_for_a_state(run):
    deadline = time.monotonic() + 150
    while not list((run / "checkpoints").glob("*.state.pt")) and time.monotonic() < deadline:
        time.sleep(0.02)


@pytest.fixture(scope="module")
def two_nodes(voc_root, tmp_path_factory):
    """A run of 20 steps on two nodes."""
    output = tmp_path_factory.mktemp("nodes")
    assert [ended(node) for node in start_nodes(voc_root, output, "two")] == [(0, [])] * 2
    return output / "two"


def terms(run):
    return [{name: value for name, value in line.items() if name.startswith("train/") and name.count("_") < 2
             and name not in ("train/memory_gb", "train/lr")} for line in read_metrics(run / "metrics.jsonl")]


def test_two_nodes_follow_one_process(voc_root, two_nodes, tmp_path):
    done = tiny.train_alone(voc_root, tmp_path, *STEPS, tag="one")
    assert done.returncode == 0, done.stderr
    one, two = terms(tmp_path / "one"), terms(two_nodes)
    assert len(one) == len(two) == 21 and "train/total" in one[0]
    for alone, shared in zip(one, two, strict=True):
        assert shared == pytest.approx(alone, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_run_whose_rank_is_killed_is_the_same_run(voc_root, two_nodes, tmp_path, rank):
    process = start(voc_root, tmp_path, "killed", count=2, MAX_RESTARTS=1)
    wait_for_a_state(tmp_path / "killed")
    os.kill(process_of(process, rank), signal.SIGKILL)
    assert not tiny.last_weights(tmp_path / "killed", 20).exists(), "the run was over before the process was killed"
    assert ended(process) == (0, [])
    assert "resumed after iteration" in (tmp_path / "killed" / "train.log").read_text()
    tiny.assert_same_weights(tiny.last_weights(tmp_path / "killed", 20), tiny.last_weights(two_nodes, 20))
    assert terms(tmp_path / "killed") == terms(two_nodes)


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_node_whose_process_is_stopped_ends_with_the_other(voc_root, tmp_path, stopped):
    nodes = start_nodes(voc_root, tmp_path, "hung", "train.timeout=4", "train.iterations=9999")
    wait_for_a_state(tmp_path / "hung")
    since = time.monotonic()
    os.kill(process_of(nodes[stopped], stopped), signal.SIGSTOP)
    results = [ended(node) for node in nodes]
    assert results[0] == results[1] and time.monotonic() - since < 40
    code, (line,) = results[0]
    assert code == HUNG_CODE and line.startswith(f"error: rank {stopped} (")


@pytest.mark.slow
def test_a_killed_node_that_comes_back_goes_on(voc_root, two_nodes, tmp_path):
    given = {"NNODES": 2, "MASTER_ADDR": "127.0.0.1", "MAX_RESTARTS": 3, "port": check_port("auto")}
    nodes = start_nodes(voc_root, tmp_path, "killed", **given)
    wait_for_a_state(tmp_path / "killed")
    nodes[1].kill()
    nodes[1].communicate()
    nodes[1] = start(voc_root, tmp_path, "killed", NODE_RANK=1, **given)
    assert [ended(node) for node in nodes] == [(0, [])] * 2
    tiny.assert_same_weights(tiny.last_weights(tmp_path / "killed", 20), tiny.last_weights(two_nodes, 20))

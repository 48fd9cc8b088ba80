"""engine/nodes.py: several launchers of one machine as nodes, processes that are started again, run_train_slurm.sh."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from engine import launch
from engine.nodes import Nodes
from tests.engine.test_launch import ROOT, house, launch_script, run  # noqa: F401
from utils.errors import UserError
from utils.processes import children


def process_of(launcher, rank):
    own = {pid: Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in children(launcher.pid)}
    return next(pid for pid, variables in own.items() if b"RANK=%d" % rank in variables)


def test_a_mistake_is_not_started_again_and_a_killed_process_is(house):  # noqa: F811
    process = launch_script(house, "mistake", count=2, MAX_RESTARTS="2")
    assert process.communicate(timeout=60) == ("", "\nerror: image x.jpg is missing\n") and process.returncode == 2
    process = launch_script(house, "killed once", count=2, MAX_RESTARTS="1")
    out, error = process.communicate(timeout=60)
    assert process.returncode == 0 and "argv|['killed once']|2|cpu" in out and error == ""


def test_a_process_that_lost_a_killed_one_says_nothing(house):  # noqa: F811
    process = launch_script(house, "wait for the others", count=2, SLOW_RANK="1")
    process.stdout.readline()
    os.kill(process_of(process, 1), signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (137, "process 1 was killed by SIGKILL\n")


HANGS = """
import os, time
import torch.distributed as dist
from engine.launch import run_script
from engine.watchdog import watching
from utils.progress import enter

def main(argv):
    with watching(3.0):
        dist.init_process_group("gloo")
        for step in range(9999):
            enter(f"the step of iteration {step}")
            dist.barrier()
            if step == 50:
                print(flush=True)
            time.sleep(0.02)

if __name__ == "__main__":
    run_script(main)
"""


def test_a_stopped_rank_ends_the_run_with_one_line(tmp_path):
    (script := tmp_path / "train.py").write_text(HANGS)
    command = [sys.executable, ROOT / "engine/launch.py", script, "cpu", "2", "auto"]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(list(map(str, command)), env=os.environ | {"PYTHONPATH": str(ROOT)}, **streams)
    process.stdout.readline()
    since, pid = time.monotonic(), process_of(process, 1)
    os.kill(pid, signal.SIGSTOP)
    _, error = process.communicate(timeout=60)
    assert process.returncode == launch.HUNG_CODE and time.monotonic() - since < 20
    assert error.startswith(f"\nerror: rank 1 ({socket.gethostname()}, process {pid}): stopped or gone for 3 s, ")
    assert error.count("\n") == 2


class OneWorker(torch.utils.data.Dataset):
    """Its worker is killed, as for want of memory."""

    def __len__(self):
        return 1

    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_of_the_data_loader_is_one_line(monkeypatch, capsys):
    monkeypatch.delenv(launch.ERROR_FILE, raising=False)
    with pytest.raises(SystemExit) as caught:
        launch.run_script(lambda argv: list(torch.utils.data.DataLoader(OneWorker(), num_workers=1)))
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.startswith("error: DataLoader worker (pid") and error.count("\n") == 1
    assert "give fewer data.workers" in error


@pytest.mark.parametrize("killed", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_killed_node_ends_the_other_with_one_line(house, killed):  # noqa: F811
    given = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(launch.check_port("auto"))}
    given["SLOW_RANK"] = str(killed)
    nodes = [launch_script(house, "wait for the others", **given, NODE_RANK=str(rank)) for rank in range(2)]
    assert all(node.stdout.readline().startswith("pid ") for node in nodes)
    nodes[killed].kill()   # and with it its processes
    _, error = nodes[1 - killed].communicate(timeout=30)
    assert nodes[1 - killed].returncode == launch.LOST_CODE
    assert error.startswith("error: another process has gone, its node says why; resume=auto")
    assert error.count("\n") == 1


def test_a_node_that_waits_for_others_ends_by_a_signal_and_by_itself(house):  # noqa: F811
    port = launch.check_port("auto")
    given = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
    process = launch_script(house, "sleep", **given, NODES_TIMEOUT="3")
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 2 and error.count("\n") == 1
    assert error.startswith("error: the 2 nodes did not meet at 127.0.0.1:")
    process = launch_script(house, "sleep", **given, NODES_TIMEOUT="60")
    while socket.socket().connect_ex(("127.0.0.1", port)):   # until it listens there
        time.sleep(0.1)
    process.terminate()
    assert process.communicate(timeout=10)[1] == "\ninterrupted while it waited for the other nodes\n"
    assert process.returncode == 143


@pytest.mark.parametrize(("given", "words"), [
    ({"NNODES": "two"}, "NNODES is 'two': expected a number, 1 or more"),
    ({"NNODES": "0"}, "NNODES is '0'"),
    ({"NODE_RANK": "1"}, "NODE_RANK is 1, but NNODES is 1"),
    ({"NNODES": "2", "MASTER_ADDR": "127.0.0.1"}, "NNODES is 2, but NODE_RANK is not set"),
    ({"NNODES": "2", "NODE_RANK": "0"}, "NNODES is 2, but MASTER_ADDR is not set"),
    ({"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "127.0.0.1"}, "NODE_RANK is 2: expected 0 to 1, as NNODES is 2"),
    ({"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "no.such.host.invalid"}, "knows no such host"),
    ({"MAX_RESTARTS": "x"}, "MAX_RESTARTS is 'x'"),
    ({"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "127.0.0.1"}, "PORT is auto, but NNODES is 2: give a number"),
])
def test_mistakes_in_the_variables(monkeypatch, capsys, given, words):
    for name in ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "MAX_RESTARTS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launch, "check_checkout", lambda file: None)
    assert launch.main(["scripts/train_voc.py", "cpu", "1", "auto"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and error.count("\n") == 1


def test_the_port_of_another_node_is_not_tested_here():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert launch.check_port(str(port), Nodes(2, 1, "10.0.0.1")) == port
        with pytest.raises(UserError, match="in use"):
            launch.check_port(str(port), Nodes(2, 0, "10.0.0.1"))


@pytest.mark.parametrize("code", [0, 2, 138])
def test_a_slurm_job_queues_itself_again_where_its_time_was_over(house, code):  # noqa: F811
    calls, stubs = house / "calls", house / "stubs"
    stubs.mkdir()
    scripts = {
        stubs / "scontrol": f'[ "$1" = show ] && printf "n%s\\n" 7 8 || echo "scontrol $*" >> {calls}',
        stubs / "srun": 'shift\nfor node in 0 1; do SLURM_NODEID=$node "$@" & pids="$pids $!"; done\n'
                        "for pid in $pids; do wait $pid || code=$?; done\nexit ${code:-0}",
        house / "run_train.sh":
            f'echo "$NNODES $NODE_RANK $MASTER_ADDR $SRUN_CPUS_PER_TASK $*" >> {calls}\nexit {code}',
    }
    for path, text in scripts.items():
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)
    job = {"SLURM_SUBMIT_DIR": str(house), "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[7-8]",
           "SLURM_JOB_ID": "20005", "SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_PER_TASK": "32",
           "PATH": f"{stubs}:{os.environ['PATH']}"}
    result = run(house, "run_train_slurm.sh", "scripts/train_voc.py", "my_tag", "data.root=a b", **job)
    given = "scripts/train_voc.py 0,1,2,3 4 20005 my_tag data.root=a b resume=auto"
    tasks = [f"2 {node} n7 32 {given}" for node in range(2)]
    assert result.returncode == code, result.stderr
    assert sorted(calls.read_text().splitlines()) == tasks + ["scontrol requeue 20005"] * (code == 138)

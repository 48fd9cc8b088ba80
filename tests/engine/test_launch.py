"""engine/launch.py and the launchers, with small scripts in place of the real ones."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch._utils import ExceptionWrapper

from engine import launch
from utils.errors import UserError
from utils.processes import IMPATIENT

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """
import os, signal, sys, time
if "IMPORTS" in os.environ:
    print("imports", flush=True)
    time.sleep(float(os.environ["IMPORTS"]))
from engine.launch import run_script
from utils.errors import UserError
from utils.processes import stops_put_off

def main(argv):
    rank = int(os.environ["RANK"])
    if argv == ["crash"]:
        raise ZeroDivisionError("boom")
    if argv == ["mistake"]:
        raise UserError("image x.jpg is missing")
    if argv == ["mistake of rank 1"]:
        import torch
        torch.distributed.init_process_group("gloo")
        if rank == 1:
            raise UserError("image x.jpg is missing")
        torch.distributed.barrier()
    if argv == ["unwritable"]:
        open("/proc/x", "w")
    if argv == ["killed"]:
        os.kill(os.getpid(), 9)
    if argv == ["killed once"] and rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), 9)
    if argv == ["wait for the others"]:
        import torch
        torch.distributed.init_process_group("gloo")
        torch.distributed.barrier()
        sys.stdout.write(f"pid {os.getpid()}\\n")
        sys.stdout.flush()
        if rank == int(os.environ["SLOW_RANK"]):
            time.sleep(60)
        torch.distributed.barrier()
    if argv == ["busy"]:
        with stops_put_off():
            print("busy", flush=True)
            time.sleep(60)
    if argv == ["rank 1 is deaf"] and rank == 1:   # as one that waits in NCCL
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    if argv in (["sleep"], ["rank 1 is deaf"]):
        sys.stdout.write(f"pid {os.getpid()}\\n")  # in one piece
        time.sleep(60)
    names = ("WORLD_SIZE", "WSSS_DEVICE", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
    if rank == 0:
        print("argv", argv, *(os.environ[name] for name in names), os.getcwd(), sep="|")

if __name__ == "__main__":
    run_script(main)
"""


@pytest.fixture
def house(tmp_path):
    """A copy of the launchers with SCRIPT in place of the scripts and tools, and the environment to run it in."""
    root = tmp_path / "house"
    for folder in ("engine", "utils", "scripts", "tools"):
        (root / folder).mkdir(parents=True)
    utils = ("errors.py", "files.py", "offline.py", "processes.py", "python.sh")
    needed = [ROOT / "engine/launch.py", ROOT / "engine/nodes.py", *(ROOT / "utils" / name for name in utils)]
    for path in (*ROOT.glob("run_*.sh"), *needed):
        shutil.copy(path, root / path.relative_to(ROOT))
    for name in ("scripts/train_voc.py", "tools/infer_voc.py", "tools/infer_seg_coco.py"):
        (root / name).write_text(SCRIPT)
    return root


def _environment(house: Path, **changes: str) -> dict[str, str]:
    dropped = ("OMP_NUM_THREADS", "PYTHONPATH", "CUDA_VISIBLE_DEVICES")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    python = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    return {**kept, "PATH": python, "PYTHONPATH": str(house), **changes}


def run(root, launcher, *arguments, cwd=None, **environment):
    command = ["bash", str(root / launcher), *map(str, arguments)]
    given = {"cwd": cwd or root.parent, "env": _environment(root, **environment)}
    return subprocess.run(command, **given, capture_output=True, text=True, timeout=60)


def run_train(root, *arguments, devices="cpu", count=1, port="auto", **environment):
    return run(root, "run_train.sh", "scripts/train_voc.py", devices, count, port, *arguments, **environment)


@pytest.mark.parametrize("launcher", [
    "run_train.sh", "run_evaluate_voc.sh", "run_evaluate_seg_coco.sh", "run_pipeline.sh",
])
def test_too_few_arguments_print_the_usage(house, launcher):
    result = run(house, launcher, "cpu")
    assert result.returncode == 2 and result.stderr.startswith(f"usage: bash {launcher} ")


def test_training_gets_tag_and_overrides(house, tmp_path):
    other = tmp_path / "other folder"
    (other / "utils").mkdir(parents=True)  # a folder of the user that must not hide the project's
    (other / "utils" / "errors.py").write_text("raise SystemExit(9)")
    result = run_train(house, "my tag", "data.root=a b", cwd=other)
    threads = len(os.sched_getaffinity(0))
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"argv|['tag=my tag', 'data.root=a b']|1|cpu||{threads}|{other}\n"


def test_evaluation_gets_checkpoint_and_overrides(house):
    result = run(house, "run_evaluate_voc.sh", "cpu", 2, "a.pth", "evaluate.crf=true", OMP_NUM_THREADS="3")
    assert result.stdout == f"argv|['a.pth', 'evaluate.crf=true']|2|cpu||3|{house.parent}\n"
    result = run(house, "run_evaluate_voc.sh", "cpu", 1, "a.pth", "config=my config", "x=config=1")
    assert "['a.pth', '--config=my config', 'x=config=1']|1|cpu" in result.stdout
    assert "argv|['a.pth']|1|cpu" in run(house, "run_evaluate_voc.sh", "cpu", 1, "a.pth").stdout
    result = run(house, "run_evaluate_seg_coco.sh", "tools/infer_seg_coco.py", "cpu", 1, "val", "a.pth", "x=1")
    assert "['a.pth', 'data.val_split=val', 'x=1']|1|cpu" in result.stdout


@pytest.mark.parametrize(("what", "count"), [("mistake", 1), ("mistake", 2), ("mistake of rank 1", 2)])
def test_a_mistake_is_one_line(house, what, count):
    result = subprocess.run(
        [sys.executable, str(house / "engine/launch.py"), "scripts/train_voc.py", "cpu", str(count), "auto", what],
        cwd=house,
        env=_environment(house),
        capture_output=True,
        text=True,
        timeout=60,
    )
    line = (count > 1) * "\n" + "error: image x.jpg is missing\n"
    assert (result.returncode, result.stdout, result.stderr) == (2, "", line)


def launch_script(house, what, count=1, **environment):
    signal.signal(signal.SIGINT, signal.default_int_handler)   # also where the tests run in the background of a shell
    command = [sys.executable, str(house / "engine/launch.py"), "scripts/train_voc.py", "cpu", str(count), "auto", what]
    return subprocess.Popen(
        command, cwd=house, env=_environment(house, **environment), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )


def test_a_file_that_cannot_be_written_is_one_line(house):
    process = launch_script(house, "unwritable")
    assert process.communicate(timeout=60) == ("", "error: /proc/x: No such file or directory\n")
    assert process.returncode == 2


def test_a_crash_keeps_its_traceback(house):
    process = launch_script(house, "crash")
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "ZeroDivisionError: boom" in error and "torch/distributed" not in error


def test_a_killed_process_is_named(house):
    process = launch_script(house, "killed")
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (137, "process 0 was killed by SIGKILL\n")


@pytest.mark.parametrize("number, code, ignored", [
    (signal.SIGTERM, 143, True), (signal.SIGINT, 130, False), (signal.SIGHUP, 129, False), (signal.SIGUSR1, 138, False),
])
def test_a_signal_ends_the_processes(house, number, code, ignored):
    """ignored: whether a hang-up is, as nohup has it: then it stays so."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    process = launch_script(house, "sleep", count=2)
    signal.signal(signal.SIGHUP, before)
    children = [int(process.stdout.readline().split()[1]) for _ in range(2)]
    for one in (process.pid, *children):
        ignores = re.search(r"SigIgn:\s*(\w+)", Path(f"/proc/{one}/status").read_text())[1]
        assert int(ignores, 16) & 1 == ignored   # the lowest bit is of signal 1, SIGHUP
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (code, "\ninterrupted; resume=auto goes on from the last checkpoint\n")
    for child in children:
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)


def test_a_second_signal_kills_what_does_not_end(house):
    process = launch_script(house, "busy")
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    time.sleep(IMPATIENT + 0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 143 and "interrupted" in process.communicate()[1]


def test_a_process_that_heeds_no_signal_is_killed_when_the_others_have_left(house):
    nodes = house / "engine/nodes.py"
    nodes.write_text(re.sub("^GRACE = .*", "GRACE = 1", nodes.read_text(), flags=re.MULTILINE))
    process = launch_script(house, "rank 1 is deaf", count=2)
    for _ in range(2):
        process.stdout.readline()
    process.stderr.close()   # nor does it matter that nobody reads the launcher's word
    process.terminate()
    assert process.wait(timeout=20) == 143


def test_a_signal_while_the_processes_import(house):
    """They leave without a word as soon as they can."""
    process = launch_script(house, "sleep", IMPORTS="3")
    assert process.stdout.readline() == "imports\n"
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert error == "\ninterrupted; resume=auto goes on from the last checkpoint\n"


def test_the_processes_of_a_killed_launcher_end(house):
    process = launch_script(house, "sleep")
    process.stdout.readline()
    process.kill()
    assert process.communicate(timeout=20) == ("", "")   # nobody holds the pipes


def test_a_port_in_use(house):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        result = run_train(house, "tag", port=port)
    assert result.returncode == 2 and result.stderr == f"error: port {port} is in use: give another\n"
    assert launch.check_port(str(port)) == port


def test_an_unknown_script(house):
    result = run(house, "run_train.sh", "scripts/train_vco.py", "cpu", 1, "auto", "tag")
    assert result.returncode == 2 and result.stderr == "error: script scripts/train_vco.py does not exist\n"


def test_a_device_that_does_not_exist(house):
    result = run_train(house, "tag", devices="0,99", count=2, CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 2
    assert result.stderr == "error: DEVICES is '0,99': GPU 0, 99 does not exist, no GPU is visible: use cpu\n"


@pytest.mark.parametrize(
    ("devices", "count", "words"),
    [
        ("0,4", 2, "GPU 4 does not exist, visible are 0 to 3"),
        ("0,1", 3, "COUNT is 3 but DEVICES '0,1' names 2"),
        ("1,1", 2, "named twice"),
        ("gpu", 1, "expected cpu or GPU ids"),
        ("0,", 1, "expected cpu or GPU ids"),
        ("-1", 1, "expected cpu or GPU ids"),
    ],
)
def test_wrong_devices(monkeypatch, devices, count, words):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(UserError, match=words):
        launch.check_devices(devices, count)


def test_devices_count_from_those_visible(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert launch.check_devices("cpu", 5) is None
    assert launch.check_devices("2,0", 2) == [2, 0]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    assert launch.environment([2, 0], 2)["CUDA_VISIBLE_DEVICES"] == "6,4"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert launch.environment([2, 0], 2)["CUDA_VISIBLE_DEVICES"] == "2,0"


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "two", ""])
def test_wrong_counts(text):
    with pytest.raises(UserError, match="COUNT"):
        launch.check_count(text)


@pytest.mark.parametrize("text", ["0", "65536", "x", "-5"])
def test_wrong_ports(text):
    with pytest.raises(UserError, match="PORT"):
        launch.check_port(text)


def test_a_mistake_met_by_a_worker_keeps_its_line():
    try:
        raise UserError("image x.jpg is truncated")
    except UserError:
        passed_on = ExceptionWrapper(where="in DataLoader worker process 0")
    with pytest.raises(UserError) as caught:
        passed_on.reraise()
    assert "Traceback" in str(caught.value)
    assert launch.error_line(caught.value) == "image x.jpg is truncated"
    assert launch.error_line(UserError("two\n  lines")) == "two lines"


def _raise(error):
    def main(argv):
        raise error

    return main


def test_a_script_without_the_launcher_prints_its_mistake(monkeypatch, capsys):
    monkeypatch.delenv(launch.ERROR_FILE, raising=False)
    with pytest.raises(SystemExit) as caught:
        launch.run_script(_raise(UserError("no such file")))
    assert caught.value.code == 2 and capsys.readouterr().err == "error: no such file\n"
    with pytest.raises(SystemExit) as caught:
        launch.run_script(_raise(KeyboardInterrupt()))
    assert caught.value.code == 130


def test_a_mistake_that_cannot_be_passed_on_is_said(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv(launch.ERROR_FILE, str(tmp_path / "gone" / "error"))
    with pytest.raises(SystemExit):
        launch.run_script(_raise(UserError("bad file")))
    assert capsys.readouterr().err == "error: bad file\n"


def test_the_first_mistake_wins(monkeypatch, tmp_path):
    monkeypatch.setenv(launch.ERROR_FILE, str(tmp_path / "error"))
    with pytest.raises(ZeroDivisionError):
        launch.run_script(_raise(ZeroDivisionError()))
    for error in (UserError("first"), UserError("second"), RuntimeError("connection closed")):
        with pytest.raises(SystemExit) as caught:
            launch.run_script(_raise(error))
        assert caught.value.code == 2
    assert (tmp_path / "error").read_text() == "first"

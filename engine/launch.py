"""Starts a script on several processes, and turns a user's mistake into one line.

As a program (the run_*.sh launchers call it):
    python engine/launch.py SCRIPT DEVICES COUNT PORT [key=value ...]
    SCRIPT   the Python file torchrun starts on every process; it gets the key=value arguments
    DEVICES  cpu, or the GPU ids as in 0,1
    COUNT    number of processes; with GPUs the number of ids
    PORT     a free port on this machine, or auto

As a module: scripts end with `if __name__ == "__main__": run_script(main)`.

Exit code: 2 for a user's mistake; 130, 143, 138 or 129 after Ctrl-C, SIGTERM, SIGUSR1 or a hang-up; otherwise that of
the first process that failed. Such a signal is passed on: a training finishes its step and writes a state, other work
ends at once. A second one, two seconds later or more, kills the processes. Under nohup a hang-up changes nothing.
"""

import contextlib
import importlib.util
import logging
import multiprocessing
import os
import re
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from utils.errors import UserError
from utils.files import ROOT
from utils.offline import is_offline
from utils.processes import IMPATIENT, STOPS, Stopped, end_with, stops_heeded

ERROR_FILE = "WSSS_ERROR_FILE"  # names the file that takes the first mistake of all processes
DEVICE = "WSSS_DEVICE"  # cpu or cuda
LAUNCHER = "WSSS_LAUNCHER"  # its process id, for the processes it starts
USER_ERROR_CODE = 2
# beside the ERROR_FILE: of a launcher that was asked to end, of its processes that did; each holds the signal's number
ASKED, ENDED = "asked", "ended"


def run_script(main: Callable[[list[str]], None]) -> None:
    """Calls main(sys.argv[1:]) as the body of a script.

    A UserError, also one that a DataLoader worker passed on, ends the process with code 2 and no traceback: its line
    goes to the launcher, or to stderr where there is none. So does an OSError about a file. Every other exception stays
    as it is, unless another process has made a mistake already: then this one fell over its absence, and says nothing.
    The process ends with its launcher, even with a killed one, and where a signal asks it to, with 128 + its number.
    """
    launched = LAUNCHER in os.environ
    if launched:
        end_with(int(os.environ.pop(LAUNCHER)))   # not for what this process starts
    try:
        with stops_heeded():
            if launched:
                _sign_on()
            check_checkout(Path(sys.argv[0]))
            main(sys.argv[1:])
    except UserError as error:
        _report(error_line(error))
        _leave(USER_ERROR_CODE)
    except Stopped as stopped:
        if launched:   # no failure, which a restart would mend: the launcher gives the exit code
            _beside_errors(ENDED).write_text(str(stopped.number), encoding="utf-8")
        _leave(0 if launched else 128 + stopped.number)
    except KeyboardInterrupt:
        _leave(128 + signal.SIGINT)
    except OSError as error:
        if error.filename is None or not error.strerror:
            raise
        _report(f"{error.filename}: {error.strerror}")
        _leave(USER_ERROR_CODE)
    except Exception:
        path = os.environ.get(ERROR_FILE)
        if path is None or not os.path.exists(path):
            raise
        _leave(USER_ERROR_CODE)


def _beside_errors(name: str) -> Path:
    return Path(os.environ[ERROR_FILE]).with_name(name)


def _sign_on() -> None:
    """From here on the launcher passes signals on to this process. Raises Stopped where one came before."""
    _beside_errors(str(os.getpid())).touch()
    if (asked := _beside_errors(ASKED)).is_file():
        raise Stopped(int(asked.read_text(encoding="utf-8")))


def check_checkout(file: Path) -> None:
    """Raises UserError where `file` is of another copy of this project than the packages that Python imports."""
    folder = file.resolve().parent.parent
    if folder != ROOT and (folder / "engine" / "launch.py").is_file():
        raise UserError(
            f"{file} is started, but the packages of {ROOT} are imported: run '{sys.executable} -m pip install "
            f"--no-deps -e {folder}' to use those beside it"
        )


def error_line(error: UserError) -> str:
    """The line of a UserError; a DataLoader worker's comes wrapped into a traceback and is taken out of it."""
    text = str(error)
    wrapped = re.findall(r"^(?:\w+\.)*UserError: (.*)$", text, flags=re.MULTILINE)
    return wrapped[-1] if wrapped else " ".join(text.split())


def _report(line: str) -> None:
    path = os.environ.get(ERROR_FILE)
    if path is not None:
        with contextlib.suppress(OSError):   # its disk may be full, too
            with contextlib.suppress(FileExistsError), open(path, "x", encoding="utf-8") as file:
                file.write(line)
            return
    print(f"error: {line}", file=sys.stderr, flush=True)


def _leave(code: int) -> None:
    """Ends this process. A process group of torch would complain at exit or wait for the others, so it is skipped."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        sys.exit(code)
    for child in multiprocessing.active_children():
        child.terminate()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def find_script(text: str) -> Path:
    """The script as given, from this folder or else from the folder of the project."""
    for path in (Path(text), ROOT / text):
        if path.is_file():
            return path.resolve()
    raise UserError(f"script {text} does not exist")


def check_count(text: str) -> int:
    """COUNT as a positive integer."""
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"COUNT is '{text}': expected the number of processes, 1 or more")
    return int(text)


def check_devices(text: str, count: int) -> list[int] | None:
    """GPU ids of DEVICES, or None for 'cpu'. Raises UserError naming the ids that do not exist."""
    if text == "cpu":
        return None
    parts = text.split(",")
    if not all(part.isdecimal() for part in parts):
        raise UserError(f"DEVICES is '{text}': expected cpu or GPU ids such as 0,1")
    ids = [int(part) for part in parts]
    if len(set(ids)) != len(ids):
        raise UserError(f"DEVICES is '{text}': a GPU is named twice")
    available = _gpu_count()
    missing = [str(i) for i in ids if i >= available]
    if missing:
        have = "no GPU is visible: use cpu" if available == 0 else f"visible are 0 to {available - 1}"
        raise UserError(f"DEVICES is '{text}': GPU {', '.join(missing)} does not exist, {have}")
    if len(ids) != count:
        raise UserError(f"COUNT is {count} but DEVICES '{text}' names {len(ids)}: one process runs on one GPU")
    return ids


def _gpu_count() -> int:
    import torch

    return torch.cuda.device_count()


def check_port(text: str) -> int:
    """PORT as a number, free on this machine; 'auto' picks one."""
    if text == "auto":
        with socket.socket() as probe:
            probe.bind(("", 0))
            return probe.getsockname()[1]
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise UserError(f"PORT is '{text}': expected 1 to 65535, or auto")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one just left by a former run is free
        try:
            probe.bind(("", int(text)))
        except PermissionError as error:
            raise UserError(f"port {text} needs the rights of root: give one above 1023") from error
        except OSError as error:
            raise UserError(f"port {text} is in use: give another") from error
    return int(text)


def environment(ids: list[int] | None, count: int) -> dict[str, str]:
    """Variables for the processes: the device, the visible GPUs, threads shared out among the processes."""
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    threads = max(1, len(os.sched_getaffinity(0)) // count)
    return {
        DEVICE: "cpu" if ids is None else "cuda",
        LAUNCHER: str(os.getpid()),
        "CUDA_VISIBLE_DEVICES": ",".join(visible[i] if visible else str(i) for i in ids or ()),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(threads),
        **({"HF_HUB_OFFLINE": "1"} if is_offline() else {}),   # for timm's weights
    }


def launch(script: Path, count: int, port: int, arguments: Sequence[str]) -> int:
    """Runs the script on `count` processes and waits; the exit code. Signals that ask to end are passed on to them."""
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    options = ["--nnodes", "1", "--nproc-per-node", str(count), "--master-addr", "127.0.0.1"]
    options += ["--signals-to-handle", "SIGQUIT"]   # of others it would kill the processes, and end
    options += ["--master-port", str(port), str(script), *arguments]
    logging.disable(logging.CRITICAL)  # of the launcher alone: the processes say themselves what is wrong
    with tempfile.TemporaryDirectory(prefix="wsss-") as name, signals_passed_on(Path(name)):
        folder, failure = Path(name), None
        mistake = folder / "error"
        os.environ[ERROR_FILE] = str(mistake)
        try:
            torchrun.run(torchrun.parse_args(options))
        except ChildFailedError as error:
            _, failure = error.get_first_failure()
        if failure and mistake.exists() and mistake.stat().st_size:
            if count > 1:  # the process with the progress bar was stopped, perhaps in the middle of its line
                print(file=sys.stderr)
            raise UserError(mistake.read_text(encoding="utf-8"))
        for said in (folder / ENDED, *([folder / ASKED] if failure else [])):
            if said.is_file():
                go_on = "; resume=auto goes on from the last checkpoint" if script.stem.startswith("train") else ""
                print(f"\ninterrupted{go_on}", file=sys.stderr)
                return 128 + int(said.read_text(encoding="utf-8"))
        return _exit_code(failure.exitcode, failure.local_rank) if failure else 0


@contextlib.contextmanager
def signals_passed_on(folder: Path) -> Iterator[None]:
    """Signals that ask to end go to the processes that have signed on in `folder`; those to come find them noted there.

    A second one, IMPATIENT seconds after the first or later, kills all.
    """
    asked, since = folder / ASKED, []

    def pass_on(number: int, _frame: object) -> None:
        since.append(time.monotonic())
        kill = since[-1] - since[0] > IMPATIENT
        if len(since) == 1:
            with open(asked.with_suffix(".part"), "w", encoding="utf-8") as file:
                file.write(str(number))
            os.replace(file.name, asked)
        for pid in _children():
            if kill or (folder / str(pid)).exists():
                with contextlib.suppress(ProcessLookupError):   # it ended just now
                    os.kill(pid, signal.SIGKILL if kill else number)

    heeded = [number for number in STOPS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, pass_on) for number in heeded}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _children() -> list[int]:
    """The processes that this one started and that have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[:2]
            found += [int(path.parent.name)] if int(parent) == os.getpid() and state != "Z" else []
    return found


def _exit_code(code: int, rank: int) -> int:
    """The exit code for the shell; a signal leaves no traceback, so it is named."""
    if code >= 0:
        return code
    print(f"process {rank} was killed by {signal.Signals(-code).name}", file=sys.stderr)
    return 128 - code


def main(argv: Sequence[str]) -> int:
    """Checks the arguments and launches; the exit code."""
    if len(argv) < 4:
        print(__doc__, file=sys.stderr)
        return USER_ERROR_CODE
    try:
        check_checkout(Path(__file__))
        script, count = find_script(argv[0]), check_count(argv[2])
        if importlib.util.find_spec("torch") is None:
            raise UserError(f"{sys.executable} has no torch: run pip install -r requirements.txt, or run_tests.sh")
        ids, port = check_devices(argv[1], count), check_port(argv[3])
        os.environ.update(environment(ids, count))
        return launch(script, count, port, argv[4:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR_CODE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Starts a script on several processes, and turns a user's mistake into one line.

As a program (the run_*.sh launchers call it):
    python engine/launch.py SCRIPT DEVICES COUNT PORT [key=value ...]
    SCRIPT   the Python file torchrun starts on every process; it gets the key=value arguments
    DEVICES  cpu, or the GPU ids as in 0,1
    COUNT    number of processes; with GPUs the number of ids
    PORT     a free port on this machine, or auto
Several machines: the same command on each, with the variables of engine/nodes.py.

As a module: scripts end with `if __name__ == "__main__": run_script(main)`.

Exit code: 2 for a user's mistake; 3 where another process was lost, and its own node says why; 4 where the run hung;
130, 143, 138 or 129 after Ctrl-C, SIGTERM, SIGUSR1 or a hang-up; otherwise that of the first process that failed.
Such a signal is passed on: a training finishes its step and writes a state, other work ends at once. A second one, two
seconds later or more, kills the processes. Under nohup a hang-up changes nothing.
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

from engine.nodes import GRACE, ONE, Company, Nodes, nodes_from_environment
from utils.errors import UserError, one_line
from utils.files import ROOT
from utils.offline import is_offline
from utils.processes import (
    IMPATIENT,
    Stopped,
    children,
    end_with,
    ignore_stops,
    perhaps_unread,
    stops_given_to,
    stops_heeded,
)

ERROR_FILE = "WSSS_ERROR_FILE"  # names the file that takes the first mistake of all processes
DEVICE = "WSSS_DEVICE"  # cpu or cuda
LOST = "lost"  # beside it, what a process says that lost another one
LAUNCHER = "WSSS_LAUNCHER"  # its process id, for the processes it starts
USER_ERROR_CODE, LOST_CODE, HUNG_CODE = 2, 3, 4
HUNG_MARK = "(train.timeout)"  # in the line of a run that hangs
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
    path = os.environ.get(ERROR_FILE)
    if path is not None and os.path.exists(path):   # torchrun starts again what a mistake ended
        leave(USER_ERROR_CODE)
    try:
        with stops_heeded():
            if launched:
                _sign_on()
            check_checkout(Path(sys.argv[0]))
            main(sys.argv[1:])
    except UserError as error:
        report(error_line(error))
        leave(USER_ERROR_CODE)
    except Stopped as stopped:
        if launched:   # no failure, which a restart would mend: the launcher gives the exit code
            _beside_errors(ENDED).write_text(str(stopped.number), encoding="utf-8")
            _sign_off()
        leave(0 if launched else 128 + stopped.number)
    except KeyboardInterrupt:
        leave(128 + signal.SIGINT)
    except OSError as error:
        if error.filename is None or not error.strerror:
            raise
        report(f"{error.filename}: {error.strerror}")
        leave(USER_ERROR_CODE)
    except Exception as error:
        text = " ".join(str(error).split())
        if killed := re.search(r"DataLoader worker .*(?:killed|exited)[^.]*", text):
            report(f"{killed[0]}; was memory short? give fewer data.workers{_go_on(Path(sys.argv[0]))}")
            leave(USER_ERROR_CODE)
        if path is not None and os.path.exists(path):
            leave(USER_ERROR_CODE)
        if path is None or not _is_loss(error):
            raise
        with contextlib.suppress(OSError):
            Path(path).with_name(LOST).write_text(text[:200], encoding="utf-8")
        leave(LOST_CODE)


def _is_loss(error: Exception) -> bool:
    """Whether a process ends because another one has gone."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return False
    return isinstance(error, distributed.DistError) or re.search("gloo|nccl", str(error), re.IGNORECASE) is not None


def _beside_errors(name: str) -> Path:
    return Path(os.environ[ERROR_FILE]).with_name(name)


def _sign_on() -> None:
    """From here on the launcher passes signals on to this process. Raises Stopped where one came before."""
    _beside_errors(str(os.getpid())).touch()
    if (asked := _beside_errors(ASKED)).is_file():
        raise Stopped(int(asked.read_text(encoding="utf-8")))
    _beside_errors(ENDED).unlink(missing_ok=True)   # of a process that torchrun ended, to start it again


def _sign_off() -> None:
    """Waits for the launcher's other processes, as they got the signal too, and after GRACE seconds kills them: one
    that waits in a GPU's library for a process that has left heeds no signal."""
    ignore_stops()   # the launcher kills, where it gets a second one
    _beside_errors(str(os.getpid())).unlink(missing_ok=True)
    until = time.monotonic() + GRACE
    while others := [pid for pid in children(os.getppid()) if _beside_errors(str(pid)).exists()]:
        for pid in others if time.monotonic() > until else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


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
    return one_line(wrapped[-1] if wrapped else text)


def report(line: str) -> None:
    """Leaves the line that the launcher ends with; the first one counts. Without a launcher it is printed."""
    path = os.environ.get(ERROR_FILE)
    if path is not None:
        with contextlib.suppress(OSError):   # its disk may be full, too
            with contextlib.suppress(FileExistsError), open(path, "x", encoding="utf-8") as file:
                file.write(line)
            return
    _say(f"error: {line}")


def _say(line: str) -> None:
    with perhaps_unread(sys.stderr):
        print(line, file=sys.stderr, flush=True)


def leave(code: int) -> None:
    """Ends this process. A process group of torch would complain at exit or wait for the others, so it is skipped."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        sys.exit(code)
    for child in multiprocessing.active_children():
        child.terminate()
    for stream in (sys.stdout, sys.stderr):
        with perhaps_unread(stream):
            stream.flush()
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


def check_port(text: str, nodes: Nodes = ONE) -> int:
    """PORT as a number, free on this machine where it is node 0; 'auto' picks one, over several nodes MASTER_PORT."""
    if text == "auto" and nodes.count > 1:
        text = os.environ.get("MASTER_PORT", text)
        if text == "auto":
            raise UserError(f"PORT is auto, but NNODES is {nodes.count}: give a number, or MASTER_PORT, alike on all")
    if text == "auto":
        with socket.socket() as probe:
            probe.bind(("", 0))
            return probe.getsockname()[1]
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise UserError(f"PORT is '{text}': expected 1 to 65535, or auto")
    if nodes.rank > 0:
        return int(text)
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


def launch(script: Path, count: int, port: int, arguments: Sequence[str], nodes: Nodes = ONE) -> int:
    """Runs the script on `count` processes and waits; the exit code. Signals that ask to end are passed on to them."""
    from torch.distributed import DistError
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    options, go_on = [*nodes.options(port), "--nproc-per-node", str(count)], _go_on(script)
    options += ["--signals-to-handle", "SIGQUIT"]   # of others it would kill the processes, and end
    options += [str(script), *arguments]
    logging.disable(logging.CRITICAL)  # of the launcher alone: the processes say themselves what is wrong
    with tempfile.TemporaryDirectory(prefix="wsss-") as name, signals_passed_on(Path(name)):
        folder, failure = Path(name), None
        mistake = folder / "error"
        os.environ[ERROR_FILE] = str(mistake)
        with Company(nodes, port, report) as company:
            try:
                torchrun.run(torchrun.parse_args(options))
            except ChildFailedError as error:
                failure = _first(error)
                company.tell(_said(mistake))   # while the store is held by the error
            except (RendezvousError, DistError) as error:
                where = f"{nodes.count} nodes did not meet at {nodes.address}:{port} in {nodes.timeout} s"
                raise UserError(f"the {where} (NODES_TIMEOUT), or lost each other{go_on}") from error
        if failure and (line := _said(mistake)):
            if count > 1:  # the process with the progress bar was stopped, perhaps in the middle of its line
                _say("")
            _say(f"error: {line}")
            return HUNG_CODE if HUNG_MARK in line else USER_ERROR_CODE
        for said in (folder / ENDED, *([folder / ASKED] if failure else [])):
            if said.is_file():
                _say(f"\ninterrupted{go_on}")
                return 128 + int(said.read_text(encoding="utf-8"))
        if failure and failure.exitcode == LOST_CODE:
            said = _said(folder / LOST)
            _say(f"error: another process has gone, its node says why{go_on} ({said})")
        return _exit_code(failure.exitcode, failure.local_rank) if failure else 0


def _go_on(script: Path) -> str:
    return "; resume=auto goes on from the last checkpoint" if script.stem.startswith("train") else ""


def _said(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def _first(error: Exception) -> object:
    """The first failure, if need be of a process that lost another one."""
    return min(error.failures.values(), key=lambda one: (one.exitcode == LOST_CODE, one.timestamp))


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
        for pid in children(os.getpid()):
            if kill or (folder / str(pid)).exists():
                with contextlib.suppress(ProcessLookupError):   # it ended just now
                    os.kill(pid, signal.SIGKILL if kill else number)

    with stops_given_to(pass_on):
        yield


def _exit_code(code: int, rank: int) -> int:
    """The exit code for the shell; a signal leaves no traceback, so it is named."""
    if code >= 0:
        return code
    _say(f"process {rank} was killed by {signal.Signals(-code).name}")
    return 128 - code


def _import_torch() -> None:
    """What torch's C++ says of lost connections is not for the user, where the launcher has a line for it."""
    given = os.environ.get("TORCH_CPP_LOG_LEVEL")
    os.environ["TORCH_CPP_LOG_LEVEL"] = given or "FATAL"
    importlib.import_module("torch")
    os.environ["TORCH_CPP_LOG_LEVEL"] = given or "ERROR"   # for the processes


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
        nodes = nodes_from_environment()
        _import_torch()
        ids, port = check_devices(argv[1], count), check_port(argv[3], nodes)
        os.environ.update(environment(ids, count))
        return launch(script, count, port, argv[4:], nodes)
    except UserError as error:
        _say(f"error: {error}")
        return USER_ERROR_CODE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""What disks, clocks and restarts do to a run: nothing is lost, and nothing is wrong without a word."""

import itertools
import os
import random
import shutil
import subprocess
import sys
import time
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from engine.checkpoints import files
from engine.checkpoints.files import read_meta, read_tensors
from engine.distributed import Ranks
from engine.training.stop import Stop
from tests import tiny
from tests.toy import method
from utils import files as utils_files
from utils import processes
from utils.errors import UserError
from utils.log import read_metrics

WEIGHTS = "iter_{:06d}.weights.safetensors"


@pytest.fixture(scope="module")
def finished(voc_root, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs")
    tiny.train_toy(voc_root, output)
    return output / "toy"


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run."""
    return shutil.copytree(finished, tmp_path / "toy")


def terms(run):
    lines = [line for line in read_metrics(run / "metrics.jsonl") if "train/total" in line]
    return [{name: line[name] for name in ("iteration", "train/image", "train/total")} for line in lines]


def flipped(path, draw):
    """One bit of a file is another."""
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def test_the_newest_two_checkpoints_and_the_best_are_kept(finished, voc_root, tmp_path):
    names = sorted(path.name for path in (finished / "checkpoints").iterdir())
    pairs = [f"iter_00000{i}.{what}" for i in (4, 6) for what in ("state.pt", "weights.safetensors")]
    assert names == ["best.weights.safetensors", *pairs]
    tiny.train_toy(voc_root, tmp_path, "train.keep_checkpoints=null", "data.val_split=null")
    assert len(list((tmp_path / "toy" / "checkpoints").iterdir())) == 6


@pytest.mark.parametrize("seed", range(12))
def test_a_flipped_bit_is_noticed(voc_root, finished, run, seed):
    """Of a state or of its weights: the run goes on from the pair before, to the same end."""
    draw, folder = random.Random(seed), run / "checkpoints"
    damaged = folder / (WEIGHTS if seed % 2 else files.STATE).format(6)
    before = files.newest_state(folder)["optimizer"]["state"], load_file(folder / WEIGHTS.format(6))
    flipped(damaged, draw)
    state = files.newest_state(folder)
    if state["iteration"] == 6:   # a bit that says nothing, such as a date within the archive
        found = state["optimizer"]["state"], load_file(folder / WEIGHTS.format(6))
        torch.testing.assert_close(found, before, rtol=0, atol=0)
        return
    assert state["iteration"] == 4
    if seed < 2:
        tiny.train_toy(voc_root, run.parent, "resume=auto")
        assert f"{damaged.name}: " in (run / "train.log").read_text()
        tiny.assert_same_weights(folder / WEIGHTS.format(6), finished / "checkpoints" / WEIGHTS.format(6))


def test_damaged_weights_are_not_evaluated(finished, tmp_path):
    """Every byte but those of the lengths is under a checksum, of the header or of the tensors."""
    whole, path, found = finished / "checkpoints" / WEIGHTS.format(6), tmp_path / "x.safetensors", 0
    shutil.copy(whole, path)
    meta, tensors = read_meta(path), read_tensors(path)
    for seed in range(150):
        shutil.copy(whole, path)
        flipped(path, random.Random(seed))
        try:
            assert read_meta(path) == meta
            torch.testing.assert_close(read_tensors(path), tensors, rtol=0, atol=0)
        except UserError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
            found += 1
    assert found > 140
    shutil.copy(whole, path)
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match="x.safetensors: a safetensors file that is cut short or damaged"):
        read_tensors(path)


@pytest.fixture(params=["small tmpfs", "largest file"])
def small_disk(request, tmp_path):
    """(folder, makes it large): a disk that one checkpoint fits on, or two."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if request.param == "largest file":
        yield folder, None
        return
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160k", "none", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    yield folder, lambda: subprocess.run(["mount", "-o", "remount,size=64m", folder], check=True)
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk(voc_root, tmp_path, finished, small_disk, monkeypatch):
    """The run ends with one line after some tries, and goes on when there is room, to the same end."""
    monkeypatch.setattr(utils_files, "AGAIN", (0, 0))
    folder, enlarge = small_disk
    wide = ["model.width=48"]   # of checkpoints larger than what else is written
    tiny.train_toy(voc_root, tmp_path / "whole", *wide)
    if enlarge:
        with pytest.raises(UserError, match="No space left on device"):
            tiny.train_toy(voc_root, folder, *wide)
        enlarge()
    else:
        save = files.save_state

        def full(*arguments):
            with tiny.full_disk(2000):
                save(*arguments)

        monkeypatch.setattr(files, "save_state", lambda *a: (full if a[1] == 6 else save)(*a))
        with pytest.raises(UserError, match="File too large"):
            tiny.train_toy(voc_root, folder, *wide)
        assert files.newest_state(folder / "toy" / "checkpoints")["iteration"] == 4
        assert (folder / "toy" / "train.log").read_text().count("; tried again in 0 s") == 2
        monkeypatch.setattr(files, "save_state", save)
    assert not list((folder / "toy" / "checkpoints").glob(".*.part"))
    tiny.train_toy(voc_root, folder, *wide, "resume=auto")
    tiny.assert_same_weights(tiny.last_weights(folder / "toy"), tiny.last_weights(tmp_path / "whole" / "toy"))
    assert terms(folder / "toy") == terms(tmp_path / "whole" / "toy")


@pytest.mark.parametrize("at", ["the start", "a resume"])
def test_a_folder_that_cannot_be_written(voc_root, finished, tmp_path, at):
    """One line, no traceback; what is there stays."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if at == "a resume":
        shutil.copytree(finished, folder / "run")
    if subprocess.run(["mount", "--bind", "-o", "ro", folder, folder], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        given = [*tiny.SETTINGS, f"data.root={voc_root}", f"output={folder}", "tag=run", "resume=auto"]
        process = tiny.start_alone(given, tmp_path / "log")
        process.join(60)
    finally:
        subprocess.run(["umount", "-l", folder], check=True)
    said = (tmp_path / "log").read_text()
    assert process.exitcode == 2 and said.startswith(f"error: {folder}/run") and "Read-only file system" in said
    assert said.count("\n") == 1 and (at == "the start" or len(list((folder / "run/checkpoints").iterdir())) == 5)


def test_a_write_that_fails_once_is_tried_again(voc_root, tmp_path, monkeypatch):
    save, fails = files.save_state, iter([True, False, True])

    def flaky(*arguments):
        if next(fails, False):
            raise UserError("x.state.pt: Stale file handle")
        save(*arguments)

    monkeypatch.setattr(files, "save_state", flaky)
    monkeypatch.setattr(utils_files, "AGAIN", (0, 0))
    tiny.train_toy(voc_root, tmp_path)
    assert (tmp_path / "toy" / "train.log").read_text().count("Stale file handle; tried again in 0 s") == 2
    assert files.newest_state(tmp_path / "toy" / "checkpoints")["iteration"] == 6


def test_a_clock_that_jumps_back(voc_root, finished, tmp_path, monkeypatch):
    """A day each time it is asked, in both parts of a run."""
    now, days = time.time(), itertools.count()
    with tiny.interrupted(method.Toy, 5), monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: now - 86400 * next(days))
        tiny.train_toy(voc_root, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: now - 86400 * next(days))
        tiny.train_toy(voc_root, tmp_path, "resume=auto")
    assert next(days) > 10
    tiny.assert_same_weights(tiny.last_weights(tmp_path / "toy"), tiny.last_weights(finished))
    assert terms(tmp_path / "toy") == terms(finished)
    best = (read_meta(run / "checkpoints" / files.BEST) for run in (tmp_path / "toy", finished))
    assert len({str((one["iteration"], one["val"])) for one in best}) == 1


def test_whoever_read_the_output_may_go(voc_root, finished, tmp_path, monkeypatch):
    """As a terminal that is closed does, and `tee` at Ctrl-C: the run does not fall over it before it has stopped."""
    reads, writes = os.pipe()
    os.close(reads)
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, open(writes, "w", closefd=False, buffering=1))  # noqa: SIM115
    tiny.train_toy(voc_root, tmp_path)
    sys.stdout.flush()   # as at the end of a process
    tiny.assert_same_weights(tiny.last_weights(tmp_path / "toy"), tiny.last_weights(finished))


@pytest.mark.parametrize("late", [False, True])
def test_a_stop_is_agreed_on_where_the_rest_is(tmp_path, monkeypatch, late):
    """With no group of its own, whose time or network would be another; of GPUs one step later, to wait for none."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **how: empty(*a, **how))
    monkeypatch.setattr(torch.cuda, "Event", lambda: Mock(spec=["record", "synchronize"]))
    monkeypatch.setattr(dist, "new_group", None)
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        stop, said = Stop(Ranks(0, 2, torch.device("cpu"))), []
        stop.late = late
        for number in (0, 15, 15):
            monkeypatch.setattr(processes._Asked, "number", number)
            said.append(stop.asked())
        assert said == ([0, 0, 15] if late else [0, 15, 15])
    finally:
        dist.destroy_process_group()


def test_a_log_line_spans_a_restart(voc_root, tmp_path):
    """Its means are of all its iterations, those before the stop too."""
    settings = ["train.log_every=6", "train.checkpoint_every=1", "data.val_split=null"]
    tiny.train_toy(voc_root, tmp_path / "whole", *settings)
    with tiny.interrupted(method.Toy, 4):
        tiny.train_toy(voc_root, tmp_path, *settings)
    tiny.train_toy(voc_root, tmp_path, *settings, "resume=auto")
    assert terms(tmp_path / "toy") == terms(tmp_path / "whole" / "toy") and len(terms(tmp_path / "toy")) == 1


def test_another_number_of_processes_is_said(voc_root, tmp_path):
    """The sums of two processes become those of one, whose means are over one."""
    settings = ["train.log_every=6", "train.checkpoint_every=4", "data.val_split=null"]
    with tiny.interrupted(method.Toy, 4):
        tiny.train_toy(voc_root, tmp_path, *settings)
    path = tmp_path / "toy" / "checkpoints" / files.STATE.format(4)
    state = torch.load(path)
    (sums,) = state["rest"]["sums"]
    state["rest"]["sums"] = [{name: 3 * value for name, value in sums.items()}, sums]
    torch.save(state, path)
    tiny.train_toy(voc_root, tmp_path, *settings, "resume=auto")
    log = (tmp_path / "toy" / "train.log").read_text()
    words = "1 process(es) in place of 2: the same batches, but sums differ by rounding, and dropout draws otherwise"
    assert words in log
    tiny.train_toy(voc_root, tmp_path / "whole", *settings)
    ((ours,), (whole,)) = terms(tmp_path / "toy"), terms(tmp_path / "whole" / "toy")
    expected = whole["train/image"] + sums["image"] / 6   # 3 and 1 times these in place of them: twice in the mean
    assert ours["train/image"] == pytest.approx(expected, rel=1e-5)

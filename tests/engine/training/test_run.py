"""A run that was stopped goes on from something whole and as what it was, or says in one line why not."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from engine.checkpoints.files import read_meta
from engine.config import load_config
from engine.distributed import Ranks
from engine.training import train
from engine.training.run import Run
from engine.training.step import Trainer
from model import METHODS
from model.batch_norm import FrozenBatchNorm, SyncBatchNorm
from tests import tiny
from tests.toy import method
from utils.config import read_yaml
from utils.errors import UserError
from utils.log import read_metrics

STATE, WEIGHTS, BEST = "iter_000006.state.pt", "iter_000006.weights.safetensors", "best.weights.safetensors"
HOLD = "import sys, pathlib, utils.processes as p; f = p.lock(pathlib.Path(sys.argv[1])); print(flush=True); input()"


@pytest.fixture(scope="module")
def finished(voc_root, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs")
    tiny.train_toy(voc_root, output, "train.keep_checkpoints=1")
    return output / "toy"


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run."""
    return shutil.copytree(finished, tmp_path / "toy")


def other_shape(folder):
    state = torch.load(folder / STATE)
    state["optimizer"]["state"][0]["momentum_buffer"] = torch.zeros(2, 2)
    torch.save(state, folder / STATE)


@pytest.mark.parametrize("fault, words", [
    (lambda folder: (folder / STATE).write_bytes((folder / STATE).read_bytes()[:300]), f"{STATE}: not a readable"),
    (lambda folder: (folder / STATE).write_bytes(b""), f"{STATE}: not a readable state .File is not.* another tag"),
    (lambda folder: (folder / STATE).rename(folder / "iter_000007.state.pt"), "iter_000007.weights.*: no such"),
    (other_shape, f"{STATE} is of another network"),
    (lambda folder: (folder / WEIGHTS).unlink(), f"{WEIGHTS}: no such checkpoint: .* another tag"),
    (lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:300]), f"{WEIGHTS}: .* cut short"),
    (lambda folder: save_file(load_file(folder / WEIGHTS), folder / WEIGHTS), f"{WEIGHTS}: not what the run"),
    (lambda folder: (folder / STATE).unlink(), "holds weights, but no state"),
    (lambda folder: [path.unlink() for path in folder.glob("iter_*")], "holds weights, but no state"),
    (lambda folder: shutil.copy(folder / WEIGHTS, folder / BEST), f"{BEST}: holds no validation score of 'regions'"),
])
def test_what_is_not_whole_is_named_and_left_alone(voc_root, run, fault, words):
    fault(run / "checkpoints")
    before = {path: path.read_bytes() for path in run.rglob("[!.]*.[!l]*") if path.is_file()}   # not the log
    with pytest.raises(UserError, match=words):
        tiny.train_toy(voc_root, run.parent, "resume=auto")
    with pytest.raises(UserError, match="holds a run already"):
        tiny.train_toy(voc_root, run.parent)
    assert all(path.read_bytes() == content for path, content in before.items())


@pytest.mark.parametrize("override, words", [
    ("train.batch_size=8", "train.batch_size = 8, was 4"),
    ("seed=1", "seed = 1, was 0"),
    ("data.crop_size=64", "data.crop_size = 64, was 32"),
    ("data.train_split=val", "data.train_split = val, was train_aug; 4 training images of another list, were 8"),
    ("train.iterations=7", "train.iterations = 7, was null; train.epochs = null, was 3"),
    ("train.lr=1", "train.lr = 1.0, was 0.05"),
])
def test_another_run_is_refused(voc_root, run, override, words):
    with pytest.raises(UserError, match=words):
        tiny.train_toy(voc_root, run.parent, "resume=auto", override)
    assert read_yaml(run / "config.yaml")["train"]["batch_size"] == "4"


def test_an_earlier_pair_is_taken_and_changes_are_said(voc_root, run):
    weights = run / "checkpoints" / WEIGHTS
    meta = read_meta(weights)
    del meta["settings"]["model"]["normalize"]   # as version 0.2 wrote it
    save_file(load_file(weights), weights, {"meta": json.dumps(meta)})
    state = torch.load(run / "checkpoints" / STATE)
    del state["weights"]   # the same
    torch.save(state, run / "checkpoints" / STATE)
    for name in (STATE, WEIGHTS):   # a copy is the state of another iteration
        shutil.copy(run / "checkpoints" / name, run / "checkpoints" / name.replace("6", "7"))
    before = (run / "config.yaml").read_bytes(), (run / "provenance.jsonl").read_text()
    tiny.train_toy(voc_root, run.parent, "resume=auto", "train.log_every=5", "evaluate.bkg=0.4")
    log = (run / "train.log").read_text()
    assert "iter_000007.state.pt: not the state of iteration 7; an " in log and "after iteration 6; changed: " in log
    assert "train.log_every = 5, was 1" in log and "evaluate.bkg = 0.4, was 0.5" in log
    assert not (run / "checkpoints" / "iter_000007.state.pt").exists()   # in the way of what comes
    started, starts = (run / "config.yaml").read_bytes(), (run / "provenance.jsonl").read_text()
    assert started == before[0] and starts.startswith(before[1]), "what it was started with stays"
    line = json.loads(starts.splitlines()[1])
    assert line["iteration"] == 6 and "train.log_every = 5" in line["settings_changed"]
    assert line["settings"]["evaluate"]["bkg"] == 0.4


def test_a_run_that_ended_before_its_first_state_begins_anew(voc_root, run):
    """Its first was to come after the last iteration, but there are weights of a validation before."""
    for path in run.glob("checkpoints/iter_*"):
        path.unlink()
    tiny.train_toy(voc_root, run.parent, "resume=auto", "train.checkpoint_every=6")
    assert "the run begins anew" in (run / "train.log").read_text()
    assert len(read_metrics(run / "metrics.jsonl")) == 8 and (run / "checkpoints" / STATE).is_file()


@pytest.mark.parametrize("number", [1, 2])
def test_a_validation_that_was_cut_off_is_made_up(voc_root, finished, tmp_path, monkeypatch, number):
    with monkeypatch.context() as patch, pytest.raises(StopIteration):
        done = iter([train.validate] * (number - 1))
        patch.setattr(train, "validate", lambda *arguments: next(done)(*arguments))
        tiny.train_toy(voc_root, tmp_path)
    tiny.train_toy(voc_root, tmp_path, "resume=auto")
    found, expected = (
        ([(line["iteration"], line.get("val/regions")) for line in read_metrics(folder / "metrics.jsonl")],
         {name: read_meta(folder / "checkpoints" / BEST)[name] for name in ("val", "iteration")})
        for folder in (tmp_path / "toy", finished)
    )   # fmt: skip
    assert found == expected and len(found[0]) == 8


@pytest.mark.parametrize("loads", ["engine.training.run.load_start_weights", "engine.checkpoints.files.load_weights"])
def test_weights_are_loaded_before_the_processes_share_them(voc_root, run, monkeypatch, loads):
    """DDP gives every process the first one's parameters when it wraps them, and never again."""
    order = []
    monkeypatch.setattr(loads, lambda *arguments: order.append("weights"))
    monkeypatch.setattr(train, "Trainer", lambda *arguments: order.append("DDP") or Trainer(*arguments))
    tiny.train_toy(voc_root, run.parent, "tag=new" if "start" in loads else "resume=auto")
    assert order == ["weights", "DDP"]


def test_one_training_at_a_time_and_nothing_to_resume(voc_root, tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path / "toy")]
    other = subprocess.Popen(command, cwd=tiny.ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    other.stdout.readline()
    with pytest.raises(UserError, match=f"toy: process {other.pid} of .* trains here"):
        tiny.train_toy(voc_root, tmp_path, "resume=auto")
    other.kill()
    other.communicate()
    tiny.train_toy(voc_root, tmp_path, "resume=auto", "train.iterations=1", "data.val_split=null")
    assert "no checkpoint in " in (tmp_path / "toy" / "train.log").read_text()


@pytest.mark.parametrize("world, layer, said", [
    (2, nn.BatchNorm2d, "batch norm: each process's own statistics: the number of processes changes the run"),
    (2, SyncBatchNorm, "batch norm: statistics over all"), (2, nn.SyncBatchNorm, "batch norm: statistics over all"),
    (2, nn.Identity, ""), (1, nn.BatchNorm2d, ""), (2, FrozenBatchNorm, ""),
])
def test_whose_batch_statistics_is_said(tmp_path, monkeypatch, world, layer, said):
    monkeypatch.setitem(METHODS, "toy", method.Toy)
    config, cpu = load_config(None, ["method=toy", "tag=toy", f"output={tmp_path}"]), torch.device("cpu")
    toy, run = method.Toy(config, 2), Run(config, Ranks(0, world, cpu))
    toy.body[2] = layer(8)
    run.trainer, run.classes = Trainer(toy, config, Ranks(0, 1, cpu), 6), []
    run.describe([], None)
    log = (tmp_path / "toy" / "train.log").read_text()
    assert log.count("batch norm") == bool(said) and said in log

"""A released folder: complete, checked, the same twice, without a path of the machine."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import utils.download
from datasets import build_val_set
from engine.checkpoints import release
from engine.checkpoints.files import read_meta, save_weights
from engine.checkpoints.opening import open_checkpoint
from engine.config import load_config
from engine.distributed import Ranks
from engine.evaluation.evaluate import evaluate
from engine.training.train import train
from model.method import MapPlan
from tests import tiny
from utils.errors import UserError
from utils.log import close_logger

RANKS = Ranks(0, 1, torch.device("cpu"))
FILES = {"README.md", "config.yaml", "metrics.jsonl", "registry_row.yaml", "results.json", "train.log", "SHA256SUMS"}


@pytest.fixture(scope="module")
def run(tmp_path_factory, voc_root):
    """A finished run of 2 iterations in a folder with spaces in its name, scored once."""
    folder = tmp_path_factory.mktemp("of me")
    settings = [*tiny.SETTINGS, "train.iterations=2", "train.validate_every=2", "train.checkpoint_every=1"]
    settings += [f"data.root={voc_root}", f"output={folder / 'my runs'}", "tag=tiny", "pseudo_labels.par_iterations=1"]
    config = load_config("more_voc", settings)
    path = train(config, RANKS)
    close_logger()
    weights = path / "checkpoints" / "best.weights.safetensors"
    opened = open_checkpoint(str(weights))
    evaluate(opened.method, build_val_set(config), config, RANKS, str(weights), path / "results.json")
    return path


def test_the_tool_from_another_folder(run, tmp_path):
    """As a user calls it; every file is there, right by its hash, and names no folder of the machine."""
    tool = [sys.executable, str(tiny.ROOT / "tools/release.py"), str(run), "out/tiny-voc"]
    tool += ["--url", "https://host/a", "--licence", "MIT"]
    done = subprocess.run(tool, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out" / "tiny-voc"
    assert [path.name for path in out.parent.iterdir()] == ["tiny-voc"]
    assert {path.name for path in out.iterdir()} == FILES | {"tiny-voc.safetensors"}
    subprocess.run(["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd=out, check=True, capture_output=True)
    secrets = [str(run.parents[1]), run.parents[1].name, str(Path.home()), str(tiny.ROOT), sys.prefix, str(tmp_path)]
    for path in out.iterdir():
        text = path.read_bytes()
        assert not [secret for secret in secrets if secret.encode() in text], path.name
    assert "done: tiny" in (out / "train.log").read_text()
    assert (out / "metrics.jsonl").read_text() == (run / "metrics.jsonl").read_text()


@pytest.fixture(scope="module")
def out(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("releases") / "tiny-voc"
    assert release.release(run, folder, url="https://host/a", licence="MIT")
    return folder


def test_the_released_weights(run, out, tmp_path):
    theirs, ours = run / "checkpoints" / "best.weights.safetensors", out / "tiny-voc.safetensors"
    tensors, released = load_file(theirs), load_file(ours)
    assert tensors.keys() == released.keys() and all(torch.equal(tensors[key], released[key]) for key in tensors)
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes(ours.read_bytes())
    by_run, by_header, by_folder = (open_checkpoint(str(path)) for path in (theirs, alone, out))
    assert by_header.config == by_folder.config and by_header.classes == by_run.classes
    assert by_header.config.model == by_run.config.model and by_header.config.loss == by_run.config.loss
    assert by_header.config.data == by_run.config.data.model_copy(update={"root": None})
    images = torch.randn(1, 3, 50, 70)
    made = [opened.method.maps(images, {"lam": MapPlan(flip=True)}, None) for opened in (by_run, by_header)]
    assert torch.equal(made[0]["lam"], made[1]["lam"])
    assert read_meta(ours)["val"] == read_meta(theirs)["val"]


def test_the_card_says_the_results(run, out):
    rows = json.loads((out / "results.json").read_text())
    card = (out / "README.md").read_text()
    assert len(rows) == 3 and {row["checkpoint"] for row in rows} == {"tiny-voc.safetensors"}
    for row in rows:
        scores = f"| {100 * row['miou']:.2f} | {100 * row['pixel_accuracy']:.2f} |"
        assert any(line.startswith(scores) and "voc val, 4 images" in line for line in card.splitlines())
    start = json.loads((run / "provenance.jsonl").read_text())
    assert f"torch {start['versions']['torch']}" in card and (start["commit"] or "unknown") in card


def test_the_row_fits_the_registry(out, tmp_path, monkeypatch):
    """Pasted into a registry it is read, and the file is found and verified by its hash."""
    monkeypatch.setattr(utils.download, "REGISTRY", out / "registry_row.yaml")
    entry = utils.download.find("tiny-voc")
    assert (entry.kind, entry.url, entry.licence) == ("checkpoint", "https://host/a/tiny-voc.safetensors", "MIT")
    copy = tmp_path / entry.file
    copy.write_bytes((out / entry.file).read_bytes())
    assert utils.download.fetch("tiny-voc", tmp_path, offline=True) == copy
    monkeypatch.setenv("WSSS_DOWNLOADS", str(tmp_path))
    assert open_checkpoint("tiny-voc").classes == open_checkpoint(str(out)).classes
    copy.write_bytes(copy.read_bytes()[:-1] + b"!")
    with pytest.raises(UserError, match=r"tiny-voc"):
        utils.download.fetch("tiny-voc", tmp_path, offline=True)


def test_a_second_call_changes_nothing_and_mends_what_is_damaged(run, out):
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert not release.release(run, out, url="https://host/a", licence="MIT")
    (out / "train.log").write_text("damaged")
    assert release.release(run, out, url="https://host/a", licence="MIT")
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_scores_of_an_earlier_best_are_left_out(run, tmp_path):
    """best.weights is written anew while a run goes on; the rows of both name the same file."""
    results = run / "results.json"
    own = results.read_text()
    rows = json.loads(own)
    assert {row["iteration"] for row in rows} == {2}
    try:
        results.write_text(json.dumps([{**rows[0], "iteration": 1, "miou": 0.99}, *rows]))
        release.release(run, tmp_path / "x")
        kept = json.loads((tmp_path / "x" / "results.json").read_text())
        assert [row["miou"] for row in kept] == [row["miou"] for row in rows]
    finally:
        results.write_text(own)


def test_a_run_without_validation_gives_its_last_weights(run, tmp_path):
    best = run / "checkpoints" / "best.weights.safetensors"
    aside = best.rename(best.with_name("aside"))
    try:
        assert release.release(run, tmp_path / "x")
        assert read_meta(tmp_path / "x" / "x.safetensors")["iteration"] == 2
        assert "These weights were not scored." in (tmp_path / "x" / "README.md").read_text()
    finally:
        aside.rename(best)


def test_a_folder_of_other_things_stays(run, out, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds notes\.txt, which is no part of a release"):
        release.release(run, tmp_path, name="x")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_unfinished_run_is_refused(run, tmp_path):
    last = run / "checkpoints" / "iter_000002.weights.safetensors"
    aside = last.rename(last.with_name("aside"))
    try:
        with pytest.raises(UserError, match=r"tiny: 1 of 2 iterations are done; .*--unfinished"):
            release.release(run, tmp_path / "x")
        assert not list(tmp_path.iterdir())
        weights = "iter_000001.weights.safetensors"
        assert release.release(run, tmp_path / "x", weights, unfinished=True)
        card = (tmp_path / "x" / "README.md").read_text()
        assert "iteration 1, seed 0" in card and "These weights were not scored." in card
        assert yaml.safe_load((tmp_path / "x" / "registry_row.yaml").read_text())["x"]["url"] is None
    finally:
        aside.rename(last)


@pytest.mark.parametrize("length", [{"iterations": None, "epochs": 1}, {"iterations": 3}])
def test_the_length_of_the_training_is_that_of_the_weights(run, tmp_path, length):
    """Of a training given in epochs, too; not what the config may have been changed to."""
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    settings = yaml.safe_load((copy / "config.yaml").read_text())
    settings["train"] |= length
    (copy / "config.yaml").write_text(yaml.safe_dump(settings))
    assert release.release(copy, tmp_path / "x")
    assert "| training | 2 iterations, batch 4" in (tmp_path / "x" / "README.md").read_text()


def test_weights_that_do_not_survive_are_not_released(run, tmp_path, monkeypatch):
    def other(path, method, meta):
        with torch.no_grad():
            method.network.classifier.weight[0] += 1e-3
            save_weights(path, method, meta)
            method.network.classifier.weight[0] -= 2e-3

    monkeypatch.setattr(release, "save_weights", other)
    with pytest.raises(UserError, match="does not give what the run's weights give"):
        release.release(run, tmp_path / "x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("missing", ["config.yaml", "train.log", "checkpoints/other.safetensors"])
def test_what_is_no_run(tmp_path, missing):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    for name in {"config.yaml", "train.log", "metrics.jsonl"} - {missing}:
        (run / name).touch()
    with pytest.raises(UserError, match=f"{missing}: no such file; a release is made of the folder of a run"):
        release.release(run, tmp_path / "x", "other.safetensors")


def test_folders_in_texts():
    known = ["/home/me/my data/voc", "/data"]
    for text, expected in {
        "from /home/me/my data/voc/JPEGImages/a.jpg, (/home/you/x.pth)": "from JPEGImages/a.jpg, (x.pth)",
        "root=/data out=~/runs/a file:///mnt/b.txt path:/mnt/c": "root=data out=a b.txt path:c",
        "../../home/me/x C:\\Users\\me\\y.pth ~you/z /mnt/disk/": "x y.pth z disk",
        "12/2600  https://host/data/a.pth a/data/b and/or ./runs/a 1 / 2 lr 6e-05": None,
    }.items():
        assert release.without_folders(text, known) == (expected or text)

"""tools/prepare_voc.py on a devkit made here, on the official lists, and against the released label dictionary."""

import contextlib
import fcntl
import hashlib
import json
import multiprocessing
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datasets import build_train_set, build_val_set
from datasets.onehot import read_onehot
from datasets.prepare import voc
from datasets.prepare.sources import Blob
from datasets.voc import CLASSES
from engine.config import load_config
from tests import tiny
from tests.datasets.prepare import devkit
from tools import prepare_voc
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
LISTS = "ImageSets/Segmentation"


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """The folder of the archives a user downloads."""
    folder = tmp_path_factory.mktemp("downloads")
    devkit.write_tar(folder / "VOCtrainval_11-May-2012.tar", devkit.trainval_files())
    devkit.write_tar(folder / "VOC2012test.tar", devkit.test_files())
    devkit.write_tar(folder / "benchmark.tgz", devkit.sbd_files(), "w:gz")
    with zipfile.ZipFile(folder / "SegmentationClassAug.zip", "w") as file:
        for name, data in devkit.aug_files().items():
            file.writestr(name, data)
    return folder


def arguments(out, archives, sbd="benchmark.tgz", *more):
    voc = [archives / "VOCtrainval_11-May-2012.tar", archives / "VOC2012test.tar"]
    given = [out, "--voc", *voc, "--sbd", archives / sbd, "--partial", "--workers", 1, *more]
    return [str(argument) for argument in given]


def snapshot(root):
    """Bytes of every file below a folder, hidden ones too."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def without_manifest(root):
    return {name: data for name, data in snapshot(root).items() if name != "manifest.json"}


def ids(path):
    return np.array(Image.open(path))


def config_of(root, *overrides):
    return load_config("more_voc", [f"data.root={root}", "data.crop_size=16", *overrides])


@pytest.fixture(scope="module")
def prepared(archives, tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared") / "voc"
    before = snapshot(archives)
    prepare_voc.main(arguments(out, archives))
    assert snapshot(archives) == before
    return out


def test_what_is_made(prepared):
    lists = {path.stem: path.read_text().split() for path in (prepared / LISTS).iterdir()}
    assert lists == {
        "train": devkit.TRAIN, "val": devkit.VAL, "trainval": sorted(devkit.TRAIN + devkit.VAL),
        "train_aug": devkit.TRAIN_AUG, "test": devkit.TEST,
    }
    for name in devkit.LABELLED:
        mask = devkit.voc_mask(name) if name in devkit.TRAIN + devkit.VAL else devkit.sbd_mask(name)
        assert np.array_equal(ids(prepared / f"SegmentationClassAug/{name}.png"), mask)
        assert (prepared / f"JPEGImages/{name}.jpg").read_bytes() == devkit.jpeg(name)
        assert (prepared / f"Annotations/{name}.xml").read_bytes() == devkit.voc_annotation(name)
    assert Image.open(prepared / "SegmentationClassAug/2008_000002.png").mode == "P"
    assert {path.name for path in prepared.iterdir()} == {
        "Annotations", "ImageSets", "JPEGImages", "SegmentationClassAug", "labels.json", "manifest.json"
    }
    labels = json.loads((prepared / "labels.json").read_text())
    assert {name: sorted(present) for name, present in labels.items()} == {
        name: sorted(devkit.labels_of(name)) for name in devkit.LABELLED
    }


def test_the_manifest(prepared, archives):
    manifest = json.loads((prepared / "manifest.json").read_text())
    files = without_manifest(prepared)
    assert manifest["files"] == {
        name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()
    }
    assert manifest["counts"] == {"train": 2, "val": 2, "test": 1, "trainval": 4, "train_aug": 5}
    names = {"voc 1": "VOCtrainval_11-May-2012.tar", "voc 2": "VOC2012test.tar", "sbd": "benchmark.tgz"}
    digests = {part: hashlib.sha256((archives / name).read_bytes()).hexdigest() for part, name in names.items()}
    assert manifest["sources"] == digests and manifest["tool"] == "prepare_voc" and manifest["version"] == 1


def test_it_trains_and_validates_from_there(prepared):
    train, val = build_train_set(config_of(prepared)), build_val_set(config_of(prepared))
    assert train.names == devkit.TRAIN_AUG and val.names == devkit.VAL
    assert train[0, 0].image.shape == (3, 16, 16)
    assert np.array_equal(val[0].label_map, devkit.voc_mask(devkit.VAL[0]))


@pytest.mark.parametrize("kind", ["zip", "folders", "devkit"])
def test_every_form_of_the_sources_gives_the_same(kind, prepared, archives, tmp_path):
    if kind == "zip":
        given = arguments(tmp_path / "out", archives, "SegmentationClassAug.zip", "--workers", 2)
    else:
        devkit.write_folder(tmp_path / "voc", {**devkit.trainval_files(), **devkit.test_files()})
        sbd = devkit.write_folder(tmp_path / "sbd", devkit.sbd_files() if kind == "folders" else devkit.aug_files())
        below = {"folders": ("", ""), "devkit": ("VOCdevkit/VOC2012", "SegmentationClassAug")}[kind]
        given = [tmp_path / "out", "--voc", tmp_path / "voc" / below[0], "--sbd", sbd / below[1], "--partial",
                 "--images", "link"]
    prepare_voc.main(list(map(str, given)))
    assert without_manifest(tmp_path / "out") == without_manifest(prepared)
    assert (tmp_path / "out/JPEGImages/2007_000032.jpg").is_symlink() == (kind != "zip")


def test_a_second_call_only_mends(prepared, archives, capsys):
    before, times = snapshot(prepared), {path: path.stat().st_mtime_ns for path in prepared.rglob("*")}
    prepare_voc.main(arguments(prepared, archives))
    assert "everything is there already" in capsys.readouterr().out
    mask, image = prepared / "SegmentationClassAug/2008_000002.png", prepared / "JPEGImages/2007_000039.jpg"
    mask.write_bytes(mask.read_bytes()[:-1] + b"?")
    image.unlink()
    with pytest.raises(UserError, match=r"2007_000039.jpg is missing \(and 1 more\)"):
        prepare_voc.main([str(prepared), "--verify", "--workers", "1"])
    prepare_voc.main(arguments(prepared, archives))
    assert snapshot(prepared) == before
    changed = {path for path, time in times.items() if path.stat().st_mtime_ns != time and path.is_file()}
    assert changed == {mask, image, prepared / "manifest.json"}
    prepare_voc.main([str(prepared), "--verify", "--workers", "1"])
    assert f"{len(before) - 1} files" in capsys.readouterr().out


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_call_goes_on(workers, archives, prepared, tmp_path, monkeypatch):
    """SIGKILL while files appear; what was finished stays untouched, the end is as without the kill."""
    out, quickly = tmp_path / "out", Blob.read

    def read(blob):
        time.sleep(0.05)
        return quickly(blob)

    monkeypatch.setattr(Blob, "read", read)
    given = arguments(out, archives, "benchmark.tgz", "--workers", workers)
    process = multiprocessing.get_context("fork").Process(target=prepare_voc.main, args=(given,))
    process.start()
    journal = out / ".preparing.jsonl"
    while not journal.exists() or len(journal.read_text().splitlines()) < 4:
        assert process.is_alive()
        time.sleep(0.02)
    process.kill()
    process.join()
    monkeypatch.setattr(Blob, "read", quickly)
    done = json.loads(journal.read_text().splitlines()[1])[0]
    time_of = (out / done).stat().st_mtime_ns
    (out / "JPEGImages/.0123456789abcdef.part").write_bytes(b"half a file")
    with open(journal, "a") as file:
        file.write('["JPEGImages/20')
    wait_for_workers(journal)
    prepare_voc.main(given)
    assert (out / done).stat().st_mtime_ns == time_of
    assert snapshot(out) == snapshot(prepared)


def wait_for_workers(journal):
    """They share the lock of the call that was killed, and end a little later."""
    with open(journal) as file:
        for _ in range(400):
            with contextlib.suppress(BlockingIOError):
                return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            time.sleep(0.05)
    pytest.fail("the workers of a killed call live on")


def test_the_rule_gives_the_official_list(shared_data):
    """VOC's train and SBD without VOC's val: the released dictionary names all of SBD and VOC, 12,031 images."""
    official = {split: (shared_data / f"voc2012_lists/{split}.txt").read_text().split()
                for split in ("train", "val", "train_aug")}
    everything = read_onehot(shared_data / "voc2012_lists/cls_labels_onehot.npy")
    assert len(everything) == 12031
    computed = voc.augmented(official["train"], official["val"], everything)
    assert computed == official["train_aug"] and len(computed) == voc.KNOWN["train_aug"]


def test_the_released_labels_and_the_masks(shared_data):
    """They have every class of a mask; images with VOC's own have no more, some with SBD's have."""
    lists, released = shared_data / "voc2012_lists", read_onehot(shared_data / "voc2012_lists/cls_labels_onehot.npy")
    own = {name for split in ("train", "val") for name in (lists / f"{split}.txt").read_text().split()}
    more = {True: 0, False: 0}
    for path in sorted((shared_data / "voc_animals/SegmentationClassAug").iterdir())[::15]:
        present = set(np.unique(ids(path))) - {0, 255}
        named = set(np.flatnonzero(released[path.stem]) + 1)
        assert present <= named
        more[path.stem in own] += present != named
    assert more[True] == 0 and more[False] > 0


def onehot(table):
    return {name: np.isin(CLASSES, present).astype(np.float32) for name, present in table.items()}


def test_the_released_dictionary_gives_the_identical_data_set(prepared, tmp_path, capsys):
    """Hand-made labels by the rule 'every object, difficult or not', saved as the release does."""
    released = onehot({name: devkit.labels_of(name) for name in devkit.LABELLED})
    assert released["2007_000039"][CLASSES.index("person")] == 1  # its only person is difficult
    np.save(tmp_path / "cls_labels_onehot.npy", released)
    own = build_train_set(config_of(prepared))
    others = [build_train_set(config_of(prepared, f"data.image_labels={source}"))
              for source in (tmp_path / "cls_labels_onehot.npy", "Annotations")]
    for other in others:
        assert other.samples == own.samples and other.classes == own.classes
        for index in range(len(own)):
            first, second = own[index, 7], other[index, 7]
            assert torch.equal(first.labels, second.labels) and torch.equal(first.image, second.image)
            assert torch.equal(first.labels, torch.from_numpy(released[first.name]))


def test_labels_are_compared_with_a_released_dictionary(archives, tmp_path, capsys):
    released = onehot({name: devkit.labels_of(name) for name in devkit.LABELLED})
    released["2007_000039"][CLASSES.index("person")] = 0
    np.save(tmp_path / "released.npy", released)
    given = ["--compare-labels", tmp_path / "released.npy"]
    prepare_voc.main(arguments(tmp_path / "out", archives, "benchmark.tgz", *given))
    out = capsys.readouterr().out
    assert "labels of 6 of 7 images are equal, others differ: 2007_000039" in out


def test_a_given_train_aug(archives, tmp_path, capsys):
    given = tmp_path / "given.txt"
    given.write_text("/JPEGImages/2008_000003.jpg /SegmentationClassAug/2008_000003.png\n2007_000039\n")
    prepare_voc.main(arguments(tmp_path / "out", archives, "benchmark.tgz", "--train-aug", given))
    assert (tmp_path / "out" / LISTS / "train_aug.txt").read_text().split() == ["2008_000003", "2007_000039"]
    assert "by 3 images; left out: 2007_000032, 2008_000002, 2008_000008" in capsys.readouterr().out


def changed(files, name, data):
    """The files with one replaced, None: left out."""
    assert name in files
    return {key: data if key == name else value for key, value in files.items() if key != name or data is not None}


VOC = "VOCdevkit/VOC2012"
SBD = "benchmark_RELEASE/dataset"
OTHER_SIZE = devkit.mat(np.zeros((5, 6), np.uint8))


@pytest.mark.parametrize(("archive", "name", "data", "words"), [
    ("voc", f"{VOC}/JPEGImages/2008_000002.jpg", None, ("JPEGImages/2008_000002.jpg", "missing")),
    ("voc", f"{VOC}/Annotations/2008_000002.xml", None, ("2008_000002.xml", "missing")),
    ("voc", f"{VOC}/Annotations/2008_000002.xml", b"<annotation>", ("2008_000002.xml", "cannot be read")),
    ("voc", f"{VOC}/Annotations/2008_000002.xml", devkit.voc_annotation("2008_000002").replace(b">dog<", b">dgo<"),
     ("2008_000002", "'dgo'", "'dog'")),
    ("voc", f"{VOC}/SegmentationClass/2007_000032.png", b"broken", ("2007_000032.png", "cannot be read")),
    ("voc", f"{VOC}/SegmentationClass/2007_000032.png", devkit.png(np.full((9, 9), 21, np.uint8)),
     ("2007_000032.png", "id 21")),
    ("voc", f"{VOC}/{LISTS}/val.txt", None, ("VOCtrainval.tar", "val.txt")),
    ("sbd", f"{SBD}/cls/2008_000002.mat", OTHER_SIZE, ("2008_000002.mat is 6x5", "30x22")),
    ("sbd", f"{SBD}/cls/2008_000002.mat", b"no mat", ("2008_000002.mat", "cannot be read")),
    ("sbd", f"{SBD}/cls/2008_000002.mat", None, ("lists name 2008_000002",)),
], ids=lambda value: value[0] if isinstance(value, tuple) else "")
def test_broken_sources_are_named(archive, name, data, words, tmp_path):
    voc, sbd = devkit.trainval_files(), devkit.sbd_files()
    voc, sbd = (changed(voc, name, data), sbd) if archive == "voc" else (voc, changed(sbd, name, data))
    given = [tmp_path / "out", "--voc", devkit.write_tar(tmp_path / "VOCtrainval.tar", voc), "--sbd",
             devkit.write_tar(tmp_path / "benchmark.tgz", sbd, "w:gz"), "--partial", "--workers", "1"]
    with pytest.raises(UserError) as error:
        prepare_voc.main(list(map(str, given)))
    for word in words:
        assert word in str(error.value)


def test_broken_archives_are_named(archives, tmp_path):
    voc, sbd = (archives / name for name in ("VOCtrainval_11-May-2012.tar", "benchmark.tgz"))
    cut = tmp_path / "cut.tar"
    for source, option in ((voc, "--voc"), (sbd, "--sbd")):
        cut.write_bytes(source.read_bytes()[: source.stat().st_size * 2 // 3])
        given = {"--voc": voc, "--sbd": sbd, option: cut}
        with pytest.raises(UserError, match="cut.tar.*complete"):
            prepare_voc.main([str(tmp_path / option), *[str(x) for pair in given.items() for x in pair], "--partial"])


def test_archives_that_point_outside_are_refused(archives, tmp_path):
    evil = devkit.write_tar(tmp_path / "evil.tar", {**devkit.trainval_files(), "../VOC2012/JPEGImages/x.jpg": b"x"})
    with pytest.raises(UserError, match=r"evil.tar: refused.*\.\./VOC2012"):
        prepare_voc.main([str(tmp_path / "a"), "--voc", str(evil), "--partial"])
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as file:
        file.writestr("../SegmentationClassAug/x.png", b"x")
    with pytest.raises(UserError, match=r"evil.zip: refused"):
        prepare_voc.main(arguments(tmp_path / "b", archives, tmp_path / "evil.zip"))


def test_other_counts_are_an_error_without_partial(archives, tmp_path):
    given = [argument for argument in arguments(tmp_path, archives) if argument != "--partial"]
    with pytest.raises(UserError, match="train has 2 images, 1462 fewer than the 1464"):
        prepare_voc.main(given)
    parts = voc.Parts({}, {}, {}, dict.fromkeys("ab"), {"train": [str(i) for i in range(1464)],
                                                                  "val": [str(-i) for i in range(1, 1450)]})
    with pytest.raises(UserError, match=r"train_aug has 1466 images \(VOC train 1464, SBD 2\), 9116 fewer .* 10582"):
        voc.split_lists(parts, None, partial=False)


def test_other_folders_and_settings_are_left_alone(prepared, archives, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("x")
    with pytest.raises(UserError, match="mine: holds thesis.tex"):
        prepare_voc.main(arguments(tmp_path / "mine", archives))
    before = snapshot(prepared)
    with pytest.raises(UserError, match="prepared with other sources"):
        prepare_voc.main(arguments(prepared, archives, "SegmentationClassAug.zip"))
    with pytest.raises(UserError, match="prepared with other tool"):
        voc.Preparation(prepared, {"tool": "another"})
    assert snapshot(prepared) == before


def test_two_calls_at_once(prepared, archives):
    manifest = json.loads((prepared / "manifest.json").read_text())
    identity = {key: manifest[key] for key in ("tool", "version", "settings", "sources")}
    with voc.Preparation(prepared, identity), pytest.raises(UserError, match="another process"):
        prepare_voc.main(arguments(prepared, archives))


def test_a_full_disk_is_named(archives, tmp_path):
    out = tmp_path / "out"
    with tiny.full_disk(600), pytest.raises(UserError, match=r"out/.*: File too large"):
        prepare_voc.main(arguments(out, archives, "SegmentationClassAug.zip"))
    assert not [path for path in out.rglob("*") if path.is_file() and path.name != ".preparing.jsonl"]


def test_the_command(prepared, archives, tmp_path):
    """From another folder, with several processes."""
    command = [sys.executable, str(ROOT / "tools/prepare_voc.py"), *arguments("out", archives, "benchmark.tgz",
                                                                              "--workers", 2)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "train_aug 5" in done.stdout and "100%" in done.stderr
    assert "run_train.sh scripts/train_voc.py" in done.stdout and "1 29500 voc data.root=out" in done.stdout
    assert snapshot(tmp_path / "out").keys() == snapshot(prepared).keys()
    assert without_manifest(tmp_path / "out") == without_manifest(prepared)

"""tools/predict.py: every kind of image file, its outputs against one image after the other, resuming."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from datasets import ImageFiles, Unreadable, find_images, unique_names
from datasets.voc import CLASSES
from engine.checkpoints.opening import open_checkpoint
from engine.config import load_config
from engine.inference.batch import predict
from engine.inference.image_files import least_side
from engine.inference.plan import evaluation_plan
from tests import tiny
from tools import predict as tool
from utils.errors import UserError
from utils.images import normalize, read_rgb

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.save_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny.safetensors")


def picture(seed: int, size: tuple[int, int] = (24, 30)) -> Image.Image:
    """Smooth random colours, (H, W)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_CUBIC))


def every_kind(folder: Path) -> dict[str, tuple[int, int]]:
    """Writes images of every kind; name -> (width, height) as they are seen."""
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        picture(ord(name)).save(folder / name / "x.jpg")
    rotated = Image.Exif()
    rotated[0x0112] = 6
    picture(1).save(folder / "rotated.jpg", exif=rotated)
    picture(9).save(folder / "odd.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\x02\0")   # metadata cut short
    picture(9).save(folder / "odder.webp", exif=b"no metadata")
    picture(2).convert("L").save(folder / "grey.jpg")
    picture(3).convert("CMYK").save(folder / "cmyk.jpg")
    picture(4).quantize(16).save(folder / "palette.png")
    picture(5).convert("RGBA").save(folder / "alpha.webp")
    deep = np.random.default_rng(6).integers(0, 65536, (20, 33), dtype=np.uint16)
    Image.fromarray(deep).save(folder / "deep.tif")
    picture(7, (1, 1)).save(folder / "one.png")
    picture(8, (37, 4000)).save(folder / "long.jpg")
    (folder / "broken.jpg").write_bytes((folder / "grey.jpg").read_bytes()[:300])
    (folder / "notes.txt").write_text("no image")
    seen = dict.fromkeys(("a/x", "b/x", "grey", "cmyk", "palette", "alpha", "odd", "odder"), (30, 24))
    return {**seen, "rotated": (24, 30), "deep": (33, 20), "one": (1, 1), "long": (4000, 37)}


def files(folder: Path) -> dict[str, int]:
    """All files below, with the time each was written."""
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def one_by_one(checkpoint, path, *settings):
    """The prediction of a file by itself, as an evaluation makes it."""
    opened = open_checkpoint(str(checkpoint), ["evaluate.image_labels=predicted", *settings])
    plan = evaluation_plan(opened.config)._replace(class_logits=True)
    return predict(opened.method, normalize(read_rgb(path)), None, plan)


def test_every_kind_of_image(checkpoint, tmp_path, one_thread):
    """As a user runs it: from another folder, one image broken; everything that is written, against one by one."""
    images, out = tmp_path / "images", tmp_path / "out"
    seen = every_kind(images)
    command = [sys.executable, ROOT / "tools" / "predict.py", checkpoint, "images", "--output", "out"]
    command += ["--kinds", "seg", "lam", "--device", "cpu"]
    command = [str(part) for part in command]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1, done.stderr
    assert not re.search("Traceback|Warning", done.stderr), done.stderr
    assert done.stderr.count("broken.jpg: image file cannot be read") == 1
    assert f"{len(seen)} written, 0 there already, 1 not readable" in done.stdout and "images/s" in done.stdout
    written = files(out)
    for folder, ending in (("json", "json"), ("labels/seg", "png"), ("labels/lam", "png"), ("overlays/seg", "jpg")):
        assert {name for name in written if name.startswith(folder + "/")} == {f"{folder}/{n}.{ending}" for n in seen}
    for name, size in seen.items():
        check_image(out, name, size, one_by_one(checkpoint, sourced(out, name), "evaluate.maps=[seg,lam]"))


def sourced(out: Path, name: str) -> str:
    return json.loads((out / "json" / f"{name}.json").read_text())["image"]


def check_image(out: Path, name: str, size: tuple[int, int], prediction) -> None:
    entry = json.loads((out / "json" / f"{name}.json").read_text())
    assert (entry["width"], entry["height"]) == size
    for kind in ("seg", "lam"):
        with Image.open(out / "labels" / kind / f"{name}.png") as mask:
            ids = np.asarray(mask)
            assert mask.mode == "P" and mask.size == size
        np.testing.assert_array_equal(ids, prediction.labels[kind, False], err_msg=name)
        shares = {("background", *CLASSES)[i]: (ids == i).mean() for i in np.unique(ids)}
        assert entry["shares"][kind] == pytest.approx(shares)
        with Image.open(out / "overlays" / kind / f"{name}.jpg") as drawn:
            assert drawn.size == size
    logits = prediction.class_logits.tolist()
    assert list(entry["scores"]) == list(CLASSES)
    assert list(entry["scores"].values()) == pytest.approx([1 / (1 + np.exp(-x)) for x in logits], abs=1e-6)
    present = [label for label, logit in zip(CLASSES, logits, strict=True) if logit > 0]
    assert entry["present"] == present and entry["image_labels"] == "predicted by the classifier"
    folder = out / "heat" / "lam"
    assert [label for label in CLASSES if (folder / label / f"{name}.jpg").is_file()] == present


def test_fifty_real_images(checkpoint, shared_data, tmp_path, capsys):
    """VOC and COCO images of many sizes, three odd ones among them; the 37x4000 one is standing."""
    voc = sorted((shared_data / "voc_animals" / "JPEGImages").glob("*.jpg"))[::110][:24]
    coco = sorted((shared_data / "coco_mini" / "JPEGImages").rglob("*.jpg"))[::6][:23]
    odd = {"one.png": picture(0, (1, 1)), "tall.png": picture(1, (4000, 37)), "grey.jpg": picture(2).convert("L")}
    for name, image in odd.items():
        image.save(tmp_path / name)
    paths = [*voc, *coco, *(tmp_path / name for name in odd)]
    assert len(paths) == 50 and len({Image.open(path).size for path in paths}) > 15
    out = tmp_path / "out"
    tool.main([str(checkpoint), *map(str, paths), "--output", str(out), "--batch", "4", "--device", "cpu"])
    assert "50 written, 0 there already, 0 not readable" in capsys.readouterr().out
    for path in paths:
        with Image.open(out / "labels" / "seg" / f"{path.stem}.png") as mask, Image.open(path) as image:
            assert mask.size == image.size and mask.getextrema()[1] <= len(CLASSES)


def test_crf_on_small_images(checkpoint, tmp_path, one_thread):
    for index, size in enumerate(((1, 1), (9, 7), (24, 30), (37, 200))):
        picture(index, size).save(tmp_path / f"{index}.png")
    arguments = ["--output", str(tmp_path / "out"), "--kinds", "seg", "cam", "--crf", "--device", "cpu"]
    tool.main([str(checkpoint), str(tmp_path), *arguments])
    for index in range(4):
        alone = one_by_one(checkpoint, tmp_path / f"{index}.png", "evaluate.maps=[seg,cam]", "evaluate.crf=true")
        for (kind, crf), ids in alone.labels.items():
            drawn = Image.open(tmp_path / "out" / "labels" / (kind + "_crf" * crf) / f"{index}.png")
            np.testing.assert_array_equal(np.asarray(drawn), ids)


def test_two_processes_write_what_one_writes(checkpoint, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for index in range(3):
        picture(index).save(images / f"{index}.png")
    (images / "broken.png").write_bytes(b"none")
    arguments = [str(checkpoint), str(images), "--kinds", "cam", "--device", "cpu", "--output"]
    with pytest.raises(SystemExit):
        tool.main([*arguments, str(tmp_path / "one")])
    done = tiny.fork("tools/predict.py", *arguments, tmp_path / "two", count=2)
    assert done.returncode == 1 and "3 written, 0 there already, 1 not readable" in done.stdout, done.stderr
    one, two = tmp_path / "one", tmp_path / "two"
    assert files(one).keys() == files(two).keys()
    for name in files(one):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


def test_resuming(checkpoint, tmp_path, capsys):
    for index in range(4):
        picture(index).save(tmp_path / f"{index}.png")
    out = tmp_path / "out"
    arguments = [str(checkpoint), str(tmp_path), "--output", str(out), "--device", "cpu"]
    tool.main(arguments)
    first = files(out)
    assert not [name for name in first if name.endswith(".part")]
    (out / "json" / "2.json").unlink()   # as if the run had been ended before it
    tool.main(arguments)
    assert "1 written, 3 there already" in capsys.readouterr().out
    again = files(out)
    assert again.keys() == first.keys()   # nothing was predicted from its own output
    assert {name for name in first if again[name] != first[name]} == {
        "json/2.json", "labels/seg/2.png", "overlays/seg/2.jpg"
    }
    with pytest.raises(UserError, match=r"made with maps = .*; give another folder, or --overwrite"):
        tool.main([*arguments, "evaluate.scales.seg=[0.5]"])
    tool.main([*arguments, "evaluate.scales.seg=[0.5]", "--overwrite"])
    assert "4 written, 0 there already" in capsys.readouterr().out
    shutil.copytree(tmp_path, tmp_path.with_name("copy"), ignore=lambda *_: ["out"])
    with pytest.raises(UserError, match=r"0\.json: is of .*; give another --output, or --overwrite"):
        tool.main([str(checkpoint), str(tmp_path.with_name("copy")), *arguments[2:], "evaluate.scales.seg=[0.5]"])


def test_an_overwriting_run_that_was_ended_goes_on(checkpoint, tmp_path, capsys):
    """What it had not reached is of the run before, and is not taken for its own."""
    for index in range(2):
        picture(index).save(tmp_path / f"{index}.png")
    arguments = [str(checkpoint), str(tmp_path), "--output", str(tmp_path / "out"), "--device", "cpu"]
    tool.main(arguments)
    old = (tmp_path / "out" / "json" / "1.json").stat()
    tool.main([*arguments, "--overwrite"])
    os.utime(tmp_path / "out" / "json" / "1.json", ns=(old.st_atime_ns, old.st_mtime_ns))
    capsys.readouterr()
    tool.main(arguments)
    assert "1 written, 1 there already" in capsys.readouterr().out


def test_large_images_are_reduced(checkpoint, tmp_path, one_thread):
    picture(0, (40, 60)).save(tmp_path / "x.png")
    out = tmp_path / "out"
    arguments = ["--output", str(out), "--most-pixels", "600", "--device", "cpu"]
    tool.main([str(checkpoint), str(tmp_path / "x.png"), *arguments])
    assert json.loads((out / "json" / "x.json").read_text())["computed"] == [20, 30]
    reduced = tmp_path / "reduced.png"
    Image.fromarray(cv2.resize(read_rgb(tmp_path / "x.png"), (30, 20), interpolation=cv2.INTER_AREA)).save(reduced)
    small = one_by_one(checkpoint, reduced, "evaluate.maps=[seg]").labels["seg", False]
    np.testing.assert_array_equal(np.asarray(Image.open(out / "labels/seg/x.png")), small.repeat(2, 0).repeat(2, 1))


def test_given_labels_and_a_list_on_stdin(checkpoint, tmp_path, monkeypatch):
    picture(0).save(tmp_path / "a b.png")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(f"\ufeff{tmp_path / 'a b.png'} \r\n\r\n".encode())))
    out = tmp_path / "out"
    tool.main([str(checkpoint), "-", "--output", str(out), "--kinds", "cam", "--labels", "cat, dog", "--device", "cpu"])
    entry = json.loads((out / "json" / "a b.json").read_text())
    assert entry["present"] == ["cat", "dog"] and entry["image_labels"] == "given"
    assert set(entry["shares"]["cam"]) <= {"background", "cat", "dog"}
    assert sorted(path.parent.name for path in (out / "heat" / "cam").glob("*/a b.jpg")) == ["cat", "dog"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--labels", "cat,unicorn"], "no class 'unicorn'"),
        (["evaluate.imagelabels=given"], "unknown key"),
        (["evaluate.image_labels=given"], "say which with --labels"),
        (["--kinds", "lam", "sag"], r"evaluate\.maps = \[lam, sag\] .*: expected a list of one or more of cam, lam"),
        (["--batch", "0"], "evaluate.images_at_once = 0 on the command line: expected an integer, at least 1"),
        (["--most-pixels", "0"], "--most-pixels: '0' is no number of 1 or more"),
        (["nothing*.jpg"], r"nothing\*\.jpg: no image there"),
    ],
)
def test_mistakes(checkpoint, tmp_path, arguments, message):
    picture(0).save(tmp_path / "x.png")
    with pytest.raises(UserError, match=message):
        tool.main([str(checkpoint), str(tmp_path / "x.png"), "--output", str(tmp_path / "out"), *arguments])
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_there(checkpoint, tmp_path):
    with pytest.raises(UserError, match="nowhere: no such image or folder"):
        tool.main([str(checkpoint), str(tmp_path / "nowhere"), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_too_small_for_native_size(tmp_path):
    for name, size in (("one", (1, 1)), ("enough", (64, 70))):
        picture(0, size).save(tmp_path / f"{name}.png")
    plan = evaluation_plan(load_config("more_voc", ["evaluate.base_size=null", "evaluate.maps=[seg]",
                                                         "evaluate.scales.seg=[0.5,1.0]"]))
    paths = [tmp_path / "one.png", tmp_path / "enough.png", tmp_path / "absent.png"]
    items = ImageFiles(paths, ["one", "enough", "absent"], None, least_side(plan), 10**6)
    assert items[0] == Unreadable("one", f"{paths[0]}: 1x1 pixels are computed, at native size a side needs 64 or more;"
                                         " give evaluate.base_size")
    reduced = ImageFiles(paths, ["one", "enough", "absent"], None, least_side(plan), 1000)[1]
    assert isinstance(reduced, Unreadable) and "33x30 pixels are computed" in reduced.reason
    assert items[1].image.shape == (3, 64, 70)
    assert items[2] == Unreadable("absent", f"{paths[2]}: image file is missing")
    thin = ImageFiles(paths, items.names, None, least_side(plan), 10**6, plan._replace(long_side=65).input_size)[1]
    assert "65x59 pixels are computed, with evaluate.long_side a side needs 64 or more" in thin.reason


def test_names(tmp_path):
    """From the folder on; more folders only where two would be alike, the ending only where that does not help."""
    given = ["in/a/x.jpg", "in/b/x.jpg", "in/y.png", "one/z.jpg"]
    for name in [*given, "two/z.jpg", "two/w.jpg", "two/w.png", "two/w.jpg.png"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    inputs = [str(tmp_path / name) for name in ("in", "one/z.jpg", "two/*", "in/y.png")]
    found = find_images(inputs, tmp_path / "out")
    assert [str(image.relative_to(tmp_path)) for _, image in found] == [
        *given, "two/w.jpg", "two/w.jpg.png", "two/w.png", "two/z.jpg",
    ]
    assert unique_names(found) == ["a/x", "b/x", "y", "one/z", "w.jpg", "w.jpg.png", "w.png", "two/z"]


def test_links_to_folders(tmp_path):
    """Those behind which something new lies are followed, and what is reached without a link is named without it."""
    for name in ("real/x.jpg", "in/y.jpg", "in/sub/z.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    links = {"batch1": "../real", "batch2": "../real", "a": "sub", "loop": ".", "up": "..", "sub/up": ".."}
    for name, target in {**links, "w.jpg": "gone"}.items():
        (tmp_path / "in" / name).symlink_to(target)
    found = find_images([str(tmp_path / "in"), str(tmp_path / "in/**/*.jpg"), str(tmp_path / "real")], tmp_path / "out")
    assert unique_names(found) == ["batch1/x", "sub/z", "w", "y"]
    (tmp_path / "in" / "batch3").symlink_to("gone")
    with pytest.raises(UserError, match="in/batch3: is a link to nothing, gone"):
        find_images([str(tmp_path / "in")], tmp_path / "out")


def test_output_is_no_input(tmp_path):
    for name in ("x.jpg", "out/labels/x.png", ".jpg", "x.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for text in (str(tmp_path), str(tmp_path / "**")):
        assert find_images([text], tmp_path / "out") == [(tmp_path, tmp_path / "x.jpg")]
    with pytest.raises(UserError, match="no image there"):
        find_images([str(tmp_path / "out")], tmp_path / "out")

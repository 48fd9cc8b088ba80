"""tools/submit_voc.py: the archive as the server unpacks it, and every mistake by the name of its file."""

import gzip
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine.checkpoints.opening import open_checkpoint
from engine.distributed import pick_device
from engine.inference.batch import predict
from engine.inference.plan import evaluation_plan
from engine.inference.submission import check_archive
from tests import tiny
from tools import submit_voc as tool
from utils.errors import UserError
from utils.images import normalize, read_rgb, write_label_png

SIZES = {"2008_000006": (20, 31), "2008_000011": (33, 24), "2008_000012": (20, 31)}   # name -> (width, height)
FOLDER = "results/VOC2012/Segmentation/comp6_test_cls"


@pytest.fixture
def voc(tmp_path):
    """A VOC root of test images alone: neither masks nor labels; another image that is not in the list."""
    root = tmp_path / "VOC2012"
    for folder in ("JPEGImages", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    for index, (name, size) in enumerate({**SIZES, "2007_000001": (9, 9)}.items()):
        pixels = np.random.default_rng(index).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "JPEGImages" / f"{name}.jpg")
    (root / "ImageSets" / "Segmentation" / "test.txt").write_text("".join(f"{name}\n" for name in reversed(SIZES)))
    return root


@pytest.fixture
def masks(tmp_path):
    """A folder of right masks: id 0, 15 or 20."""
    for index, (name, size) in enumerate(SIZES.items()):
        ids = np.random.default_rng(index).choice([0, 15, 20], size[::-1]).astype(np.uint8)
        write_label_png(tmp_path / "masks" / f"{name}.png", ids)
    return tmp_path / "masks"


def unpacked(path: Path, folder: Path) -> dict[str, Image.Image]:
    """Every member, as a server would read it."""
    with tarfile.open(path) as archive:
        assert all(member.isfile() for member in archive.getmembers())
        archive.extractall(folder)
    found = {str(file.relative_to(folder)): Image.open(file) for file in folder.rglob("*") if file.is_file()}
    for image in found.values():
        image.load()
    return found


def test_from_a_checkpoint(voc, tmp_path, monkeypatch, capsys, one_thread):
    checkpoint = tiny.save_checkpoint(tmp_path / "tiny.safetensors")
    monkeypatch.chdir(tmp_path)
    arguments = ["--root", "VOC2012", "--output", "new/more.tgz", "--map", "lam", "--crf", "evaluate.flip=false"]
    tool.main([str(checkpoint), "--device", "cpu", *arguments])
    said = capsys.readouterr().out
    assert "3 images, comp6, checked" in said and "has 1456 images, the split test has 3" in said
    found = unpacked(tmp_path / "new" / "more.tgz", tmp_path / "server")
    assert sorted(found) == [f"{FOLDER}/{name}.png" for name in SIZES]
    settings = ["evaluate.image_labels=predicted", "evaluate.crf=true", "evaluate.flip=false", "evaluate.maps=[lam]"]
    opened = open_checkpoint(str(checkpoint), settings)
    for name, size in SIZES.items():
        image = found[f"{FOLDER}/{name}.png"]
        assert image.mode == "P" and image.size == size
        assert image.getpalette()[45:48] == [192, 128, 128]   # person
        alone = predict(opened.method, normalize(read_rgb(voc / "JPEGImages" / f"{name}.jpg")), None,
                        evaluation_plan(opened.config))
        np.testing.assert_array_equal(np.asarray(image), alone.labels["lam", True])


def test_from_a_folder_with_equal_bytes(voc, masks, tmp_path):
    """The bytes depend on the ids alone: not on the time, the name, nor on how the PNGs were written."""
    arguments = ["--masks", str(masks), "--root", str(voc), "--output"]
    tool.main([*arguments, str(tmp_path / "one.tgz"), "--competition", "comp5"])
    found = unpacked(tmp_path / "one.tgz", tmp_path / "server")
    assert sorted(found) == [f"{FOLDER.replace('comp6', 'comp5')}/{name}.png" for name in SIZES]
    for name, image in found.items():
        np.testing.assert_array_equal(np.asarray(image), np.asarray(Image.open(masks / Path(name).name)))
    for path in masks.glob("*.png"):
        image = Image.open(path)
        image.putpalette([255, 255, 255] * 256)
        image.save(path, compress_level=0)
    tool.main([*arguments, str(tmp_path / "two.tgz"), "--competition", "comp5"])
    assert (tmp_path / "one.tgz").read_bytes() == (tmp_path / "two.tgz").read_bytes()


def missing(folder):
    (folder / "2008_000011.png").unlink()
    return r"2008_000011\.png is missing \(1 of 3 are\)"


def extra(folder):
    write_label_png(folder / "2007_000001.png", np.zeros((9, 9), np.uint8))
    return r"2007_000001\.png: the list has no such image"


def size(folder):
    write_label_png(folder / "2008_000011.png", np.zeros((33, 24), np.uint8))
    return r"2008_000011\.png: is 24x33, but its image is 33x24"


def grey(folder):
    Image.open(folder / "2008_000011.png").convert("L").point(lambda value: 0).save(folder / "2008_000011.png")
    return r"2008_000011\.png: PNG of mode L, the server takes palette PNGs"


def another_format(folder):
    Image.fromarray(np.zeros((24, 33), np.uint8)).save(folder / "2008_000011.png", "JPEG")
    return r"2008_000011\.png: a JPEG blurs the ids"


def ignored(folder):
    ids = np.array(Image.open(folder / "2008_000012.png"))
    ids[3, 4] = 255
    write_label_png(folder / "2008_000012.png", ids)
    return r"2008_000012\.png: holds id 255, the server takes 0\.\.20"


def out_of_range(folder):
    write_label_png(folder / "2008_000012.png", np.full((31, 20), 21, np.uint8))
    return r"2008_000012\.png: mask holds id 21"


def broken(folder):
    path = folder / "2008_000006.png"
    path.write_bytes(path.read_bytes()[:60])
    return r"2008_000006\.png: mask file cannot be read"


@pytest.mark.parametrize("spoil", [missing, extra, size, grey, another_format, ignored, out_of_range, broken])
def test_each_mistake_is_named(voc, masks, tmp_path, spoil):
    message = spoil(masks)
    with pytest.raises(UserError, match=message):
        tool.main(["--masks", str(masks), "--root", str(voc), "--output", str(tmp_path / "out.tgz")])
    assert not list(tmp_path.glob("out.tgz*"))


def test_an_archive_that_is_not_what_was_written(voc, masks, tmp_path):
    path = tmp_path / "one.tgz"
    tool.main(["--masks", str(masks), "--root", str(voc), "--output", str(path)])
    sizes = {f"{FOLDER}/{name}.png": size for name, size in SIZES.items()}
    check_archive(path, sizes)
    with pytest.raises(UserError, match="members are not those"):
        check_archive(path, dict(list(sizes.items())[:2]))
    with pytest.raises(UserError, match="came back other"):
        check_archive(path, {**sizes, f"{FOLDER}/2008_000006.png": (31, 20)})
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:2000]))
    with pytest.raises(UserError, match=r"one\.tgz: the archive cannot be read back"):
        check_archive(path, sizes)


def test_the_gpu_has_an_index(monkeypatch):
    """Threads are given their device by it: torch.cuda.set_device refuses a device without."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert pick_device("cuda").index == 0
    assert pick_device("cpu") == torch.device("cpu")


def test_other_mistakes(voc, masks, tmp_path):
    other = tiny.save_checkpoint(tmp_path / "tiny.safetensors")
    for arguments, message in (
        (["--masks", str(masks), "--output", "x.zip"], "takes a .tgz"),
        (["--output", "x.tgz"], "give CHECKPOINT, or --masks"),
        (["--masks", str(masks), "--output", "x.tgz", "--split", "trial"], "split 'trial' not found"),
        (["--masks", str(masks / "no"), "--output", "x.tgz"], "no such folder"),
        ([f"{other}.no", "--output", "x.tgz"], "no such checkpoint"),
    ):
        with pytest.raises(UserError, match=message):
            tool.main(["--root", str(voc), *arguments])

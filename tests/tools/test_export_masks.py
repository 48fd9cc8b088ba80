"""tools/export_masks.py: its files as a second stage reads them, the rule of the unsure pixels, several processes."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datasets.irn import irn_ids
from datasets.voc import CLASSES
from engine.checkpoints.opening import open_checkpoint
from engine.config import load_config
from engine.inference.batch import predict
from engine.inference.plan import evaluation_plan
from engine.inference.pseudo_masks import IRN_HIGH, IRN_LOW, MaskFormat, confident_ids, ids_of_alphas, save_irn
from tests import tiny
from tests.conftest import TINY_CLASSES
from tools import export_masks as tool
from utils.crf import dense_crf
from utils.errors import UserError
from utils.images import normalize, read_rgb

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.save_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny.safetensors")


def labels_of(root: Path) -> dict[str, list[int]]:
    """name -> ids of its image labels."""
    names = json.loads((root / "labels.json").read_text())
    return {name: [CLASSES.index(label) + 1 for label in present] for name, present in names.items()}


def files(folder: Path, ending: str) -> dict[str, int]:
    return {path.stem: path.stat().st_mtime_ns for path in folder.glob(f"*.{ending}")}


def colour(index: int) -> tuple[int, ...]:
    """The devkit's colour of an id, by its rule: bit 3k + c of the id is bit 7 - k of the channel c."""
    return tuple(sum(((index >> (3 * bit + channel)) & 1) << (7 - bit) for bit in range(3)) for channel in range(3))


def test_two_processes_write_what_others_read(checkpoint, tiny_voc, tmp_path, capsys):
    """PNGs of two processes, some train masks missing; the dictionaries of one; each made from the same maps."""
    for name in ("tiny_000", "tiny_005"):
        (tiny_voc / "SegmentationClassAug" / f"{name}.png").unlink()
    png, npy = tmp_path / "png", tmp_path / "npy"
    arguments = [str(checkpoint), f"data.root={tiny_voc}", "--map", "lam", "data.workers=0"]
    command = [sys.executable, "engine/launch.py", "tools/export_masks.py", "cpu", "2", "auto", *arguments]
    command += ["--output", str(png), "--format", "png", "--high", "0.6", "--low", "0.4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    tool.main([*arguments, "--output", str(npy), "--format", "npy", "evaluate.bkg=0.6"])

    labels, names = labels_of(tiny_voc), [f"tiny_{index:03d}" for index in range(8)]
    assert sorted(files(png, "png")) == sorted(files(npy, "npy")) == names
    for name in names:
        with Image.open(tiny_voc / "JPEGImages" / f"{name}.jpg") as image, Image.open(png / f"{name}.png") as mask:
            assert mask.mode == "P" and mask.size == image.size
            ids, palette, size = np.array(mask), mask.getpalette(), image.size
        assert set(np.unique(ids)) <= {0, 255, *labels[name]}
        for index in (0, *TINY_CLASSES, 20):
            assert tuple(palette[3 * index : 3 * index + 3]) == colour(index)
        content = np.load(npy / f"{name}.npy", allow_pickle=True).item()
        assert set(content) == {"keys", "cam", "high_res"}
        keys, high_res = content["keys"], content["high_res"]
        assert [key + 1 for key in keys.tolist()] == labels[name]
        assert high_res.dtype == np.float32 and high_res.shape == (len(keys), size[1], size[0])
        assert content["cam"].shape == (len(keys), -(-size[1] // 4), -(-size[0] // 4))
        assert high_res.min() >= 0 and high_res.max() <= 1
        padded = np.pad(keys + 1, (1, 0), mode="constant")   # as irn's readers do
        sure, possible = (padded[np.pad(high_res, ((1, 0), (0, 0), (0, 0)), constant_values=t).argmax(0)]
                          for t in (0.6, 0.4))
        expected = np.where(sure > 0, sure, np.where(possible == 0, 0, 255))
        np.testing.assert_array_equal(ids, expected)
        ids_again = padded[np.pad(high_res, ((1, 0), (0, 0), (0, 0)), constant_values=0.6).argmax(0)]
        np.testing.assert_array_equal(irn_ids(npy / f"{name}.npy", 0.6, 21, size[::-1]), ids_again)
    check_line(done.stdout, png, tiny_voc, names)
    assert "6 images, single scale (1), flip, no CRF, image labels given, background 0.6" in capsys.readouterr().out


def check_line(output: str, folder: Path, root: Path, names: list[str]) -> None:
    """The mIoU that was printed, against a loop over the pixels of the files."""
    hits, unions, true, unsure, all_pixels, images = {}, {}, set(), 0, 0, 0
    for name in names:
        path = root / "SegmentationClassAug" / f"{name}.png"
        if not path.exists():
            continue
        images += 1
        truth, ids = np.array(Image.open(path)), np.array(Image.open(folder / f"{name}.png"))
        for t, p in zip(truth.flat, ids.flat, strict=True):
            all_pixels += 1
            if p == 255:
                unsure += 1
                continue
            true.add(t)
            hits[t] = hits.get(t, 0) + (t == p)
            for i in {t, p}:
                unions[i] = unions.get(i, 0) + 1
    miou = 100 * np.mean([hits.get(i, 0) / unions[i] for i in true])
    [line] = [line for line in output.splitlines() if line.startswith("mIoU")]
    assert float(re.findall(r"mIoU +([\d.]+)", line)[0]) == pytest.approx(miou, abs=0.005)
    said = f"LAM: voc train_aug, {images} images, single scale (1), flip, no CRF, image labels given"
    assert said in line and f"{100 * unsure / all_pixels:.2f} % of the pixels unsure and left out" in line


def test_goes_on_and_needs_no_masks(checkpoint, tiny_voc, tmp_path, capsys):
    for path in (tiny_voc / "SegmentationClassAug").glob("*"):
        path.unlink()
    (tiny_voc / "SegmentationClassAug").rmdir()
    out = tmp_path / "out"
    arguments = [str(checkpoint), "--output", str(out), f"data.root={tiny_voc}", "data.workers=0"]
    tool.main([*arguments, "--split", "val", "--map", "cam"])
    assert "no masks there: mIoU not measured" in capsys.readouterr().out
    first = files(out, "png")
    (out / "tiny_009.png").unlink()
    tool.main([*arguments, "--split", "val", "--map", "cam"])
    again = files(out, "png")
    assert "1 written" in capsys.readouterr().out
    assert first.keys() == again.keys() and {name for name in first if first[name] != again[name]} == {"tiny_009"}
    with pytest.raises(UserError, match=r"made with high = 0\.7, not 0\.9; give another folder, or --overwrite"):
        tool.main([*arguments, "--split", "val", "--map", "cam", "--high", "0.9"])
    with pytest.raises(UserError, match=r"made with model = .*; give another folder, or --overwrite"):
        tool.main([*arguments, "--split", "val", "--map", "cam", "model.token_ratio=0.3"])
    # as an earlier version wrote it
    note = json.loads((out / "settings.json").read_text())
    del note["precision"], note["background_power"], note["alphas"]
    (out / "settings.json").write_text(json.dumps(note))
    tool.main([*arguments, "--split", "val", "--map", "cam"])
    labels = tiny_voc / "labels.json"
    labels.write_text(labels.read_text().replace("dog", "cat"))
    with pytest.raises(UserError, match=r"made with images = .*; give another folder, or --overwrite"):
        tool.main([*arguments, "--split", "val", "--map", "cam"])


@pytest.mark.parametrize("crf", [False, True])
def test_a_map_with_background_gives_the_ids_of_its_argmax(checkpoint, tiny_voc, tmp_path, capsys, one_thread, crf):
    out = tmp_path / "out"
    arguments = [str(checkpoint), "--output", str(out), f"data.root={tiny_voc}", "--split", "val", "--map", "seg"]
    tool.main([*arguments, *["--crf"] * crf, "--device", "cpu", "data.workers=0"])
    opened = open_checkpoint(str(checkpoint), ["evaluate.maps=[seg]", f"evaluate.crf={crf}".lower()])
    for name in (f"tiny_{index:03d}" for index in range(8, 12)):
        image = normalize(read_rgb(tiny_voc / "JPEGImages" / f"{name}.jpg"))
        alone = predict(opened.method, image, torch.zeros(len(CLASSES)), evaluation_plan(opened.config))
        np.testing.assert_array_equal(np.array(Image.open(out / f"{name}.png")), alone.labels["seg", crf])
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("mIoU")]
    assert "segmentation: voc val, 4 images" in line and "no image labels used" in line and "unsure" not in line


def by_alphas(maps, present, image, low, high, crf) -> np.ndarray:
    """The rule, pixel by pixel."""
    keys = present.nonzero().flatten().tolist()
    chosen = maps.numpy()[keys]
    says = []
    for alpha in (low, high):
        start = torch.from_numpy(np.stack([(1 - chosen.max(0)) ** np.float32(alpha), *chosen]))
        says.append(dense_crf(image, start, **crf).argmax(0).numpy())
    ids = np.full(image.shape[:2], 255, np.uint8)
    for y, x in np.ndindex(ids.shape):
        is_class, is_background = says[0][y, x] > 0, says[1][y, x] == 0
        if is_class != is_background:
            ids[y, x] = keys[says[0][y, x] - 1] + 1 if is_class else 0
    return ids


def test_the_rule_of_alphas():
    """Between LOW and HIGH neither says anything; with the two exchanged both do."""
    torch.manual_seed(0)
    maps = torch.nn.functional.interpolate(torch.rand(1, 5, 4, 5), (40, 50), mode="bilinear")[0]
    image = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8).repeat(10, 0).repeat(10, 1)
    present, crf = torch.tensor([True, False, True, True, False]), load_config(None).crf.settings()
    for low, high, unsure in ((0.5, 3.0, True), (3.0, 0.5, True), (1.2, 1.2, False)):
        ids = ids_of_alphas(maps, present, image, low, high, crf)
        np.testing.assert_array_equal(ids, by_alphas(maps, present, image, low, high, crf))
        assert len({0, 1, 3, 4} & {*ids.flat}) >= 3 and (255 in ids) == unsure
    assert not ids_of_alphas(maps, present & False, image, 1, 12, crf).any()


def test_masks_of_alphas(checkpoint, tiny_voc, tmp_path, capsys, one_thread):
    """What is there goes on with the same alphas alone; crf.background_power has no part in it."""
    labels, crf = labels_of(tiny_voc), ["crf.iterations=2", "crf.background_power=7"]
    where = [f"data.root={tiny_voc}", "--split", "val", "--map", "lam", "--device", "cpu", "data.workers=0", *crf]
    opened = open_checkpoint(str(checkpoint), ["evaluate.maps=[lam]", *crf])
    for given, low, high, more in ((["0.5", "4"], 0.5, 4.0, []), (["4"], 4.0, 4.0, ["--crf"])):
        out = tmp_path / "_".join(given)
        arguments = [str(checkpoint), "--output", str(out), *where, *more, "--alphas"]
        tool.main([*arguments, *given])
        said = f", CRF, .*, alphas {' and '.join(given)}, .* % of the pixels unsure"
        [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("mIoU")]
        assert re.search(said, line) and "power" not in line
        for name in (f"tiny_{index:03d}" for index in range(8, 12)):
            image, given_labels = read_rgb(tiny_voc / "JPEGImages" / f"{name}.jpg"), torch.zeros(len(CLASSES))
            given_labels[[index - 1 for index in labels[name]]] = 1
            alone = predict(opened.method, normalize(image), given_labels, evaluation_plan(opened.config))
            rule = alone.maps["lam"], alone.present, image, low, high, opened.config.crf.settings()
            np.testing.assert_array_equal(np.array(Image.open(out / f"{name}.png")), by_alphas(*rule))
        tool.main([*arguments, *given])
        assert "0 written" in capsys.readouterr().out
        for other in ([*arguments, "1", "4"], arguments[:-1]):
            with pytest.raises(UserError, match=r"made with .* = .*; give another folder, or --overwrite"):
                tool.main(other)


def test_the_map_and_the_thresholds_are_the_methods(checkpoint, tiny_voc, tmp_path, capsys):
    for name, more, said in (
        ("lam", [], "LAM: voc val, 4 images"), ("cam", ["evaluate.maps=[cam]"], "CAM: voc val, 4 images")
    ):
        where = ["--output", str(tmp_path / name), f"data.root={tiny_voc}", "--split", "val", "data.workers=0"]
        tool.main([str(checkpoint), *where, *more, "pseudo_labels.high=0.8"])
        line = capsys.readouterr().out.splitlines()[-1]
        assert said in line and "high 0.8, low 0.25" in line


def test_files_of_others_stay(checkpoint, tiny_voc, tmp_path):
    arguments = [str(checkpoint), f"data.root={tiny_voc}", "data.workers=0", "--split", "val", "--map", "cam"]
    masks = tiny_voc / "SegmentationClassAug"
    before = {path.name: path.read_bytes() for path in masks.iterdir()}
    for overwrite in ([], ["--overwrite"]):
        with pytest.raises(UserError, match="SegmentationClassAug: holds the masks of the data set"):
            tool.main([*arguments, "--output", str(masks), *overwrite])
    assert before == {path.name: path.read_bytes() for path in masks.iterdir()}
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="out: holds files that are not of this tool; give another folder"):
        tool.main([*arguments, "--output", str(tmp_path / "out")])


def test_the_rule_of_unsure_pixels():
    """Against a loop over pixels, thresholds met exactly among them; one threshold leaves nothing unsure."""
    maps = torch.randint(0, 11, (4, 12, 13)) / 10
    present, image = torch.tensor([True, False, True, False]), np.zeros((12, 13, 3), np.uint8)
    for high, low in ((0.7, 0.3), (0.5, 0.5)):
        ids = confident_ids(maps, present, image, high, low)
        for y, x in np.ndindex(ids.shape):
            value, label = max((maps[k, y, x].item(), -k) for k in (0, 2))
            expected = 1 - label if value > np.float32(high) else 0 if value <= np.float32(low) else 255
            assert ids[y, x] == expected
        assert (255 in ids) == (high > low)
    assert not confident_ids(maps, torch.zeros(4, dtype=bool), image, 0.7, 0.3).any()


def test_irn_labels_as_irn_makes_them():
    """Against irn's recipe in pydensecrf's own terms: a CRF on either label map, joined where both agree."""
    densecrf = pytest.importorskip("pydensecrf.densecrf")
    from pydensecrf.utils import unary_from_labels

    torch.manual_seed(0)
    coarse = torch.rand(1, 5, 4, 5)
    maps = torch.nn.functional.interpolate(coarse, (40, 50), mode="bilinear")[0]
    image = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8).repeat(10, 0).repeat(10, 1)
    present = torch.tensor([True, False, True, True, False])
    rule = MaskFormat(load_config(None, ["crf.backend=pydensecrf"]), "cam", "irn-label", high=0.6, low=0.5)
    ids = confident_ids(maps, present, image, rule.high, rule.low, rule.crf)

    keys, cams = np.array([0, 1, 3, 4]), maps[present].numpy()
    found = []
    for value in (0.6, 0.5):
        labels = np.pad(cams, ((1, 0), (0, 0), (0, 0)), constant_values=value).argmax(0)
        crf = densecrf.DenseCRF2D(50, 40, 4)
        crf.setUnaryEnergy(unary_from_labels(labels, 4, gt_prob=0.7, zero_unsure=False))
        crf.addPairwiseGaussian(sxy=3, compat=3)
        crf.addPairwiseBilateral(sxy=50, srgb=5, rgbim=image.copy(), compat=10)
        found.append(keys[np.array(crf.inference(10)).argmax(0).reshape(40, 50)])
    expected = found[0].copy()
    expected[found[0] == 0] = 255
    expected[found[0] + found[1] == 0] = 0
    assert len(np.unique(expected)) == 5 and (expected != confident_ids(maps, present, image, 0.6, 0.5)).any()
    np.testing.assert_array_equal(ids, expected)
    assert (IRN_HIGH, IRN_LOW) == (0.30, 0.05)


def test_an_image_without_a_class(tmp_path):
    save_irn(tmp_path / "x.npy", torch.rand(0, 6, 9), torch.zeros(3, dtype=torch.bool))
    content = np.load(tmp_path / "x.npy", allow_pickle=True).item()
    assert len(content["keys"]) == 0 and content["cam"].shape == (0, 2, 3) and content["high_res"].shape == (0, 6, 9)
    np.testing.assert_array_equal(irn_ids(tmp_path / "x.npy", 0.5, 4, (6, 9)), np.zeros((6, 9)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--high", "0.2", "--low", "0.4"], r"high = 0\.2, low = 0\.4"),
        (["--format", "npy", "--high", "0.5"], "have no part in it"),
        (["--format", "npy", "evaluate.crf=true"], "have no part in it"),
        (["--map", "seg", "--low", "0.5"], "seg has a background of its own: format png alone, without high and low"),
        (["--map", "seg", "--format", "npy"], "seg has a background of its own"),
        (["--map", "seg", "--format", "irn-label"], "seg has a background of its own"),
        (["--alphas", "12", "1"], r"alphas 12 1: expected one above 0, or LOW and HIGH with LOW <= HIGH"),
        (["--alphas", "0"], "alphas 0: expected"),
        (["--alphas", "1", "2", "3"], "alphas 1 2 3: expected"),
        (["--alphas", "nan"], "alphas nan: expected"),
        (["--alphas", "1", "12", "--map", "seg"], "alphas are for .* the map is seg, the format png"),
        (["--alphas", "1", "12", "--low", "0.2"], "alphas are for format png, without high and low"),
        (["--alphas", "1", "--format", "npy"], "alphas are for .* the map is lam, the format npy"),
        (["--alphas", "1", "--format", "irn-label"], "alphas are for .* the map is lam, the format irn-label"),
        (["--map", "sag"], r"evaluate\.maps = \[sag\] .*: expected a list of one or more of cam, lam"),
        (["spilt=val"], "unknown key 'spilt'"),
        (["--split", "test"], "split 'test' not found"),
    ],
)
def test_mistakes(checkpoint, tiny_voc, tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        tool.main([str(checkpoint), "--output", str(tmp_path / "out"), f"data.root={tiny_voc}", *arguments])
    assert not (tmp_path / "out").exists()

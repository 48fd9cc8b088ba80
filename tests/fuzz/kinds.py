"""What is read of others' files: sound files of every kind, and how each kind is read and its answer checked."""

import io
import json
import math
import pickle
import re
import types
import zipfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import timm
import torch
from PIL import Image
from pycocotools.mask import encode
from safetensors.torch import save as safetensors_bytes

from datasets import build_image_set
from datasets.irn import irn_ids
from datasets.labels import load_labels
from datasets.prepare import coco, folder, voc
from datasets.prepare.preparation import Preparation
from datasets.prepare.sources import Blob, Source
from datasets.samples import Sample
from datasets.voc import CLASSES
from engine.checkpoints import files, release
from engine.checkpoints.opening import checkpoint_classes, checkpoint_config
from engine.checkpoints.start_weights import load_start_weights
from engine.config import CONFIGS, load_config, portable
from engine.distributed import Ranks
from engine.evaluation.results import append_results
from engine.inference.prediction_folder import claim_folder
from model import build_method
from model.more.official import official_shapes
from report.page import write_page
from report.run import read_config, read_run
from tests.datasets.prepare import devkit
from tests.datasets.prepare.test_coco import IDS, annotation, box, crowd
from tests.engine.fake_method import registered
from tests.report.test_report import make_run
from tests.tiny import SETTINGS
from utils.images import image_size, read_label_map, read_rgb
from utils.log import read_metrics
from utils.transfer import _read_note

ALONE = Ranks(0, 1, torch.device("cpu"))
IDENTITY = {"tool": "fuzz", "version": 1, "settings": {}, "sources": {}}
NAMES = ("a", "b")
COCO_NAME = "COCO_train2014_000000000009"


class Kind(NamedTuple):
    """seeds: sound files by their names; read: given the path of a wrong one, raises UserError or checks its answer;
    named: whether a refusal has to name the file or its folder."""

    seeds: dict[str, bytes]
    read: Callable[[Path], None]
    named: bool = True


def saved(image: Image.Image, form: str, **how) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **how)
    return file.getvalue()


def written(save: Callable, *things) -> bytes:
    """What save(file, thing) or save(thing, file) writes."""
    file = io.BytesIO()
    save(*[file if thing is None else thing for thing in things])
    return file.getvalue()


def read_image(path: Path) -> None:
    image = read_rgb(path)
    assert image.dtype == np.uint8 and image.shape == (*image_size(path), 3) and image.size


def read_mask(path: Path) -> None:
    if path.suffix == ".mat":
        image = path.with_name("a.jpg")
        path = io.BytesIO(voc.mask_bytes(Blob(path), Blob(image)))
    check_ids(path, 21)


def check_ids(file: Path | io.BytesIO, num_ids: int) -> None:
    ids = read_label_map(file, num_ids)
    assert ids.dtype == np.uint8 and ids.ndim == 2 and np.isin(ids, [*range(num_ids), 255]).all()


def read_labels(path: Path) -> None:
    source = path.parent if path.suffix == ".xml" else path
    samples = [Sample(name, path, None) for name in NAMES]
    labels_of = load_labels(str(source), path.parent, path.parent, samples, CLASSES)
    for labels in map(labels_of, samples):
        assert labels.dtype == torch.float32 and labels.shape == (20,) and set(labels.tolist()) <= {0, 1}


def read_split(path: Path) -> None:
    layout = "coco" if path.stem == "coco" else "voc"
    split = path.with_name("sound.txt") if path.stem == "classes" else path
    config = load_config(None, [f"data.root={path.parent}", f"data.name={layout}", "evaluate.image_labels=predicted"])
    data = build_image_set(config, str(split))
    assert data.names and not any("/" in name for name in data.names)
    assert not any(re.search(r"[\0-\x1f]", name) for name in (*data.names, *data.classes))


def read_table(path: Path) -> None:
    if path.stem == "ids":
        ids = folder.parse_ids(str(path))
        assert all(isinstance(k, int) and isinstance(name, str) for k, name in ids.items())
        return
    images = {name: path.parent / f"{name}.jpg" for name in NAMES}
    table, classes = folder.read_table(path, path.parent, images, None)
    assert set(table) == set(NAMES) and all(set(present) <= set(classes) for present in table.values())


def read_settings(path: Path) -> None:
    read_config(path, [])
    assert math.isfinite(load_config(path).train.lr)


def read_overrides(path: Path) -> None:
    items = path.read_bytes().decode(errors="surrogateescape").split("\n")
    assert math.isfinite(load_config("more_voc", items).train.lr)


@cache
def tiny_method() -> torch.nn.Module:
    return build_method(load_config("more_voc", SETTINGS), 20)


def read_weights(path: Path) -> None:
    meta, tensors = files.read_meta(path), files.read_tensors(path)
    assert isinstance(meta, dict) and isinstance(tensors, dict)
    if path.stem == "start":
        return load_start_weights(tiny_method(), types.SimpleNamespace(weights=str(path), backbone="tiny"))
    files.recognise(path)
    config, _ = checkpoint_config(str(path))
    assert all(isinstance(name, str) for name in checkpoint_classes(str(path), config))
    files.check_classes(path, CLASSES)
    files.load_weights(path, tiny_method())


def read_state(path: Path) -> None:
    state = files.newest_state(path.parent)
    assert state["iteration"] == 3
    files.load_optimizer(torch.optim.SGD([torch.nn.Parameter(torch.ones(2, 3))], momentum=0.9), state)


def read_run_folder(path: Path) -> None:
    """A report is made of whatever a run's folder holds."""
    run = path.parent if path.parent.name == "run" else path.parents[2]
    write_page([read_run(run)], run / "report.html")
    if path.name == "metrics.jsonl":
        assert all(isinstance(line, dict) for line in read_metrics(path))
    if path.name == "results.json":
        append_results(path, [{"map": "cam"}])
        assert json.loads(path.read_text())[-1] == {"map": "cam"}
        path.write_text(json.dumps(json.loads(path.read_text())[:-1]))
        release._results(run, "x.safetensors", None)


def read_irn(path: Path) -> None:
    ids = irn_ids(path, 0.5, 21, (12, 16))
    assert ids.dtype == np.uint8 and ids.ndim == 2 and ids.max(initial=0) <= 20


def read_instances(path: Path) -> None:
    for picture in coco.read_pictures(path):
        assert Path(picture.name).name == picture.name and picture.name.split() == [picture.name]
        check_ids(io.BytesIO(coco.mask_bytes(picture, None)), 81)


def read_archive(path: Path) -> None:
    source = Source(path, voc.VOC_INNER, voc.VOC_WANTED, path.parent)
    for name, blob in source.files.items():
        assert ".." not in name.split("/") and not name.startswith("/") and isinstance(blob.read(), bytes)


def read_prepared(path: Path) -> None:
    with Preparation(path.parent, IDENTITY) as work:
        work.complete(1)
        assert all(isinstance(name, str) for name in work.records)


def read_note(path: Path) -> None:
    if path.name == "settings.json":
        claim_folder(path.parent, {"kind": "cam", "precision": "fp32", "background_power": 1.0}, False, ALONE)
    else:
        assert _read_note(path.with_suffix(""), None) is None or path.exists()


def kinds(scratch: Path) -> dict[str, Kind]:
    """All kinds; `scratch` is a folder for what the sound files are made in."""
    rng, gen = np.random.default_rng(0), torch.Generator().manual_seed(0)
    photo = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    deep = Image.fromarray(rng.integers(0, 65536, (12, 16)).astype(np.uint16))
    exif, palette = Image.Exif(), devkit.voc_mask("2007_000032")[:12, :16]
    exif[0x0112], exif[0x010E] = 6, "a nut"
    jpg = saved(photo, "JPEG", exif=exif)
    images = {
        "a.jpg": jpg, "a.png": saved(photo, "PNG"), "deep.png": saved(deep, "PNG"), "a.tif": saved(photo, "TIFF"),
        "lzw.tif": saved(deep, "TIFF", compression="tiff_lzw"), "a.gif": saved(photo, "GIF"),
        "a.webp": saved(photo, "WEBP"), "a.bmp": saved(photo, "BMP"), "a.ppm": saved(photo, "PPM"),
        "a.jp2": saved(photo, "JPEG2000"), "palette.png": saved(photo.quantize(9), "PNG", transparency=0),
        "jpeg.tif": saved(photo, "TIFF", compression="jpeg"),
    }
    masks = {"a.png": devkit.png(palette), "grey.png": saved(Image.fromarray(palette), "PNG"),
             "deep.png": saved(Image.fromarray(palette.astype(np.uint16)), "PNG"),
             "a.mat": devkit.mat((palette % 255).T)}
    onehot = {name: np.eye(20, dtype=np.float32)[index] for index, name in enumerate(NAMES)}
    labels = {
        "a.json": json.dumps({"a": ["cat"], "b": ["dog", "cat"]}).encode(),
        "a.npy": written(np.save, None, np.array(onehot, object)), "two.npy": pickle.dumps(onehot, 2),
        "many.npy": written(np.save, None, {f"n{k}": np.ones(20, ">f8") for k in range(300)} | onehot),
        "a.xml": devkit.voc_annotation("2007_000032"),
    }
    tables = {"a.csv": b"image,class\na.jpg,cat;dog\nb.jpg,dog\n", "b.csv": b"image;cat;dog\na;1;0\nb;0;1\n",
              "a.json": labels["a.json"], "ids.json": b'{"0": "background", "7": "cat", "255": "ignore"}'}
    splits = {"voc.txt": b"a\nb\n", "paths.txt": b"/JPEGImages/a.jpg /SegmentationClassAug/a.png\n",
              "coco.txt": f"{COCO_NAME}\n".encode(), "classes.txt": b"nut\nbolt\nwing nut\n"}
    config = load_config("more_voc", SETTINGS)
    yaml = {"a.yaml": (CONFIGS / "more_coco.yaml").read_bytes(),
            "b.yaml": b"base: more_voc\nmodel: {backbone_args: {depth: 3, x: 'yes', y: '[1]'}}\ntrain:\n  lr: 1e-4\n"}
    overrides = "\n".join(item for item in SETTINGS if "\n" not in item).encode()
    method = tiny_method()
    own = {name: value.contiguous() for name, value in method.state_dict().items()}
    note = json.dumps({"method": "more", "classes": CLASSES, "settings": portable(config), "val": {"cam": 0.5}})
    start = timm.create_model("vit_tiny_patch16_224", **config.model.backbone_args).state_dict()
    official = {key: torch.randn(shape, generator=gen) for key, shape in
                official_shapes(method.network.state_dict()).items()}
    weights = {"own.safetensors": safetensors_bytes(own, {"meta": note}),
               "more.pth": written(torch.save, official, None),
               "start.pth": written(torch.save, {"model": start}, None),
               "legacy.pth": written(partial(torch.save, _use_new_zipfile_serialization=False), official, None)}
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2, 3))], momentum=0.9)
    optimizer.param_groups[0]["params"][0].sum().backward()
    optimizer.step()
    files.save_state(scratch, 3, torch.nn.Linear(2, 3), optimizer, {})
    state = {path.name: path.read_bytes() for path in sorted(scratch.glob("iter_*"))}
    with registered():
        run = make_run(scratch / "run", length=60)
    of_run = {str(path.relative_to(run.parent)): path.read_bytes() for path in sorted(run.rglob("*"))
              if path.suffix in (".json", ".jsonl", ".yaml", ".npz")}
    maps = rng.random((2, 12, 16)).astype(np.float32)
    irn = {"keys": torch.tensor([3, 7]), "cam": torch.from_numpy(maps[:, ::4, ::4].copy()), "high_res": maps}
    irns = {"a.npy": written(np.save, None, irn),
            "cam.npy": written(np.save, None, {"keys": np.array([3, 7]), "cam": maps[:, ::4, ::4]})}
    rle = encode(np.asfortranarray(np.eye(20, 30, dtype=np.uint8)))
    rle["counts"] = rle["counts"].decode()
    shapes = [annotation(1, 1, box(0, 0, 20, 10), 200), annotation(1, 18, box(5, 2, 4, 4), 16),
              annotation(1, 90, crowd(10, 5, 20, 15), 300, 1),
              annotation(1, 3, rle, 40)]
    instances = {"images": [{"id": 1, "file_name": f"{COCO_NAME}.jpg", "height": 20, "width": 30}],
                 "annotations": [{"id": k, **shape} for k, shape in enumerate(shapes, 1)],
                 "categories": [{"id": k, "name": name} for k, name in zip(IDS, coco.CLASSES, strict=True)]}
    held = {f"VOCdevkit/VOC2012/{name}": data for name, data in
            {"JPEGImages/a.jpg": jpg, "Annotations/a.xml": labels["a.xml"]}.items()}
    archives = {}
    for name, mode in (("a.tar", "w"), ("a.tgz", "w:gz")):
        archives[name] = devkit.write_tar(scratch / name, held, mode).read_bytes()
    with zipfile.ZipFile(scratch / "a.zip", "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in held.items():
            file.writestr(name, data)
    archives["a.zip"] = (scratch / "a.zip").read_bytes()
    record = {"files": {"a.jpg": {"size": len(jpg), "sha256": "0" * 64}}}
    prepared = {"manifest.json": json.dumps({**IDENTITY, **record}).encode(),
                ".preparing.jsonl": f'{json.dumps(IDENTITY)}\n["a.jpg", {len(jpg)}, "00"]\n'.encode()}
    notes = {"settings.json": b'{"kind": "cam", "precision": "fp32", "background_power": 1.0, "settings": null}',
             "a.part.json": b'{"url":"http://a","mark":null,"length":3}'}
    return {
        "image": Kind(images, read_image), "mask": Kind(masks, read_mask), "labels": Kind(labels, read_labels),
        "table": Kind(tables, read_table), "list": Kind(splits, read_split), "config": Kind(yaml, read_settings),
        "override": Kind({"items": overrides}, read_overrides, False), "weights": Kind(weights, read_weights),
        "state": Kind(state, read_state), "run": Kind(of_run, read_run_folder), "irn": Kind(irns, read_irn),
        "instances": Kind({"a.json": json.dumps(instances).encode()}, read_instances, False),
        "archive": Kind(archives, read_archive), "prepared": Kind(prepared, read_prepared),
        "note": Kind(notes, read_note),
    }

"""A small PASCAL VOC devkit and SBD, as their archives hold them."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

from utils.images import voc_palette

CLASSES = {1: "aeroplane", 8: "cat", 12: "dog", 15: "person"}
TRAIN, VAL, TEST = ["2007_000032", "2007_000039"], ["2007_000033", "2007_000042"], ["2008_000006"]
SBD_TRAIN = ["2008_000008", "2007_000032", "2008_000002"]   # one is VOC's train too
SBD_VAL = ["2008_000003", "2007_000033"]                    # one is VOC's val
TRAIN_AUG = ["2007_000032", "2007_000039", "2008_000002", "2008_000003", "2008_000008"]
LABELLED = sorted({*TRAIN, *VAL, *SBD_TRAIN, *SBD_VAL})

ANNOTATION = """<annotation><folder>VOC2012</folder><filename>{name}.jpg</filename>
<size><width>{width}</width><height>{height}</height><depth>3</depth></size>{objects}</annotation>"""
OBJECT = "<object><name>{name}</name><difficult>{difficult}</difficult>{part}</object>"
PART = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"


def size_of(name: str) -> tuple[int, int]:
    """(height, width), another for every image."""
    return 20 + int(name[-2:]) % 7, 30


def voc_mask(name: str) -> np.ndarray:
    """A cat or an aeroplane with a border of 255, ids (H, W)."""
    mask = np.zeros(size_of(name), np.uint8)
    mask[3:15, 5:20] = 255
    mask[4:14, 6:19] = 8 if int(name[-1]) % 2 else 1
    return mask


def sbd_mask(name: str) -> np.ndarray:
    """A dog, without border."""
    mask = np.zeros(size_of(name), np.uint8)
    mask[2:10, 3:12] = 12
    return mask


def labels_of(name: str) -> list[str]:
    """What voc_annotation says; the person of every third image is difficult, and in no mask."""
    mask = voc_mask(name) if name in (*TRAIN, *VAL) else sbd_mask(name)
    present = sorted(set(np.unique(mask)) - {0, 255})
    return [CLASSES[k] for k in present] + (["person"] if int(name[-1]) % 3 == 0 else [])


def voc_annotation(name: str) -> bytes:
    height, width = size_of(name)
    objects = [OBJECT.format(name=label, difficult=int(label == "person"), part=PART if label == "person" else "")
               for label in reversed(labels_of(name))]
    return ANNOTATION.format(name=name, width=width, height=height, objects="".join(objects * 2)).encode()


def jpeg(name: str) -> bytes:
    file = io.BytesIO()
    rng = np.random.default_rng(int(name[-3:]))
    Image.fromarray(rng.integers(0, 255, (*size_of(name), 3), dtype=np.uint8)).save(file, "JPEG")
    return file.getvalue()


def png(mask: np.ndarray) -> bytes:
    image, file = Image.fromarray(mask), io.BytesIO()
    image.putpalette(voc_palette().tobytes())
    image.save(file, "PNG")
    return file.getvalue()


def mat(mask: np.ndarray) -> bytes:
    """In SBD's layout: the struct GTcls of Boundaries, Segmentation and CategoriesPresent."""
    file = io.BytesIO()
    boundaries = np.empty((20, 1), object)
    boundaries[:] = [[np.zeros((2, 2))]] * 20
    present = np.setdiff1d(mask, [0]).reshape(-1, 1)
    savemat(file, {"GTcls": {"Boundaries": boundaries, "Segmentation": mask, "CategoriesPresent": present}})
    return file.getvalue()


def lines(names: list[str]) -> bytes:
    return "".join(f"{name}\n" for name in names).encode()


def trainval_files() -> dict[str, bytes]:
    """Of VOCtrainval_11-May-2012.tar, by their name in the archive."""
    root, lists = "VOCdevkit/VOC2012", "VOCdevkit/VOC2012/ImageSets/Segmentation"
    files = {f"{lists}/{split}.txt": lines(names) for split, names in {"train": TRAIN, "val": VAL}.items()}
    files[f"{lists}/trainval.txt"] = lines(sorted(TRAIN + VAL))
    files["VOCdevkit/VOC2012/ImageSets/Main/cat_train.txt"] = b"2007_000032 -1\n"
    for name in LABELLED:
        files[f"{root}/JPEGImages/{name}.jpg"] = jpeg(name)
        files[f"{root}/Annotations/{name}.xml"] = voc_annotation(name)
    files |= {f"{root}/SegmentationClass/{name}.png": png(voc_mask(name)) for name in TRAIN + VAL}
    return files


def test_files() -> dict[str, bytes]:
    root = "VOCdevkit/VOC2012"
    files = {f"{root}/JPEGImages/{name}.jpg": jpeg(name) for name in TEST}
    return {**files, f"{root}/ImageSets/Segmentation/test.txt": lines(TEST)}


def sbd_files() -> dict[str, bytes]:
    root = "benchmark_RELEASE/dataset"
    files = {f"{root}/cls/{name}.mat": mat(sbd_mask(name)) for name in SBD_TRAIN + SBD_VAL}
    return {**files, f"{root}/train.txt": lines(SBD_TRAIN), f"{root}/val.txt": lines(SBD_VAL)}


def aug_files() -> dict[str, bytes]:
    """Of SegmentationClassAug.zip: grey PNGs of all labelled images, VOC's own among them."""
    masks = {name: voc_mask(name) if name in TRAIN + VAL else sbd_mask(name) for name in LABELLED}
    files = {}
    for name, mask in masks.items():
        file = io.BytesIO()
        Image.fromarray(mask).save(file, "PNG")
        files[f"SegmentationClassAug/{name}.png"] = file.getvalue()
    return {**files, "__MACOSX/SegmentationClassAug/._2007_000032.png": b"no image"}


def write_tar(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root

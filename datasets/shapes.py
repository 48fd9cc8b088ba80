"""Generated images: six classes of shape and texture on cluttered backgrounds, with exact masks, in the VOC layout.

Colours are random everywhere, so a class is told by its outline and its texture alone. As on photographs, a texture is
weaker than the border of its object: every object stands out from what lies around it. One image depends on
(seed, split, index) and nothing else.
"""

import fcntl
import json
import math
import os
from pathlib import Path

import cv2
import numpy as np

from datasets.voc import list_folders, read_samples
from utils.errors import UserError
from utils.files import naming
from utils.images import write_label_png

__all__ = ["CLASSES", "draw", "generate", "list_folders", "read_samples"]

CLASSES = ("disc", "square", "triangle", "star", "cross", "ring")
VERSION = 2  # of the drawing code: raise it when images change
SPLITS = ("train", "val")

_MANIFEST, _MARKER = "shapes.json", ".generating"
_JPEG = [
    *(cv2.IMWRITE_JPEG_QUALITY, 95),
    *(cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444),  # textures keep their colours
]
_FINE = 4  # outlines are drawn so much finer, then averaged
_COUNTS = (0.3, 0.35, 0.2, 0.15)  # probability of 1, 2, 3, 4 objects
_MAX_HIDDEN = 0.35  # largest share of an object that later ones may cover
_STANDS_OUT = 0.35  # RGB distance of an object's colour from 9 in 10 pixels around it
_TEXTURE = 0.10  # largest difference of a texture from the object's colour, a channel


def generate(root: Path, seed: int, train: int, val: int, size: int) -> None:
    """Write `train` + `val` images of size x size pixels under root; a finished data set is left as it is.

    Writes JPEGImages, SegmentationClass, ImageSets/Segmentation/{train,val}.txt, labels.json and, last, the manifest
    shapes.json. Without the manifest an earlier call was interrupted, and all is written again. Processes that call
    it at the same time wait for the first.
    Raises UserError for senseless sizes, and where root holds something else or shapes of other settings.
    """
    if min(train, val) < 1 or size < 32 or seed < 0:
        given = f"seed={seed}, train={train}, val={val}, size={size}"
        raise UserError(f"data.shapes: {given}; need seed >= 0, an image in each split, size >= 32")
    settings = {"version": VERSION, "seed": seed, "train": train, "val": val, "size": size}
    if _finished(root, settings):
        return
    root.mkdir(parents=True, exist_ok=True)
    foreign = next((path for path in root.iterdir() if path.name != _MARKER), None)
    if foreign is not None and not (root / _MARKER).exists() and not _finished(root, settings):
        raise UserError(f"{root}: holds {foreign.name}, which is no generated data set; name an empty folder")
    with open(root / _MARKER, "w") as marker:
        fcntl.flock(marker, fcntl.LOCK_EX)
        if not _finished(root, settings):
            with naming(root):
                _write(root, settings)
    (root / _MARKER).unlink(missing_ok=True)


def draw(seed: int, split: str, index: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """One picture: RGB uint8 (size, size, 3) and its label map uint8 (size, size), ids 0..6."""
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    image = _background(rng, size)
    label_map = np.zeros((size, size), np.uint8)
    owner = np.full((size, size), -1)  # which object a pixel shows
    areas: list[int] = []
    for number in range(1 + rng.choice(4, p=_COUNTS)):
        kind = int(rng.integers(len(CLASSES)))
        for _ in range(12):  # places tried before the object is given up
            place = _place(rng, size)
            alpha = _outline(kind, place, size)
            inside = alpha >= 0.5
            hidden = np.bincount(owner[inside & (owner >= 0)], minlength=number)
            shown = np.bincount(owner[owner >= 0], minlength=number)
            if all(shown[i] - hidden[i] >= (1 - _MAX_HIDDEN) * areas[i] for i in range(len(areas))):
                break
        else:
            continue
        image = _paint(rng, image, kind, place, alpha)
        label_map[inside], owner[inside] = kind + 1, len(areas)
        areas.append(int(inside.sum()))
    grain = 0.012 * rng.standard_normal((size, size, 1), np.float32)
    return ((image + grain).clip(0, 1) * 255).round().astype(np.uint8), label_map


def _finished(root: Path, settings: dict) -> bool:
    """Whether root holds the data set of these settings. Raises UserError when it holds one of others."""
    try:
        found = json.loads((root / _MANIFEST).read_text())["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    if found != settings:
        raise UserError(f"{root}: holds shapes of {found}, but {settings} are asked for; name another data.root")
    return True


def _write(root: Path, settings: dict) -> None:
    images, masks, lists = root / "JPEGImages", root / "SegmentationClass", root / "ImageSets" / "Segmentation"
    for folder in (images, masks, lists):
        folder.mkdir(parents=True, exist_ok=True)
    labels = {}
    for split in SPLITS:
        names = [f"{split}_{index:06d}" for index in range(settings[split])]
        for index, name in enumerate(names):
            image, label_map = draw(settings["seed"], split, index, settings["size"])
            if not cv2.imwrite(str(images / f"{name}.jpg"), image[..., ::-1], _JPEG):
                raise UserError(f"{images}: cannot write {name}.jpg; is the disk full or read-only?")
            write_label_png(masks / f"{name}.png", label_map)
            labels[name] = [CLASSES[i - 1] for i in np.unique(label_map) if i]
        (lists / f"{split}.txt").write_text("\n".join(names) + "\n")
    (root / "labels.json").write_text(json.dumps(labels, indent=0) + "\n")
    unfinished = root / f"{_MANIFEST}.part"
    unfinished.write_text(json.dumps({"settings": settings, "classes": CLASSES}, indent=2) + "\n")
    os.replace(unfinished, root / _MANIFEST)


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
    """Gradient, soft noise, blobs and curves that belong to no class: float (size, size, 3) in [0, 1]."""
    ys, xs = np.mgrid[0:size, 0:size].astype(np.float32) / size
    angle = rng.uniform(0, 2 * np.pi)
    slope = ((xs - 0.5) * math.cos(angle) + (ys - 0.5) * math.sin(angle) + 0.7) / 1.4
    image = _colour(rng) * (1 - slope[..., None]) + _colour(rng) * slope[..., None]
    for cells, strength in ((4, 0.10), (12, 0.05), (size // 3, 0.03)):
        image = image + strength * _noise(rng, size, cells, 3)
    for _ in range(rng.integers(1, 4)):
        field = _noise(rng, size, int(rng.integers(3, 6)), 1)
        blob = 1 / (1 + np.exp((-25 * (field - rng.uniform(0.5, 0.9))).clip(-50, 50)))
        image += rng.uniform(0.4, 0.8) * blob * (_colour(rng) - image)
    canvas = np.ascontiguousarray(image, dtype=np.float32)
    for _ in range(rng.integers(2, 7)):
        ends = rng.uniform(-0.2, 1.2, (4, 2)) * size
        t = np.linspace(0, 1, 24)[:, None]
        curve = (1 - t) ** 3 * ends[0] + 3 * t * (1 - t) ** 2 * ends[1] + 3 * t**2 * (1 - t) * ends[2] + t**3 * ends[3]
        width = max(1, round(rng.uniform(0.006, 0.03) * size))
        points = (curve * 16).round().astype(np.int32)
        cv2.polylines(canvas, [points], False, _colour(rng).tolist(), width, cv2.LINE_AA, shift=4)
    return canvas.clip(0, 1)


def _colour(rng: np.random.Generator) -> np.ndarray:
    """A random RGB colour in [0, 1]."""
    hsv = np.array([[[rng.uniform(0, 360), rng.uniform(0.15, 0.85), rng.uniform(0.25, 0.95)]]], np.float32)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0, 0]


def _colour_apart(rng: np.random.Generator, others: np.ndarray) -> np.ndarray:
    """The first of 20 random colours that is _STANDS_OUT away from 9 in 10 of `others` (n, 3), else the farthest."""
    best, farthest = None, -1.0
    for _ in range(20):
        colour = _colour(rng)
        distance = np.quantile(np.linalg.norm(others - colour, axis=1), 0.1)
        if distance > farthest:
            best, farthest = colour, distance
        if distance >= _STANDS_OUT:
            break
    return best


def _noise(rng: np.random.Generator, size: int, cells: int, channels: int) -> np.ndarray:
    """Smooth noise (size, size, channels) of standard deviation about 1: `cells` random values a side, enlarged."""
    coarse = rng.standard_normal((cells, cells, channels), np.float32)
    return cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC).reshape(size, size, channels)


def _place(rng: np.random.Generator, size: int) -> dict:
    """Where an object lies: radius 0.15..0.27 of the side, centre, rotation, stretch."""
    radius = size * rng.uniform(0.15, 0.27)
    margin = 0.75 * radius
    centre = rng.uniform(margin, size - margin, 2)
    return {"radius": radius, "centre": centre, "angle": rng.uniform(0, 2 * np.pi), "stretch": rng.uniform(0.87, 1.15)}


def _polygon(radii: np.ndarray, start: float = 0.0) -> np.ndarray:
    """Points at these distances from the centre, evenly spaced in angle: (n, 2)."""
    angles = start + np.arange(len(radii)) * 2 * np.pi / len(radii)
    return radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], -1)


_CORNER = 1.08 * np.array([(1, 0.36), (0.36, 0.36), (0.36, 1)])  # a quarter of the cross
_CROSS = np.concatenate([_CORNER @ np.array([[c, s], [-s, c]]) for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1))])
_OUTLINES = (  # of the classes, in their order, for radius 1; a second polygon is a hole
    (_polygon(np.ones(64)),),
    (_polygon(np.full(4, 1.15), np.pi / 4),),
    (_polygon(np.full(3, 1.2)),),
    (_polygon(np.tile([1.25, 0.52], 5)),),
    (_CROSS,),
    (_polygon(np.full(64, 1.08)), _polygon(np.full(64, 0.5))),
)


def _outline(kind: int, place: dict, size: int) -> np.ndarray:
    """Share of every pixel that the object covers: float (size, size) in [0, 1]."""
    cos, sin = np.cos(place["angle"]), np.sin(place["angle"])
    turn = np.array([[cos, sin], [-sin, cos]])
    scale = place["radius"] * np.array([place["stretch"], 1 / place["stretch"]])
    # pixel (i, j) covers [i, i + 1): its fine centres lie half a fine pixel inside
    polygons = [(points * scale) @ turn + place["centre"] for points in _OUTLINES[kind]]
    fixed = [((points * _FINE - 0.5) * 256).round().astype(np.int32) for points in polygons]
    fine = np.zeros((size * _FINE, size * _FINE), np.uint8)
    cv2.fillPoly(fine, fixed, 255, shift=8)
    return cv2.resize(fine, (size, size), interpolation=cv2.INTER_AREA) / np.float32(255)


def _texture(kind: int, u: np.ndarray, v: np.ndarray, radius: float, period: float, phase: float) -> np.ndarray:
    """The class's texture at object coordinates u, v (pixels from its centre): positive on one tone."""
    a, b = 2 * np.pi * u / period + phase, 2 * np.pi * v / period + phase
    if CLASSES[kind] == "disc":  # concentric circles
        return np.sin(2 * np.pi * np.hypot(u, v) / period + phase)
    if CLASSES[kind] == "square":  # checks
        return 1.4 * np.sin(a / 1.5) * np.sin(b / 1.5)
    if CLASSES[kind] == "triangle":  # stripes
        return np.sin(a)
    if CLASSES[kind] == "star":  # dots
        return np.cos(a) + np.cos(b) - 0.7
    if CLASSES[kind] == "cross":  # mesh
        return np.maximum(np.cos(a / 1.2), np.cos(b / 1.2)) - 0.75
    return np.sin(round(2 * np.pi * 0.8 * radius / period) * np.arctan2(v, u) + phase)  # ring: spokes


def _paint(rng: np.random.Generator, image: np.ndarray, kind: int, place: dict, alpha: np.ndarray) -> np.ndarray:
    """The image with the object's shadow and textured surface on it."""
    size = len(alpha)
    ys, xs = np.mgrid[0:size, 0:size].astype(np.float32) + 0.5
    x, y = xs - float(place["centre"][0]), ys - float(place["centre"][1])
    cos, sin = math.cos(place["angle"]), math.sin(place["angle"])
    u, v = x * cos + y * sin, y * cos - x * sin
    period = max(4.5, size * rng.uniform(0.06, 0.085))
    pattern = _texture(kind, u, v, place["radius"], period, rng.uniform(0, 2 * np.pi))
    offset = size * 0.02
    moved = cv2.warpAffine(alpha, np.array([[1, 0, offset], [0, 1, offset]]), (size, size))
    shadow = 0.4 * cv2.GaussianBlur(moved, (0, 0), size * 0.018)[..., None]
    image = image * (1 - shadow)
    around = (cv2.dilate(alpha, np.ones((5, 5), np.uint8)) > 0) & (alpha == 0)
    tint = _TEXTURE * rng.choice((-1, 1)) * rng.uniform(0.6, 1, 3)
    surface = _colour_apart(rng, image[around]) + tint * np.tanh(2.5 * pattern)[..., None]
    surface = surface + 0.03 * _noise(rng, size, 4, 3)
    surface = surface * (1 - 0.12 * ((x + y) / (2 * place["radius"])).clip(-1, 1))[..., None]  # light from above left
    return image * (1 - alpha[..., None]) + surface * alpha[..., None]

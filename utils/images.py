"""Images and label maps: read, write, normalise, draw.

Ids in a label map: 0 background, 1..K classes, 255 ignore.
"""

import functools
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image

from utils.errors import UserError
from utils.files import replacing

MEAN = (0.485, 0.456, 0.406)  # ImageNet, RGB in 0..1
STD = (0.229, 0.224, 0.225)
IGNORE = 255

ORIENTATION = 0x0112   # of EXIF; how Image.transpose undoes each
TURNS = dict(enumerate(map(Image.Transpose, (0, 3, 1, 5, 4, 6, 2)), 2))

# of what datasets/files.py looks for by its ending; PIL would hand PostScript to another program, for instance
FORMATS = ("JPEG", "PNG", "BMP", "DIB", "WEBP", "TIFF", "GIF", "PPM", "JPEG2000")

warnings.filterwarnings("ignore", module=r"PIL\.")   # of odd metadata: what cannot be read is refused all the same


def read_rgb(path: str | Path) -> np.ndarray:
    """Image file as RGB uint8 (H, W, 3): greyscale, CMYK, palette, alpha and EXIF rotation are resolved.

    Alpha is dropped, and EXIF that cannot be read. Of several pictures in a file the first counts.
    Raises UserError when the file is missing, truncated, no image, or of values without a known range.
    """
    with _opened(path, "image") as image:
        image = _upright(image)
        if image.mode == "F" or image.mode.startswith("I"):   # PIL's own conversion would clip at 255
            values = np.asarray(image)
            low, high = values.min(), values.max()
            if image.mode == "F" or low < 0 or high > 65535 or 0 < high < 256:
                raise UserError(f"{path}: mode {image.mode}, {low:g}..{high:g}: not of 16 bits (0..65535); write 8")
            image = Image.fromarray((values.astype(np.int64) >> 8).astype(np.uint8))
        elif image.mode == "P":
            image = image.convert("RGBA")  # resolves a transparent palette entry without a warning
        return np.array(image.convert("RGB"))


def image_size(path: str | Path) -> tuple[int, int]:
    """(height, width) of an image file as it is shown; only a TIFF is decoded for it. Raises UserError."""
    with _opened(path, "image") as image:
        if image.format == "TIFF":
            image.load()   # turns it, and then says so no more
        width, height = image.size
        return (width, height) if _orientation(image) in (5, 6, 7, 8) else (height, width)


def read_ids(path: str | Path) -> np.ndarray:
    """Mask file as integers (H, W): palette indices, grey values of any depth, or RGB in the colours of `voc_palette`.

    Raises UserError when the file is missing, broken or a JPEG, or holds another colour.
    """
    with _opened(path, "mask") as image:
        if image.format in ("JPEG", "MPO"):
            raise UserError(f"{path}: a JPEG blurs the ids of a mask; use palette or greyscale PNG")
        image = _upright(image)
        if image.mode in ("RGB", "RGBA"):
            return _ids_of_colours(np.asarray(image.convert("RGB")), path)
        if image.mode in ("P", "L", "1", "LA", "PA") or image.mode.startswith("I"):
            return np.asarray(image.getchannel(0) if image.mode in ("LA", "PA") else image)
        raise UserError(f"{path}: a mask of mode {image.mode} cannot be read; use palette or greyscale PNG")


def read_label_map(path: str | Path, num_ids: int) -> np.ndarray:
    """The ids of `read_ids`, uint8 (H, W). num_ids: K + 1; every id is < num_ids or 255. Raises UserError."""
    return known_ids(read_ids(path), num_ids, path)


def known_ids(ids: np.ndarray, num_ids: int, path: str | Path) -> np.ndarray:
    """`ids` as uint8 (H, W). Raises UserError, naming the file, where one is neither < num_ids nor 255."""
    present = np.unique(ids)
    bad = present[(present >= num_ids) & (present != IGNORE) | (present < 0)]
    if bad.size:
        raise UserError(
            f"{path}: mask holds id {bad[0]}, but ids are 0..{num_ids - 1} ({num_ids - 1} classes) and 255 (ignore)"
        )
    return ids.astype(np.uint8)


def check_same_size(
    size: tuple[int, ...], path: str | Path, label_map: np.ndarray, label_path: str | Path, what: str = "image"
) -> None:
    """Raises UserError, naming both files, unless label_map (H, W) has the size (H, W) of its `what`, the file path."""
    if size != label_map.shape:
        (h, w), (mask_h, mask_w) = size, label_map.shape
        raise UserError(f"{label_path} is {mask_w}x{mask_h}, but its {what} {path} is {w}x{h}: sizes must agree")


def normalize(image: np.ndarray) -> torch.Tensor:
    """RGB 0..255 (H, W, 3), uint8 or float32 -> float32 (3, H, W), (x / 255 - MEAN) / STD."""
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(255)
    return tensor.sub_(_column(MEAN, tensor)).div_(_column(STD, tensor)).contiguous()


def denormalize(images: torch.Tensor) -> torch.Tensor:
    """Normalised (..., 3, H, W) -> float 0..255, neither rounded nor truncated.

    x * (255 std) + 255 mean, as released: PAR truncates it, and in another order more grey values become one less.
    """
    return images * _column(STD, images, 255) + _column(MEAN, images, 255)


def to_bytes(images: torch.Tensor) -> torch.Tensor:
    """Normalised (..., 3, H, W) -> RGB uint8 (..., H, W, 3); gives back the file's values exactly."""
    return denormalize(images).round().clamp(0, 255).byte().movedim(-3, -1)


def to_uint8(image: torch.Tensor) -> np.ndarray:
    """`to_bytes` as an array."""
    return to_bytes(image).cpu().numpy()


def voc_palette() -> np.ndarray:
    """The VOC colour of every id, uint8 (256, 3): bit k of each channel's byte comes from bit 3k.. of the id."""
    palette = np.zeros((256, 3), np.uint8)
    ids = np.arange(256)
    for bit in range(8):
        for channel in range(3):
            palette[:, channel] |= (((ids >> (3 * bit + channel)) & 1) << (7 - bit)).astype(np.uint8)
    return palette


def label_image(label_map: np.ndarray) -> Image.Image:
    """Ids uint8 (H, W) as a palette image in the VOC colours."""
    image = Image.fromarray(np.ascontiguousarray(label_map, dtype=np.uint8))
    image.putpalette(voc_palette().tobytes())
    return image


def label_png(label_map: np.ndarray) -> bytes:
    """The file of `label_image`."""
    file = io.BytesIO()
    label_image(label_map).save(file, "PNG")
    return file.getvalue()


def write_label_png(path: str | Path, label_map: np.ndarray) -> None:
    """Write ids uint8 (H, W) as a palette PNG in the VOC colours; makes the folder."""
    with replacing(path, durable=False) as part:
        part.write_bytes(label_png(label_map))


def colorize(label_map: np.ndarray) -> np.ndarray:
    """Ids (H, W) -> their VOC colours, RGB uint8 (H, W, 3)."""
    return voc_palette()[label_map]


def overlay(image: np.ndarray, label_map: np.ndarray, alpha: float = 0.55) -> np.ndarray:
    """Image uint8 (H, W, 3) with the labels (H, W) drawn over it by weight alpha; background stays untouched."""
    blended = (1 - alpha) * image + alpha * colorize(label_map)
    return np.where(label_map[..., None] == 0, image, blended.round()).astype(np.uint8)


def heatmap(values: np.ndarray, image: np.ndarray, alpha: float = 0.5) -> np.ndarray:
    """Map in [0, 1] (H, W) as colours (blue to red) over image uint8 (H, W, 3)."""
    levels = (np.nan_to_num(np.asarray(values, np.float32)).clip(0, 1) * 255).round().astype(np.uint8)
    colours = cv2.applyColorMap(levels, cv2.COLORMAP_JET)[..., ::-1]
    return ((1 - alpha) * image + alpha * colours).round().astype(np.uint8)


@contextmanager
def _opened(path: str | Path, what: str) -> Iterator[Image.Image]:
    """The PIL image, not decoded yet. What goes wrong with it in the block is a UserError that names the file."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            yield image
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: {what} file is missing") from None
    except Exception as error:   # a broken file makes PIL raise nearly anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: {what} file cannot be read ({reason}); is it truncated or no image?") from None


def _orientation(image: Image.Image) -> int | None:
    """What EXIF says of it; None where that is nothing, or cannot be read: the pixels are sound all the same."""
    try:
        return image.getexif().get(ORIENTATION)
    except Exception:
        return None


def _upright(image: Image.Image) -> Image.Image:
    """Decoded, and turned as EXIF says."""
    image.load()
    turn = TURNS.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _ids_of_colours(rgb: np.ndarray, path: str | Path) -> np.ndarray:
    """RGB uint8 (H, W, 3) in VOC colours -> ids (H, W)."""
    palette_codes = _codes(voc_palette())
    order = np.argsort(palette_codes)
    codes = _codes(rgb)
    ids = order[np.searchsorted(palette_codes[order], codes).clip(max=255)]
    wrong = palette_codes[ids] != codes
    if wrong.any():
        colour = tuple(int(value) for value in rgb[wrong][0])
        raise UserError(f"{path}: an RGB mask must use the VOC palette, but it holds the colour {colour}")
    return ids


def _codes(rgb: np.ndarray) -> np.ndarray:
    """Colours (..., 3) uint8 -> one integer a colour."""
    return (rgb.astype(np.int64) << np.array([16, 8, 0])).sum(-1)


def _column(values: tuple, like: torch.Tensor, times: int = 1) -> torch.Tensor:
    return _kept_column(tuple(value * times for value in values), like.dtype, like.device)


@functools.lru_cache(maxsize=16)
def _kept_column(values: tuple, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Kept, as every copy to a GPU waits for it."""
    return torch.tensor(values, dtype=dtype, device=device).view(3, 1, 1)

"""Images and label maps: read, write, normalise, draw.

Ids in a label map: 0 background, 1..K classes, 255 ignore.
"""

import functools
import io
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image, ImageOps

from utils.errors import UserError
from utils.files import replacing

MEAN = (0.485, 0.456, 0.406)  # ImageNet, RGB in 0..1
STD = (0.229, 0.224, 0.225)
IGNORE = 255

_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)  # what PIL raises


def read_rgb(path: str | Path) -> np.ndarray:
    """Image file as RGB uint8 (H, W, 3): greyscale, CMYK, palette, alpha and EXIF rotation are resolved.

    Alpha is dropped. Raises UserError when the file is missing, truncated or no image.
    """
    image = _open(path, "image")
    if image.mode.startswith("I"):  # 16-bit greyscale: PIL's own conversion would clip at 255
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    elif image.mode == "P":
        image = image.convert("RGBA")  # resolves a transparent palette entry without a warning
    return np.array(ImageOps.exif_transpose(image).convert("RGB"))


def read_label_map(path: str | Path, num_ids: int) -> np.ndarray:
    """Mask file as ids uint8 (H, W): palette indices, grey values, or RGB in the colours of `voc_palette`.

    num_ids: K + 1; every id is < num_ids or 255.
    Raises UserError when the file is missing or broken, or holds another id or colour.
    """
    image = _open(path, "mask")
    if image.mode in ("RGB", "RGBA"):
        ids = _ids_of_colours(np.asarray(image.convert("RGB")), path)
    elif image.mode == "LA":
        ids = np.asarray(image.getchannel("L"))
    elif image.mode in ("P", "L", "1") or image.mode.startswith("I"):
        ids = np.asarray(image)
    else:
        raise UserError(f"{path}: a mask of mode {image.mode} cannot be read; use palette or greyscale PNG")
    present = np.unique(ids)
    bad = present[(present >= num_ids) & (present != IGNORE) | (present < 0)]
    if bad.size:
        raise UserError(
            f"{path}: mask holds id {bad[0]}, but ids are 0..{num_ids - 1} ({num_ids - 1} classes) and 255 (ignore)"
        )
    return ids.astype(np.uint8)


def check_same_size(image: np.ndarray, image_path: str | Path, label_map: np.ndarray, label_path: str | Path) -> None:
    """Raises UserError, naming both files, unless image (H, W, 3) and label_map (H, W) have the same size."""
    if image.shape[:2] != label_map.shape:
        (h, w), (mask_h, mask_w) = image.shape[:2], label_map.shape
        raise UserError(f"{label_path} is {mask_w}x{mask_h}, but its image {image_path} is {w}x{h}: sizes must agree")


def normalize(image: np.ndarray) -> torch.Tensor:
    """RGB uint8 (H, W, 3) -> float32 (3, H, W), (u8 / 255 - MEAN) / STD."""
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(255)
    return tensor.sub_(_column(MEAN, tensor)).div_(_column(STD, tensor)).contiguous()


def denormalize(images: torch.Tensor) -> torch.Tensor:
    """Normalised (..., 3, H, W) -> float 0..255, neither rounded nor truncated.

    x * (255 std) + 255 mean, as released: PAR truncates it, and in another order more grey values become one less.
    """
    return images * _column(STD, images, 255) + _column(MEAN, images, 255)


def to_uint8(image: torch.Tensor) -> np.ndarray:
    """Normalised (3, H, W) -> RGB uint8 (H, W, 3); gives back the file's values exactly."""
    return denormalize(image).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()


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
    with replacing(path) as part:
        label_image(label_map).save(part, "PNG")


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


def _open(path: str | Path, what: str) -> Image.Image:
    """The decoded PIL image, or a UserError that names the file."""
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except FileNotFoundError:
        raise UserError(f"{path}: {what} file is missing") from None
    except _UNREADABLE as error:
        raise UserError(f"{path}: {what} file cannot be read ({error}); is it truncated or no image?") from None


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

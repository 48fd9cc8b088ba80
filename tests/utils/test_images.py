"""utils/images.py: every kind of file, every kind of bad file."""

import numpy as np
import pytest
import torch
from PIL import Image

from utils import images
from utils.errors import UserError


@pytest.fixture
def photo() -> np.ndarray:
    """A smooth picture (40, 60, 3), which JPEG keeps within a few levels."""
    ys, xs = np.mgrid[0:40, 0:60]
    return np.stack([xs * 4, ys * 6, 255 - xs * 2 - ys], -1).astype(np.uint8)


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return np.abs(a.astype(int) - b.astype(int)).mean()


def test_rgb_jpeg(tmp_path, photo):
    Image.fromarray(photo).save(tmp_path / "x.jpg", quality=95)
    read = images.read_rgb(tmp_path / "x.jpg")
    assert read.dtype == np.uint8 and read.shape == (40, 60, 3) and difference(read, photo) < 3


def test_greyscale_jpeg_has_three_equal_channels(tmp_path, photo):
    Image.fromarray(photo[..., 0]).save(tmp_path / "x.jpg", quality=95)
    read = images.read_rgb(tmp_path / "x.jpg")
    assert read.shape == (40, 60, 3) and (read == read[..., :1]).all() and difference(read[..., 0], photo[..., 0]) < 2


def test_cmyk_jpeg(tmp_path, photo):
    Image.fromarray(photo).convert("CMYK").save(tmp_path / "x.jpg", quality=95)
    assert Image.open(tmp_path / "x.jpg").mode == "CMYK"
    assert difference(images.read_rgb(tmp_path / "x.jpg"), photo) < 4


@pytest.mark.parametrize("mode", ["RGBA", "P", "LA", "1"])
def test_other_modes(tmp_path, photo, mode):
    Image.fromarray(photo).convert(mode).save(tmp_path / "x.png")
    assert images.read_rgb(tmp_path / "x.png").shape == (40, 60, 3)
    if mode == "RGBA":
        assert (images.read_rgb(tmp_path / "x.png") == photo).all()


def test_sixteen_bit_greyscale(tmp_path):
    values = (np.arange(256, dtype=np.uint16) * 256).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / "x.png")
    assert (images.read_rgb(tmp_path / "x.png")[..., 1] == np.arange(256).reshape(16, 16)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(tmp_path, photo, orientation):
    undo = {
        1: None, 2: Image.FLIP_LEFT_RIGHT, 3: Image.ROTATE_180, 4: Image.FLIP_TOP_BOTTOM,
        5: Image.TRANSPOSE, 6: Image.ROTATE_90, 7: Image.TRANSVERSE, 8: Image.ROTATE_270,
    }[orientation]  # fmt: skip
    stored = Image.fromarray(photo) if undo is None else Image.fromarray(photo).transpose(undo)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "x.jpg", exif=exif, quality=95)
    read = images.read_rgb(tmp_path / "x.jpg")
    assert read.shape == photo.shape and difference(read, photo) < 3


EXIF, TURNED = b"Exif\0\0II*\0\x08\0\0\0", b"\x12\1\3\0\1\0\0\0\6\0\0\0"   # header; an entry: orientation 6


@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
@pytest.mark.parametrize(("data", "turned"), [
    (EXIF + b"\2\0" + TURNED + b"\x1a\1\x0a\0\1\0\0\0\x26\0\0\0" + b"\0" * 4 + b"\xff" * 4 + b"\0" * 4, True),
    (EXIF + b"\1\0" + TURNED, True),
    (EXIF + b"\1\0" + TURNED.replace(b"\6", b"\x09"), False),
    (EXIF + b"\1\0\x12\1\5\0\1\0\0\0\x1a\0\0\0\0\0\0\0\6\0\0\0\0\0\0\0", False),
    (b"Exif\0\0" + bytes(range(99)), False),
], ids=["resolution -1 / 0", "cut", "orientation 9", "orientation 6 / 0", "garbage"])
def test_broken_exif_of_sound_pixels(tmp_path, photo, ending, data, turned):
    path = tmp_path / f"x.{ending}"
    Image.fromarray(photo).save(path, exif=data, quality=95)
    read = images.read_rgb(path)
    assert images.image_size(path) == read.shape[:2]
    assert difference(read, np.rot90(photo, -1) if turned else photo) < 3


def test_a_turned_tiff_has_the_size_it_is_read_at(tmp_path, photo):
    Image.fromarray(photo).save(tmp_path / "x.tif", tiffinfo={0x0112: 6})
    assert images.image_size(tmp_path / "x.tif") == images.read_rgb(tmp_path / "x.tif").shape[:2] == (60, 40)


@pytest.mark.parametrize(("dtype", "factor"), [(np.float32, 1), (np.float32, np.nan), (np.int32, -1), (np.uint16, 1)])
def test_values_of_no_known_range(tmp_path, photo, dtype, factor):
    """16 bits that hold 8 would be black."""
    Image.fromarray(photo[..., 0].astype(dtype) * factor).save(tmp_path / "x.tif")
    with pytest.raises(UserError, match=r"x\.tif: mode .* not of 16 bits"):
        images.read_rgb(tmp_path / "x.tif")


def test_missing_image(tmp_path):
    with pytest.raises(UserError, match=r"gone\.jpg.*missing"):
        images.read_rgb(tmp_path / "gone.jpg")


def test_truncated_image(tmp_path, photo):
    Image.fromarray(photo).save(tmp_path / "x.jpg")
    content = (tmp_path / "x.jpg").read_bytes()
    for length in (0, 20, len(content) // 2, len(content) - 60):
        (tmp_path / "cut.jpg").write_bytes(content[:length])
        with pytest.raises(UserError, match=r"cut\.jpg.*truncated"):
            images.read_rgb(tmp_path / "cut.jpg")


def test_palette_mask_is_read_as_ids(tmp_path):
    ids = np.array([[0, 1, 2], [20, 255, 3]], np.uint8)
    images.write_label_png(tmp_path / "deep" / "m.png", ids)
    assert Image.open(tmp_path / "deep" / "m.png").mode == "P"
    assert (images.read_label_map(tmp_path / "deep" / "m.png", 21) == ids).all()


def test_greyscale_mask(tmp_path):
    ids = np.array([[0, 1], [80, 255]], np.uint8)
    Image.fromarray(ids).save(tmp_path / "m.png")
    read = images.read_label_map(tmp_path / "m.png", 81)
    assert read.dtype == np.uint8 and (read == ids).all()


def test_rgb_mask_in_voc_colours(tmp_path):
    ids = np.array([[*range(21), 255]], np.uint8)
    Image.fromarray(images.colorize(ids)).save(tmp_path / "m.png")
    assert (images.read_label_map(tmp_path / "m.png", 21) == ids).all()


def test_rgb_mask_in_other_colours(tmp_path):
    Image.fromarray(np.full((2, 2, 3), (1, 2, 3), np.uint8)).save(tmp_path / "m.png")
    with pytest.raises(UserError, match=r"m\.png.*\(1, 2, 3\)"):
        images.read_label_map(tmp_path / "m.png", 21)


@pytest.mark.parametrize("wide", [False, True])
def test_mask_id_out_of_range(tmp_path, wide):
    ids = np.array([[0, 21]], np.uint16 if wide else np.uint8)
    Image.fromarray(ids).save(tmp_path / "m.png")
    with pytest.raises(UserError, match=r"m\.png.*id 21.*0\.\.20"):
        images.read_label_map(tmp_path / "m.png", 21)


def test_masks_of_other_modes(tmp_path):
    ids = Image.fromarray(np.array([[0, 1], [20, 255]], np.uint8))
    Image.merge("LA", (ids, Image.new("L", (2, 2)))).save(tmp_path / "m.png")
    assert (images.read_label_map(tmp_path / "m.png", 21) == np.asarray(ids)).all()
    Image.fromarray(np.asarray(ids) > 0).save(tmp_path / "m.png")   # 1 bit
    assert images.read_label_map(tmp_path / "m.png", 21).tolist() == [[0, 1], [1, 1]]
    ids.save(tmp_path / "m.png", "JPEG")
    with pytest.raises(UserError, match=r"m\.png: a JPEG blurs the ids"):
        images.read_label_map(tmp_path / "m.png", 256)


def test_missing_mask(tmp_path):
    with pytest.raises(UserError, match=r"m\.png.*missing"):
        images.read_label_map(tmp_path / "m.png", 21)


def test_palette_is_vocs():
    palette = images.voc_palette()
    assert palette.shape == (256, 3) and palette.dtype == np.uint8
    known = {1: (128, 0, 0), 2: (0, 128, 0), 15: (192, 128, 128), 20: (0, 64, 128), 255: (224, 224, 192)}
    assert all(tuple(palette[i]) == colour for i, colour in known.items())


def test_normalize_and_back(photo):
    tensor = images.normalize(photo)
    expected = (photo / 255 - np.array(images.MEAN)) / np.array(images.STD)
    assert tensor.shape == (3, 40, 60) and tensor.dtype == torch.float32 and tensor.is_contiguous()
    assert np.allclose(tensor.permute(1, 2, 0), expected, atol=1e-6)
    assert np.allclose(images.denormalize(tensor[None])[0].permute(1, 2, 0), photo, atol=1e-4)


def test_grey_values_that_truncation_gives_back():
    """PAR's image, of all 3 x 256 values that a normalised pixel has: as released, 32 fall below their own."""
    grey = np.arange(256, dtype=np.uint8)[None, :, None].repeat(3, 2)
    back = images.denormalize(images.normalize(grey)).floor().permute(1, 2, 0).numpy()
    assert (back != grey).sum() == 32 and np.abs(back - grey).max() == 1


def test_pictures(photo):
    ids = np.zeros((40, 60), np.uint8)
    ids[10:20] = 3
    drawn = images.overlay(photo, ids, 0.5)
    assert drawn.dtype == np.uint8 and (drawn[:10] == photo[:10]).all() and (drawn[10:20] != photo[10:20]).any()
    assert (images.overlay(photo, ids, 1.0)[15] == images.voc_palette()[3]).all()
    heat = images.heatmap(np.linspace(0, 1, 2400).reshape(40, 60), np.zeros_like(photo), alpha=1.0)
    assert heat.dtype == np.uint8 and heat[0, 0, 2] > heat[0, 0, 0] and heat[-1, -1, 0] > heat[-1, -1, 2]

"""bilateral_filter: against a slow filter written from the paper, the exact Gaussian, and its own algebra."""

import math

import pytest
import torch

from bilateralfilter import bilateral_filter
from tests.bilateralfilter.slow import gaussian, image_features, random, slow_filter, smooth_images


@pytest.mark.parametrize("size", [(9, 13), (1, 7), (12, 8), (1, 1), (11, 1)])
@pytest.mark.parametrize("sigmas", [(15.0, 50.0), (40.0, 3.7)])  # (.., 3.0) puts pixels on borders of simplices
def test_equals_a_slow_filter_written_from_the_paper(size, sigmas):
    images = torch.cat([smooth_images(1, *size) * 0.9 + 10, random(1, 3, *size, seed=3) * 255])
    maps = random(2, 1, *size)
    out = bilateral_filter(images, maps, *sigmas)
    slow = torch.stack(
        [slow_filter(image_features(image, *sigmas), m.flatten()) for image, m in zip(images, maps, strict=True)]
    )
    assert out.dtype == torch.float32
    assert out.shape == maps.shape
    assert (out.flatten(1) - slow).abs().max() <= 2e-6 * slow.max()


@pytest.mark.parametrize("sigmas", [(15.0, 8.0), (30.0, 10.0), (60.0, 5.0)])
def test_weighs_pixels_like_the_exact_gaussian(sigmas):
    """Divided by the filtered 1, it is the exact normalised Gaussian within 4 % of the map's range on the mean.

    The raw sums are about 0.4 to 0.5 of the exact ones: what is blurred to vertices no pixel touches is lost.
    """
    image = smooth_images(1, 24, 30)
    kernel = gaussian(image_features(image[0], *sigmas))
    maps = (torch.arange(30) >= 15).float().expand(1, 1, 24, 30)  # a step
    ones = torch.ones_like(maps)
    ours = (bilateral_filter(image, maps, *sigmas) / bilateral_filter(image, ones, *sigmas)).flatten().double()
    exact = (kernel @ maps.flatten().double()) / kernel.sum(1)
    assert (ours - exact).abs().mean() < 0.04
    ratio = bilateral_filter(image, ones, *sigmas).flatten().double() / kernel.sum(1)
    assert 0.38 < ratio.mean() < 0.52


def test_layouts_and_one_image_of_several():
    images, maps = smooth_images(3, 16, 19), random(3, 81, 16, 19) - 0.5
    before = images.clone(), maps.clone()
    out = bilateral_filter(images, maps, 15, 50)
    strided = maps.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert torch.equal(out, bilateral_filter(images, strided, 15, 50))
    assert torch.equal(out[1:2, 80:], bilateral_filter(images[1:2], maps[1:2, 80:], 15, 50))
    assert torch.equal(images, before[0])
    assert torch.equal(maps, before[1])


def test_types_of_images_and_maps():
    images, maps = smooth_images(2, 16, 19).round(), random(2, 5, 16, 19)
    out = bilateral_filter(images, maps, 15, 50)
    exact = bilateral_filter(images.double(), maps.double(), 15, 50)
    assert exact.dtype == torch.float64
    assert (exact - out).abs().max() <= 2e-6 * out.max()
    slow = slow_filter(image_features(images[1].double(), 15, 50), maps[1, 4].flatten().double())
    assert (exact[1, 4].flatten() - slow).abs().max() <= 2e-6 * slow.max()
    for integers in (torch.uint8, torch.int64):
        assert torch.equal(bilateral_filter(images.to(integers), maps, 15, 50), out)
        assert torch.equal(bilateral_filter(images.to(integers), maps.double(), 15, 50), exact)
    assert torch.equal(bilateral_filter(images.double(), maps, 15, 50), out)
    for half in (torch.float16, torch.bfloat16):
        given = maps.to(half).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = bilateral_filter(images, given, 15, 50)
        assert low.dtype == torch.float32
        assert torch.equal(low, bilateral_filter(images, given.float(), 15, 50))
        low.sum().backward()
        assert given.grad.dtype == half


def test_pixels_that_take_no_part():
    """As if the image did not have them, whatever they hold."""
    images, maps, valid = smooth_images(3, 9, 11), random(3, 2, 9, 11), random(3, 9, 11, seed=4) > 0.4
    valid[1] = False
    valid[2, :, 5:] = False
    slow = torch.zeros(3, 2, 9, 11, dtype=torch.float64)
    for n in range(3):
        features = image_features(images[n], 15, 50)[valid[n].flatten()]
        for k in range(2):
            slow[n, k][valid[n]] = slow_filter(features, maps[n, k][valid[n]])
    images[~valid[:, None].expand_as(images)] = 200
    for hidden in (0.5, float("nan")):
        maps[~valid[:, None].expand_as(maps)] = hidden
        m = maps.clone().requires_grad_()
        out = bilateral_filter(images, m, 15, 50, valid)
        assert (out - slow).abs().max() <= 2e-6 * slow.max()
        out.sum().backward()
        assert not m.grad[~valid[:, None].expand_as(m)].any()
        assert m.grad[valid[:, None].expand_as(m)].all()
    everything = torch.ones_like(valid)
    same = bilateral_filter(images, torch.ones_like(maps), 15, 50, everything)
    assert torch.equal(same, bilateral_filter(images, torch.ones_like(maps), 15, 50))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(0, 4, 5, 6), (2, 0, 5, 6), (2, 4, 0, 5), (2, 4, 5, 0), (2, 4, 0, 0)])
def test_nothing_to_filter(shape, masked):
    maps, (n, _, height, width) = torch.zeros(shape, requires_grad=True), shape
    valid = torch.zeros(n, height, width) > 0 if masked else None
    out = bilateral_filter(torch.zeros(n, 3, height, width), maps, 15, 50, valid)
    out.sum().backward()
    assert out.shape == maps.grad.shape == shape


NOT_FINITE = (math.nan, math.inf, -math.inf)
IMAGES, MAPS, VALID = torch.zeros(2, 3, 8, 8), torch.zeros(2, 1, 8, 8), torch.ones(2, 8, 8) > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(2, 4, 8, 8)}, r"images must be \(N, 3, H, W\), not \(2, 4, 8, 8\)"),
        ({"images": torch.zeros(3, 8, 8)}, "images must be"),
        ({"images": torch.zeros(1, 3, 8, 8)}, "maps must be"),
        ({"images": IMAGES.to("meta")}, "images are on meta, maps on cpu"),
        *(({"images": IMAGES.clone().index_fill_(3, torch.tensor(4), value)}, "not finite") for value in NOT_FINITE),
        ({"maps": torch.zeros(2, 1, 8, 9)}, r"not \(2, 1, 8, 9\)"),
        ({"maps": torch.zeros(2, 8, 8)}, "maps must be"),
        ({"maps": MAPS.long()}, "floating-point numbers, not torch.int64"),
        ({"maps": MAPS.to("meta")}, "images are on cpu, maps on meta"),
        ({"sigma_rgb": 0}, "sigma_rgb=0"),
        ({"sigma_xy": -1}, "sigma_xy=-1"),
        ({"sigma_rgb": math.nan}, "sigma_rgb=nan"),
        ({"sigma_xy": math.inf}, "sigma_xy=inf"),
        ({"sigma_xy": 1e-7}, "sigmas too small"),
        ({"sigma_xy": 1e-45}, "sigmas too small"),
        ({"valid": VALID.float()}, "valid must be bool"),
        ({"valid": VALID[:, None]}, "valid must be bool"),
        ({"valid": torch.ones(2, 8, 9) > 0}, "valid must be bool"),
        ({"valid": VALID.to("meta")}, "images are on cpu, valid on meta"),
    ],
)
def test_wrong_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        bilateral_filter(**{"images": IMAGES, "maps": MAPS, "sigma_rgb": 15, "sigma_xy": 50, **change})

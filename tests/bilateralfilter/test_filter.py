"""bilateral_filter: against a slow filter written from the paper, the exact Gaussian, and its own algebra."""

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


def test_is_linear_in_the_maps():
    images, a, b = smooth_images(1, 21, 34), random(1, 3, 21, 34), random(1, 3, 21, 34, seed=2)
    together = bilateral_filter(images, 2 * a - 3 * b, 15, 20)
    apart = 2 * bilateral_filter(images, a, 15, 20) - 3 * bilateral_filter(images, b, 15, 20)
    assert (together - apart).abs().max() <= 2e-6 * apart.abs().max()
    assert not bilateral_filter(images, torch.zeros_like(a), 15, 20).any()


def test_is_nearly_symmetric():
    """<u, F v> = <F u, v> within 0.5 %: missing vertices keep the blurs along the six directions from commuting."""
    images = smooth_images(1, 32, 40)
    u, v = random(1, 1, 32, 40), random(1, 1, 32, 40, seed=2)
    left = (u * bilateral_filter(images, v, 15, 10)).sum()
    right = (bilateral_filter(images, u, 15, 10) * v).sum()
    assert abs(left - right) < 0.005 * left


def test_maps_of_any_sign_channel_count_and_layout():
    images, maps = smooth_images(2, 16, 19), random(2, 81, 16, 19) - 0.5
    out = bilateral_filter(images, maps, 15, 50)
    strided = maps.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert torch.equal(out, bilateral_filter(images, strided, 15, 50))
    every_other = torch.zeros(2, 162, 16, 19)[:, ::2].copy_(maps)
    assert torch.equal(out, bilateral_filter(images, every_other, 15, 50))
    for k in (0, 80):
        assert torch.equal(out[:, k], bilateral_filter(images, maps[:, k : k + 1], 15, 50)[:, 0])
    assert bilateral_filter(images, maps[:, :0], 15, 50).shape == (2, 0, 16, 19)
    expanded = bilateral_filter(images, maps[:, :1].expand(-1, 9, -1, -1), 15, 50)
    assert torch.equal(expanded, out[:, :1].expand(-1, 9, -1, -1))


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
        low = bilateral_filter(images, maps.to(half), 15, 50)
        assert low.dtype == torch.float32
        assert torch.equal(low, bilateral_filter(images, maps.to(half).float(), 15, 50))


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
    assert bilateral_filter(images, maps[:, :0], 15, 50, valid).shape == (3, 0, 9, 11)
    assert bilateral_filter(images[:0], maps[:0], 15, 50, valid[:0]).shape == (0, 2, 9, 11)
    for size in ((0, 5), (5, 0)):
        valid = torch.zeros(2, *size, dtype=torch.bool)
        nothing = bilateral_filter(torch.zeros(2, 3, *size), torch.zeros(2, 4, *size), 15, 50, valid)
        assert nothing.shape == (2, 4, *size)


@pytest.mark.parametrize("valid", [torch.ones(2, 8, 8), torch.ones(2, 1, 8, 8) > 0, torch.ones(2, 8, 9) > 0])
def test_wrong_valid(valid):
    with pytest.raises(ValueError, match="valid must be bool"):
        bilateral_filter(torch.zeros(2, 3, 8, 8), torch.zeros(2, 1, 8, 8), 15, 50, valid)


def test_valid_on_another_device():
    with pytest.raises(ValueError, match="valid"):
        valid = torch.ones(2, 8, 8, device="meta") > 0
        bilateral_filter(torch.zeros(2, 3, 8, 8), torch.zeros(2, 1, 8, 8), 15, 50, valid)


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)])
def test_images_without_pixels(size):
    assert bilateral_filter(torch.zeros(2, 3, *size), torch.zeros(2, 4, *size), 15, 50).shape == (2, 4, *size)


def test_no_images():
    maps = torch.zeros(0, 4, 5, 6, requires_grad=True)
    out = bilateral_filter(torch.zeros(0, 3, 5, 6), maps, 15, 50)
    assert out.shape == (0, 4, 5, 6)
    out.sum().backward()
    assert maps.grad.shape == maps.shape


def test_several_images_equal_one_by_one():
    images, maps = smooth_images(3, 40, 30), random(3, 5, 40, 30)
    together = bilateral_filter(images, maps, 15, 50)
    for n in range(3):
        assert torch.equal(bilateral_filter(images[n : n + 1], maps[n : n + 1], 15, 50)[0], together[n])


def test_leaves_its_input_alone():
    images, maps = smooth_images(1, 12, 9), random(1, 8, 12, 9)
    before = images.clone(), maps.clone()
    bilateral_filter(images, maps, 15, 50)
    assert torch.equal(images, before[0])
    assert torch.equal(maps, before[1])


def test_noise_where_every_pixel_is_on_its_own():
    """Every pixel gets back the sum of its squared weights times its value, and blurs of itself."""
    images, maps = random(1, 3, 48, 48) * 255, random(1, 1, 48, 48)
    out = bilateral_filter(images, maps, 0.5, 0.2)
    assert (out > 0).all()
    assert (out < 2 * maps + 1e-6).all()


def test_the_gradient_is_the_transposed_filter_and_reaches_maps_alone():
    images, maps, v = smooth_images(2, 9, 8), random(2, 3, 9, 8), random(2, 3, 9, 8, seed=2)
    images.requires_grad_()
    maps.requires_grad_()
    (bilateral_filter(images, maps, 15, 20) * v).sum().backward()
    assert images.grad is None
    change = torch.zeros_like(v)
    change[1, 2, 4, 5] = 1
    directional = (bilateral_filter(images, change, 15, 20) * v).sum()
    assert maps.grad[1, 2, 4, 5].item() == pytest.approx(directional.item(), rel=1e-5)


def test_gradcheck():
    images = smooth_images(2, 3, 4)
    maps = random(2, 2, 3, 4, dtype=torch.float64).requires_grad_()
    run = lambda m: bilateral_filter(images, m, 20, 3) ** 2  # noqa: E731
    assert torch.autograd.gradcheck(run, maps)
    assert torch.autograd.gradgradcheck(run, maps)


@pytest.mark.parametrize(
    ("images", "maps", "sigmas", "message"),
    [
        ((1, 4, 8, 8), (1, 2, 8, 8), (15, 50), r"images must be \(N, 3, H, W\), not \(1, 4, 8, 8\)"),
        ((3, 8, 8), (1, 2, 8, 8), (15, 50), "images must be"),
        ((2, 3, 8, 8), (1, 2, 8, 8), (15, 50), "maps must be"),
        ((1, 3, 8, 8), (1, 2, 8, 9), (15, 50), r"not \(1, 2, 8, 9\)"),
        ((1, 3, 8, 8), (1, 8, 8), (15, 50), "maps must be"),
        ((1, 3, 8, 8), (1, 2, 8, 8), (0, 50), "sigma_rgb=0"),
        ((1, 3, 8, 8), (1, 2, 8, 8), (15, -1), "sigma_xy=-1"),
        ((1, 3, 8, 8), (1, 2, 8, 8), (float("nan"), 50), "sigma_rgb=nan"),
        ((1, 3, 8, 8), (1, 2, 8, 8), (15, float("inf")), "sigma_xy=inf"),
        ((1, 3, 8, 8), (1, 2, 8, 8), (15, 1e-7), "sigmas too small"),
        ((1, 3, 8, 8), (1, 2, 8, 8), (15, 1e-45), "sigmas too small"),
    ],
)
def test_wrong_arguments(images, maps, sigmas, message):
    with pytest.raises(ValueError, match=message):
        bilateral_filter(torch.zeros(images), torch.zeros(maps), *sigmas)


def test_wrong_types_and_devices():
    images, maps = torch.zeros(1, 3, 8, 8), torch.zeros(1, 2, 8, 8)
    with pytest.raises(ValueError, match="floating-point numbers, not torch.int64"):
        bilateral_filter(images, maps.long(), 15, 50)
    with pytest.raises(ValueError, match="images are on meta, maps on cpu"):
        bilateral_filter(images.to("meta"), maps, 15, 50)
    with pytest.raises(ValueError, match="images are on cpu, maps on meta"):
        bilateral_filter(images, maps.to("meta"), 15, 50)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_images_that_are_not_finite(value):
    images = smooth_images(1, 8, 8)
    images[0, 0, 3, 4] = value
    with pytest.raises(ValueError, match="not finite"):
        bilateral_filter(images, random(1, 1, 8, 8), 15, 50)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_maps_that_are_not_finite_spread_to_what_they_touch(value):
    images, maps = smooth_images(2, 8, 8), random(2, 2, 8, 8)
    clean = bilateral_filter(images, maps, 15, 50)
    maps[1, 0, 3, 4] = value
    out = bilateral_filter(images, maps, 15, 50)
    assert not out[1, 0, 3, 4].isfinite()
    assert torch.equal(out[0], clean[0])
    assert torch.equal(out[1, 1], clean[1, 1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_maps_of_a_gpu_come_back_to_it():
    images, maps = random(1, 3, 9, 9) * 255, random(1, 2, 9, 9)
    out = bilateral_filter(images.cuda(), maps.cuda(), 15, 50)
    assert out.is_cuda
    assert torch.allclose(out.cpu(), bilateral_filter(images, maps, 15, 50), rtol=1e-4)

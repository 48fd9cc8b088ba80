"""The permutohedral filter against a slow one written from the paper, the exact Gaussian, and its own algebra."""

import math

import pytest
import torch

from bilateralfilter import bilateral_filter


def smooth_images(n: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    coarse = torch.rand(n, 3, 4, 5, generator=torch.Generator().manual_seed(seed)) * 255
    return torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 255)


def random_maps(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def features(image: torch.Tensor, sigma_rgb: float, sigma_xy: float) -> torch.Tensor:
    """image (3, H, W) -> (H*W, 5) float64."""
    y, x = torch.meshgrid(*(torch.arange(n) / sigma_xy for n in image.shape[1:]), indexing="ij")
    return torch.stack([x, y, *(image / sigma_rgb)]).flatten(1).T.double()


def simplex(feature: list[float]) -> list[tuple[tuple[int, ...], float]]:
    """The six vertices around a feature, as (coordinates, barycentric weight)."""
    d = len(feature)
    # the paper's basis E, scaled for variance 1; summed from the last on, so that ties (x = 0) stay exact ties
    c = [v * math.sqrt(2 / 3) * (d + 1) / math.sqrt((j + 1) * (j + 2)) for j, v in enumerate(feature)]
    x = [sum(reversed(c[i:])) - (i * c[i - 1] if i else 0) for i in range(d + 1)]
    near = [round(value / (d + 1)) * (d + 1) for value in x]
    order = sorted(range(d + 1), key=lambda i: near[i] - x[i])  # largest rest first
    excess = sum(near) // (d + 1)
    for i in order[d + 1 - excess :] if excess > 0 else order[:-excess]:
        near[i] -= int(math.copysign(d + 1, excess))
    order.sort(key=lambda i: near[i] - x[i])
    rest = [(x[i] - near[i]) / (d + 1) for i in order]
    corners = []
    for k in range(d + 1):
        weight = 1 - rest[0] + rest[d] if k == 0 else rest[d - k] - rest[d + 1 - k]
        vertex = list(near)
        for rank, i in enumerate(order):
            vertex[i] += k if rank <= d - k else k - (d + 1)
        corners.append((tuple(vertex), weight))
    return corners


def slow_filter(image: torch.Tensor, values: torch.Tensor, sigma_rgb: float, sigma_xy: float) -> torch.Tensor:
    """image (3, H, W), values (H, W) -> (H, W), with a dictionary for a lattice."""
    corners = [simplex(feature) for feature in features(image, sigma_rgb, sigma_xy).tolist()]
    lattice: dict[tuple[int, ...], float] = {}
    for pixel, value in zip(corners, values.flatten().tolist(), strict=True):
        assert min(weight for _, weight in pixel) > -1e-9
        assert math.isclose(sum(weight for _, weight in pixel), 1)
        for vertex, weight in pixel:
            assert sum(vertex) == 0
            lattice[vertex] = lattice.get(vertex, 0.0) + weight * value
    for axis in range(6):
        step = [5 if i == axis else -1 for i in range(6)]
        lattice = {
            vertex: value
            + 0.5
            * sum(lattice.get(tuple(v + sign * s for v, s in zip(vertex, step, strict=True)), 0.0) for sign in (-1, 1))
            for vertex, value in lattice.items()
        }
    out = [sum(weight * lattice[vertex] for vertex, weight in pixel) / (1 + 2**-5) for pixel in corners]
    return torch.tensor(out).reshape(values.shape)


@pytest.mark.parametrize("size", [(9, 13), (1, 7), (12, 8)])
@pytest.mark.parametrize("sigmas", [(15.0, 50.0), (40.0, 3.7)])  # (.., 3.0) puts pixels on borders of simplices
def test_equals_a_slow_filter_written_from_the_paper(size, sigmas):
    images = torch.cat([smooth_images(1, *size) * 0.9 + 10, random_maps(1, 3, *size, seed=3) * 255])
    maps = random_maps(2, 1, *size)
    out = bilateral_filter(images, maps, *sigmas)
    slow = torch.stack([slow_filter(image, m[0], *sigmas)[None] for image, m in zip(images, maps, strict=True)])
    assert out.dtype == torch.float32
    assert out.shape == maps.shape
    assert (out - slow).abs().max() <= 1e-5 * slow.max()


@pytest.mark.parametrize("sigmas", [(15.0, 8.0), (30.0, 10.0), (60.0, 5.0)])
def test_weighs_pixels_like_the_exact_gaussian(sigmas):
    """Divided by the filtered 1, it is the exact normalised Gaussian within 5 % of the map's range on the mean.

    The raw sums are about 0.4 to 0.5 of the exact ones: what is blurred to vertices no pixel touches is lost.
    """
    image = smooth_images(1, 24, 30)
    f = features(image[0], *sigmas)
    kernel = torch.exp(-(torch.cdist(f, f) ** 2) / 2)
    maps = (torch.arange(30) >= 15).float().expand(1, 1, 24, 30)  # a step
    ones = torch.ones_like(maps)
    ours = (bilateral_filter(image, maps, *sigmas) / bilateral_filter(image, ones, *sigmas)).flatten().double()
    exact = (kernel @ maps.flatten().double()) / kernel.sum(1)
    assert (ours - exact).abs().mean() < 0.05
    ratio = bilateral_filter(image, ones, *sigmas).flatten().double() / kernel.sum(1)
    assert 0.35 < ratio.mean() < 0.55


def test_is_linear_in_the_maps():
    images, a, b = smooth_images(1, 21, 34), random_maps(1, 3, 21, 34), random_maps(1, 3, 21, 34, seed=2)
    together = bilateral_filter(images, 2 * a - 3 * b, 15, 20)
    apart = 2 * bilateral_filter(images, a, 15, 20) - 3 * bilateral_filter(images, b, 15, 20)
    assert torch.allclose(together, apart, atol=1e-5 * apart.abs().max().item())
    assert not bilateral_filter(images, torch.zeros_like(a), 15, 20).any()


def test_is_nearly_symmetric():
    """<u, F v> = <F u, v> within 2 %: missing vertices keep the blurs along the six directions from commuting."""
    images = smooth_images(1, 32, 40)
    u, v = random_maps(1, 1, 32, 40), random_maps(1, 1, 32, 40, seed=2)
    left = (u * bilateral_filter(images, v, 15, 10)).sum()
    right = (bilateral_filter(images, u, 15, 10) * v).sum()
    assert abs(left - right) < 0.02 * left


def test_maps_of_any_sign_channel_count_and_layout():
    images, maps = smooth_images(2, 16, 19), random_maps(2, 81, 16, 19) - 0.5
    out = bilateral_filter(images, maps, 15, 50)
    strided = maps.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert torch.equal(out, bilateral_filter(images, strided, 15, 50))
    for k in (0, 80):
        assert torch.allclose(out[:, k], bilateral_filter(images, maps[:, k : k + 1], 15, 50)[:, 0], atol=1e-6)
    assert bilateral_filter(images, maps[:, :0], 15, 50).shape == (2, 0, 16, 19)
    assert torch.equal(bilateral_filter(images.double(), maps.double(), 15, 50), out)


def test_several_images_equal_one_by_one_on_any_number_of_threads():
    images, maps = smooth_images(3, 40, 30), random_maps(3, 5, 40, 30)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single = bilateral_filter(images, maps, 15, 50)
        torch.set_num_threads(3)
        assert torch.equal(bilateral_filter(images, maps, 15, 50), single)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    for n in range(3):
        assert torch.equal(bilateral_filter(images[n : n + 1], maps[n : n + 1], 15, 50)[0], single[n])


def test_a_noisy_image_makes_the_vertex_table_grow():
    images = random_maps(1, 3, 48, 48) * 255
    maps = random_maps(1, 1, 48, 48)
    # far apart features: every pixel is its own simplex and gets back sum(weight^2) of its value and blurs of itself
    out = bilateral_filter(images, maps, 0.5, 0.2)
    assert (out > 0).all()
    assert (out < 2 * maps + 1e-6).all()


def test_no_gradient_flows():
    assert not bilateral_filter(smooth_images(1, 8, 8), random_maps(1, 1, 8, 8).requires_grad_(), 15, 50).requires_grad


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
        ((1, 3, 8, 8), (1, 2, 8, 8), (15, 1e-6), "sigma_rgb or sigma_xy is too small"),
    ],
)
def test_wrong_arguments(images, maps, sigmas, message):
    with pytest.raises(ValueError, match=message):
        bilateral_filter(torch.zeros(images), torch.zeros(maps), *sigmas)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", ["images", "maps"])
def test_values_that_are_not_finite(which, value):
    tensors = {"images": smooth_images(1, 8, 8), "maps": random_maps(1, 1, 8, 8)}
    tensors[which][0, 0, 3, 4] = value
    with pytest.raises(ValueError, match=f"{which} hold NaN or infinity"):
        bilateral_filter(**tensors, sigma_rgb=15, sigma_xy=50)

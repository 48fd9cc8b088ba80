"""Inputs of these tests, and the filter written once more from the paper, with a dictionary for a lattice."""

import math

import torch
from torch import Tensor


def random(*shape: int, seed: int = 1, **options) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), **options)


def smooth_images(n: int, height: int, width: int, seed: int = 0) -> Tensor:
    coarse = random(n, 3, 4, 5, seed=seed) * 255
    return torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 255)


def image_features(image: Tensor, sigma_rgb: float, sigma_xy: float) -> Tensor:
    """image (3, H, W) -> (H*W, 5) float64."""
    y, x = torch.meshgrid(*(torch.arange(n) / sigma_xy for n in image.shape[1:]), indexing="ij")
    return torch.stack([x, y, *(image / sigma_rgb)]).flatten(1).T.double()


def gaussian(features: Tensor) -> Tensor:
    """features (P, D) -> exp(-|f_p - f_q|^2 / 2), (P, P)."""
    return torch.exp(-(torch.cdist(features, features) ** 2) / 2)


def simplex(feature: list[float]) -> list[tuple[tuple[int, ...], float]]:
    """The D + 1 vertices around a feature, as (coordinates, barycentric weight)."""
    d = len(feature)
    # Lifted to d + 1 coordinates that sum to 0, by the paper's basis E, scaled for variance 1; summed from the last on,
    # so that ties (x = 0) stay exact ties.
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


def slow_filter(features: Tensor, values: Tensor) -> Tensor:
    """features (P, D), values (P,) -> (P,) float64."""
    d = features.shape[1]
    corners = [simplex(feature) for feature in features.double().tolist()]
    lattice: dict[tuple[int, ...], float] = {}
    for pixel, value in zip(corners, values.tolist(), strict=True):
        assert min(weight for _, weight in pixel) > -1e-9
        assert math.isclose(sum(weight for _, weight in pixel), 1)
        for vertex, weight in pixel:
            assert sum(vertex) == 0
            lattice[vertex] = lattice.get(vertex, 0.0) + weight * value
    for axis in range(d + 1):
        step = [d if i == axis else -1 for i in range(d + 1)]
        lattice = {
            vertex: value
            + 0.5
            * sum(lattice.get(tuple(v + sign * s for v, s in zip(vertex, step, strict=True)), 0.0) for sign in (-1, 1))
            for vertex, value in lattice.items()
        }
    out = [sum(weight * lattice[vertex] for vertex, weight in pixel) / (1 + 2**-d) for pixel in corners]
    return torch.tensor(out, dtype=torch.float64)

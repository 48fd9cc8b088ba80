"""The permutohedral lattice as torch operators: built once for an image, applied to any number of channels.

Adams, Baek, Davis: Fast High-Dimensional Filtering Using the Permutohedral Lattice, Eurographics 2010.
The operators are torch.ops.bilateralfilter.build, .apply and .add_, with shape functions and derivatives, so that
torch.compile, DDP and autocast work; csrc/ holds them for CPU and GPU, pytorch.py in plain PyTorch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _extension, pytorch

MAX_DIMENSIONS = 8

library = torch.library.Library("bilateralfilter", "DEF")
library.define("build(Tensor features, Tensor? valid=None) -> Tensor[]")
library.define("apply(Tensor values, Tensor[] lattice, bool transposed) -> Tensor")
library.define("add_(Tensor(a!) out, Tensor values, Tensor[] lattice) -> ()")
library.define(
    "mean_field(Tensor prob, float least, Tensor[] lattices, Tensor stencil, int image_width, float copies, "
    "int iterations) -> Tensor"
)
library.impl("mean_field", pytorch.mean_field, "CUDA")  # of .add_ and softmax; csrc/ has its own for the CPU


@torch.library.register_fake("bilateralfilter::build")
def _(features: Tensor, valid: Tensor | None = None) -> list[Tensor]:
    images, pixels, dimensions = features.shape
    corners = dimensions + 1
    size = torch.library.get_ctx().new_dynamic_size
    ints = {"dtype": torch.int32}
    vertex = features.new_empty(images, pixels, corners, **ints)
    weight = features.new_empty(images, pixels, corners)
    entries = images * pixels * corners
    start = features.new_empty(size(), **ints)
    parts = [vertex, weight, start, features.new_empty(entries, **ints), features.new_empty(entries)]
    if features.device.type == "cpu" and _extension.load("cpu"):  # image_start, image_piece, chain_start, chain
        return [*parts, *(features.new_empty(n, **ints) for n in (images + 1, images + 1, size(), size()))]
    return [*parts, features.new_empty(corners, 2, size(), **ints), features.new_empty(size(), **ints)]


@torch.library.register_fake("bilateralfilter::apply")
def _(values: Tensor, lattice: list[Tensor], transposed: bool) -> Tensor:
    return torch.empty_like(values)


@torch.library.register_fake("bilateralfilter::add_")
def _(out: Tensor, values: Tensor, lattice: list[Tensor]) -> None:
    return None


@torch.library.register_fake("bilateralfilter::mean_field")
def _(prob, least, lattices, stencil, image_width, copies, iterations) -> Tensor:
    return prob.new_empty(prob.shape)


def _setup_context(ctx, inputs: tuple, output: Tensor) -> None:
    _, ctx.lattice, ctx.transposed = inputs


def _backward(ctx, grad: Tensor) -> tuple:
    """The filter is linear; its transpose blurs along the lattice's directions in the opposite order."""
    return torch.ops.bilateralfilter.apply(grad, ctx.lattice, not ctx.transposed), [None] * len(ctx.lattice), None


torch.library.register_autograd("bilateralfilter::apply", _backward, setup_context=_setup_context)


class Lattice:
    """Gaussian filter in the space of the pixels' features, built once and applied to any number of channels.

    features: (N, P, D), D from 1 to 8, in units of the Gaussian's standard deviation (divide by the sigmas); float32 or
    float64, other floating types become float32; CPU or GPU. No gradient flows to the features.
    Raises ValueError for other shapes, and for features that are not finite or too large to be numbered (on the CPU; on
    a GPU, where looking would wait for the device, everything that such a pixel touches becomes NaN).
    valid: bool (N, P), False where the values are 0 and the results not looked at, or None: saves a GPU their work.
    """

    def __init__(self, features: Tensor, valid: Tensor | None = None) -> None:
        if features.ndim != 3 or not 1 <= features.shape[2] <= MAX_DIMENSIONS:
            raise ValueError(
                f"Lattice: features must be (N, P, D) with D from 1 to {MAX_DIMENSIONS}, not {tuple(features.shape)}"
            )
        if not features.is_floating_point():
            raise ValueError(f"Lattice: features must be floating-point numbers, not {features.dtype}")
        if features.numel() // features.shape[2] * (features.shape[2] + 1) >= 2**31:
            raise ValueError(f"Lattice: {tuple(features.shape)} features are too many for one call: take fewer images")
        if valid is not None and (valid.dtype, valid.shape) != (torch.bool, features.shape[:2]):
            raise ValueError(f"Lattice: valid must be bool {tuple(features.shape[:2])}, not {valid.dtype} "
                             f"{tuple(valid.shape)}")
        if valid is not None and valid.device != features.device:
            raise ValueError(f"Lattice: features are on {features.device}, valid on {valid.device}")
        _extension.load(features.device.type)
        if features.dtype != torch.float64:
            features = features.float()
        self._parts = torch.ops.bilateralfilter.build(features.detach(), valid)

    @property
    def dtype(self) -> torch.dtype:
        """float32 or float64: of what `filter` computes and returns."""
        return self._parts[1].dtype

    def filter(self, values: Tensor, transposed: bool = False) -> Tensor:
        """sum_q exp(-|f_p - f_q|^2 / 2) values_q for every pixel p, but for a factor of about 0.4 to 0.5 (D = 5).

        values: (N, P, K), any floating type and strides; any N where the lattice is of one image. Returns `dtype`
        (N, P, K), in the layout of `values`; differentiable. transposed: the transpose of this operator, which differs
        a little from the operator itself. Values that are not finite spread to what they touch.
        Raises ValueError for shapes or devices that do not fit.
        """
        self._check("values", values)
        return torch.ops.bilateralfilter.apply(values.to(self.dtype), self._parts, transposed)

    def add_to(self, out: Tensor, values: Tensor) -> None:
        """out += filter(values), in place and without a gradient.

        Both (N, P, K) of `dtype`, contiguous, K a multiple of 8. Raises ValueError for anything else.
        """
        self._check("values", values)
        for name, tensor in (("values", values), ("out", out)):
            if tensor.dtype != self.dtype or not tensor.is_contiguous() or tensor.shape[-1] % 8:
                raise ValueError(f"Lattice.add_to: {name} must be contiguous {self.dtype}, of 8, 16, 24, ... channels")
        if out.shape != values.shape or out.device != values.device:
            raise ValueError(f"Lattice.add_to: out {tuple(out.shape)} and values {tuple(values.shape)} must be alike")
        torch.ops.bilateralfilter.add_(out, values, self._parts)

    def _check(self, name: str, values: Tensor) -> None:
        images, pixels, _ = self._parts[0].shape
        if values.ndim != 3 or values.shape[1] != pixels or images not in (1, values.shape[0]):
            wanted = f"({'N' if images == 1 else images}, {pixels}, K)"
            raise ValueError(f"Lattice: {name} must be {wanted} as the features were, not {tuple(values.shape)}")
        if values.device != self._parts[0].device:
            raise ValueError(f"Lattice: {name} are on {values.device}, the lattice on {self._parts[0].device}")
        if not values.is_floating_point():
            raise ValueError(f"Lattice: {name} must be floating-point numbers, not {values.dtype}")

    def normalized(self, weight: float = 1.0) -> Lattice:
        """weight * n F n, with F this filter and n = 1 / sqrt(F 1) at every pixel: the kernels of the dense CRF."""
        images, pixels, _ = self._parts[0].shape
        ones = self._parts[1].new_ones(images, pixels, 1)
        n = (weight / (self.filter(ones) + 1e-20)).sqrt()
        vertex, to_pixel, start, pixel, to_vertex, *rest = self._parts
        scaled = Lattice.__new__(Lattice)
        scaled._parts = [vertex, to_pixel * n, start, pixel, to_vertex * n.flatten()[pixel], *rest]
        return scaled


def stencil_of(lattice: Lattice, height: int, width: int, reach: int) -> Tensor:
    """The weights (P, side, side) of a lattice of grid features of one image, side = 2 reach + 1; 0 outside the image.

    The filter must reach no further than `reach` pixels. The weights are read off what the lattice makes of single
    pixels, of all at once that lie `side` apart.
    """
    side = 2 * reach + 1
    y = torch.arange(height, device=lattice._parts[0].device)[:, None, None, None]
    x = torch.arange(width, device=y.device)[:, None, None]
    probes = F.one_hot((y % side * side + x % side).flatten(), side * side)
    answers = lattice.filter(probes[None].to(lattice.dtype))[0]
    step = torch.arange(-reach, reach + 1, device=y.device)
    other_y, other_x = y + step[:, None], x + step
    inside = (other_y >= 0) & (other_y < height) & (other_x >= 0) & (other_x < width)  # (H, W, side, side)
    probe = other_y % side * side + other_x % side
    return (answers.gather(1, probe.flatten(2).flatten(0, 1)).view(inside.shape) * inside).flatten(0, 1)


def mean_field(
    prob: Tensor, least: float, lattices: list[Lattice], stencil: Tensor | None, image_width: int, copies: int,
    iterations: int,
) -> Tensor:
    """q = softmax(u), then q <- softmax(u + sum of the lattices' and the stencil's filters of q) and so on.

    u = log(prob). prob: float32 (N, C, P), counts as at least `least` and at most 1; its last channel stands for
    `copies` equal classes, of which each has its q. stencil: (P, side, side), where the compiled operators of the CPU
    are there. Returns q, (N, C, P).
    """
    parts = [part for lattice in lattices for part in lattice._parts]
    stencil = prob.new_empty(prob.shape[2], 0, 0) if stencil is None else stencil
    return torch.ops.bilateralfilter.mean_field(prob, least, parts, stencil, image_width, copies, iterations)


def grid_features(height: int, width: int, sigma_xy: float, like: Tensor) -> Tensor:
    """(x, y) / sigma_xy of every pixel, (1, H*W, 2), of the type and on the device of `like`."""
    options = {"dtype": like.dtype, "device": like.device}
    x = (torch.arange(width, **options) / sigma_xy).expand(height, width)
    y = (torch.arange(height, **options) / sigma_xy)[:, None].expand(height, width)
    return torch.stack([x, y], dim=-1).reshape(1, height * width, 2)


def bilateral_features(images: Tensor, sigma_rgb: float, sigma_xy: float) -> Tensor:
    """images (N, 3, H, W) -> (x / sigma_xy, y / sigma_xy, r / sigma_rgb, g / sigma_rgb, b / sigma_rgb), (N, H*W, 5)."""
    grid = grid_features(*images.shape[2:], sigma_xy, images).expand(len(images), -1, -1)
    return torch.cat([grid, images.flatten(2).transpose(1, 2) / sigma_rgb], dim=2)

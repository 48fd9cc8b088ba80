"""The lattice's operators in plain PyTorch: slow, for machines where nothing can be compiled, and an oracle in tests.

`_extension` registers them for a device type that the compiled operators do not serve. The parts of a lattice here:
vertex (N, P, V) and weight (N, P, V), V = D + 1; start (empty); of every entry its pixel and weight, in their order;
neighbours (V, 2, M), the vertices before and after in every direction, M where there is none; M itself.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

PARTS = 7  # of a lattice here and on a GPU


def build(features: Tensor) -> list[Tensor]:
    """features (N, P, D) -> the parts of the lattice. Raises ValueError for features that it cannot number."""
    images, pixels, dimensions = features.shape
    corners = dimensions + 1
    if not features.isfinite().all():
        raise ValueError("bilateralfilter: features are not finite, or too large: sigmas too small for this image")
    coordinates, weight = simplices(features)
    numbers, step = _packed(coordinates)
    known, vertex = numbers.flatten().unique(return_inverse=True)
    neighbours = torch.stack([torch.stack([_find(known, known + sign * step[axis]) for sign in (-1, 1)])
                              for axis in range(corners)])
    pixel = torch.arange(images * pixels, device=features.device).repeat_interleave(corners)
    ints = [x.int() for x in (vertex.view(weight.shape), pixel.new_empty(0), pixel, neighbours)]
    return [ints[0], weight, ints[1], ints[2], weight.flatten().clone(), ints[3], pixel.new_tensor([len(known)]).int()]


def simplices(features: Tensor) -> tuple[Tensor, Tensor]:
    """The vertices around every feature, int64 (N, P, V, D), without their last coordinate, and weights (N, P, V).

    Section 3.2 of the paper; sum of weights 1.
    """
    d = features.shape[2]
    v = d + 1
    scale = [math.sqrt(2 / 3) * v / math.sqrt((i + 1) * (i + 2)) for i in range(d)]
    c = features * torch.tensor(scale, dtype=features.dtype, device=features.device)
    tails = torch.cat([c.flip(2).cumsum(2).flip(2), torch.zeros_like(c[..., :1])], dim=2)  # of c[i:]
    lifted = tails - torch.cat([torch.zeros_like(c[..., :1]), c], dim=2) * torch.arange(v, device=c.device)
    up = lifted / v
    nearest = (up + 0.5 * up.sign()).trunc()
    order = (lifted - nearest * v).argsort(dim=2, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(2, order, torch.arange(v, device=c.device).expand_as(order).contiguous())
    rank += nearest.sum(2, keepdim=True).long()
    shift = (rank < 0).long() - (rank > d).long()
    rank += shift * v
    nearest = (nearest.long() + shift) * v
    rest = torch.empty_like(lifted).scatter_(2, rank, (lifted - nearest) / v)  # by rank
    weight = torch.cat([rest, rest[..., :1] - 1], dim=2).diff(dim=2).neg().flip(2)
    k = torch.arange(v, device=c.device)[:, None]
    return nearest[..., None, :d] + k - v * (rank[..., None, :d] > d - k), weight


def _packed(coordinates: Tensor) -> tuple[Tensor, list[int]]:
    """Coordinates (N, P, V, D) as one number each, different for different images, and the step in every direction."""
    d = coordinates.shape[3]
    flat = coordinates.flatten(0, 2)
    low = flat.amin(0).tolist() if len(flat) else [0] * d
    high = flat.amax(0).tolist() if len(flat) else [0] * d
    numbers, strides, stride = torch.zeros_like(coordinates[..., 0]), [], 1
    for i in range(d):
        numbers += (coordinates[..., i] - low[i] + d) * stride
        strides.append(stride)
        stride *= high[i] - low[i] + 2 * d + 1  # room for the neighbours of the outermost
    if stride * max(len(coordinates), 1) >= 2**62:
        raise ValueError("bilateralfilter: features are not finite, or too large: sigmas too small for this image")
    numbers += torch.arange(len(coordinates), device=numbers.device)[:, None, None] * stride
    return numbers, [(strides[i] * (d + 1) if i < d else 0) - sum(strides) for i in range(d + 1)]


def _find(known: Tensor, wanted: Tensor) -> Tensor:
    """Where the wanted numbers are among the known ones, which are sorted; len(known) for those that are not."""
    if not len(known):
        return wanted
    at = torch.searchsorted(known, wanted).clamp(max=len(known) - 1)
    return torch.where(known[at] == wanted, at, len(known))


def apply(values: Tensor, lattice: list[Tensor], transposed: bool) -> Tensor:
    """The filter of values (N, P, K)."""
    vertex, weight, *_, neighbours, _ = lattice
    if len(vertex) == 1 != len(values):  # one lattice for all images: these become channels
        images, pixels, channels = values.shape
        together = apply(values.transpose(0, 1).reshape(1, pixels, images * channels), lattice, transposed)
        return torch.empty_like(values).copy_(together.view(pixels, images, channels).transpose(0, 1))
    corners, _, count = neighbours.shape
    flat = values.flatten(0, 1)
    rows = values.new_zeros(count + 1, values.shape[2])  # the last stays 0: the neighbour that is not there
    for k in range(corners):
        rows.index_add_(0, vertex[..., k].flatten(), flat * weight[..., k].reshape(-1, 1))
    for axis in reversed(range(corners)) if transposed else range(corners):
        before, after = neighbours[axis]
        rows[:count] += 0.5 * (rows[before] + rows[after])
    out = sum(rows[vertex[..., k].flatten()] * weight[..., k].reshape(-1, 1) for k in range(corners))
    return torch.empty_like(values).copy_((out / (1 + 2.0**-(corners - 1))).view(values.shape))


def add_(out: Tensor, values: Tensor, lattice: list[Tensor]) -> None:
    """out += the filter of values."""
    out += apply(values, lattice, False)


def mean_field(
    prob: Tensor, least: float, lattices: list[Tensor], stencil: Tensor, image_width: int, copies: float,
    iterations: int,
) -> Tensor:
    """See `lattice.mean_field`; without a stencil."""
    if stencil.numel():
        raise ValueError("bilateralfilter: stencils are for the compiled operators on the CPU")
    last = prob.shape[1] - 1
    start = F.pad(prob.clamp(least, 1).log().transpose(1, 2), (0, -prob.shape[1] % 8), value=-math.inf)
    start[..., last] += math.log(copies)
    q = torch.empty_like(start, memory_format=torch.contiguous_format)
    for i in range(iterations + 1):
        message = torch.empty_like(q).copy_(start)
        for first in range(0, len(lattices) if i else 0, PARTS):
            torch.ops.bilateralfilter.add_(message, q, lattices[first : first + PARTS])
        q = message.softmax(dim=-1)
        q[..., last] /= copies
    return q[..., : last + 1].transpose(1, 2).contiguous()

"""The lattice's operators in plain PyTorch: slow, for machines where nothing can be compiled, and an oracle in tests.

`_extension` registers them for a device type that the compiled operators do not serve. The parts of a lattice are those
of csrc/gpu.h; in neighbours, the number of rows stands for a vertex that is not there. On a GPU nothing waits for the
device: buffers have room for as many vertices as there are entries (a pixel's V = D + 1 vertices are entries), and all
sums follow the order of the pixels, so that a result has the same bits every time.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

PARTS = 7  # of a lattice here and on a GPU
CHANNELS = 32  # at once: bounds the memory


def build(features: Tensor, valid: Tensor | None = None) -> list[Tensor]:
    """features (N, P, D) -> the parts of the lattice. valid: not looked at, as it saves work alone.

    Features that cannot be numbered raise ValueError on the CPU; on a GPU their weights are NaN.
    """
    return _build(features, wait=features.device.type == "cpu")


def _build(features: Tensor, wait: bool) -> list[Tensor]:
    """wait: numbers may be looked at, so that wrong features raise and no buffer is larger than it has to be."""
    images, pixels, dimensions = features.shape
    corners, entries = dimensions + 1, images * pixels * (dimensions + 1)
    coordinates, weight, fits = simplices(features)
    if wait and not fits.all():
        raise ValueError("bilateralfilter: features are not finite, or too large: sigmas too small for this image")
    weight = weight.masked_fill(~fits, math.nan)
    if entries == 0:
        zero, none = weight.new_zeros(1).int(), weight.new_empty(corners, 2, 0).int()
        return [weight.int(), weight, zero, none.flatten(), weight.flatten(), none, zero]
    words, steps = _keys(coordinates)
    tables, place = _tables(words)
    order = place.argsort(stable=True)  # by vertex, then by pixel
    ordered = place[order]
    vertex_of = (ordered.diff(prepend=ordered.new_full((1,), -1)) != 0).cumsum(0) - 1
    count = vertex_of[-1:] + 1
    bound = int(count) if wait else entries
    vertices = torch.arange(bound + 1, device=features.device)
    start = torch.searchsorted(vertex_of, vertices)
    example = order[start[:-1].clamp(max=entries - 1)]
    neighbours = torch.full((corners, 2, bound + 1), bound, device=features.device)
    for axis in range(corners):
        place, there = _find([word[example] + step[axis] for word, step in zip(words, steps, strict=True)], tables)
        after = torch.where(there & (vertices[:-1] < count), vertex_of[place], bound)
        neighbours[axis, 1, :-1] = after
        neighbours[axis, 0].scatter_(0, after, vertices[:-1])  # the last column takes what is not there
    vertex = torch.empty_like(order).scatter_(0, order, vertex_of).view(weight.shape)
    ints = [part.int() for part in (vertex, start, order // corners, neighbours[..., :-1].contiguous(), count)]
    return [ints[0], weight, ints[1], ints[2], weight.flatten()[order], ints[3], ints[4]]


def simplices(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The vertices around every feature, int64 (N, P, V, D), without their last coordinate, and weights (N, P, V).

    Section 3.2 of the paper; sum of weights 1. Then which features fit, (N, P, 1): the others count as 0.
    """
    d = features.shape[2]
    v = d + 1
    lifted = [torch.zeros_like(features[..., 0])] * v  # the sum of all further coordinates, less i times its own
    for i in range(d, 0, -1):
        c = features[..., i - 1] * (math.sqrt(2 / 3) * v / math.sqrt(i * (i + 1)))
        lifted[i] = lifted[0] - i * c
        lifted[0] = lifted[0] + c
    lifted = torch.stack(lifted, dim=2)
    limit = 1 << _bits(d) - 1
    most = 1 << 20 if features.dtype == torch.float32 and limit > 1 << 20 else limit - 3 * v
    fits = (lifted.abs() < most).all(2, keepdim=True)
    lifted = torch.where(fits, lifted, 0.0)
    up = lifted / v
    nearest = (up + 0.5 * up.sign()).trunc()
    order = (lifted - nearest * v).argsort(dim=2, descending=True, stable=True)
    ranks = torch.arange(v, device=features.device)
    rank = torch.empty_like(order).scatter_(2, order, ranks.expand_as(order).contiguous())
    rank += nearest.sum(2, keepdim=True).long()
    shift = (rank < 0).long() - (rank > d).long()
    rank += shift * v
    nearest = (nearest.long() + shift) * v
    rest = torch.empty_like(lifted).scatter_(2, rank, (lifted - nearest) / v)  # by rank
    weight = torch.cat([rest, rest[..., :1] - 1], dim=2).diff(dim=2).neg().flip(2)
    k = ranks[:, None]
    return nearest[..., None, :d] + k - v * (rank[..., None, :d] > d - k), weight, fits


def _bits(d: int) -> int:
    """Of a coordinate, of which (D + 1) // 2 share a word."""
    return min(31, 64 // ((d + 1) // 2))


def _keys(coordinates: Tensor) -> tuple[list[Tensor], list[list[int]]]:
    """Coordinates (N, P, V, D) as words: the image and two of packed coordinates; their steps in every direction."""
    images, *_, d = coordinates.shape
    words = [torch.arange(images, device=coordinates.device)[:, None, None].expand(coordinates.shape[:3]).flatten()]
    steps = [[0] * (d + 1)]
    half, bits = (d + 1) // 2, _bits(d)
    for part in (range(half), range(half, d)):
        fields = [(coordinates[..., i].flatten() + (1 << bits - 1)) << bits * (i - part[0]) for i in part]
        words.append(sum(fields, torch.zeros_like(words[0])))
        steps.append([sum((d if i == axis else -1) << bits * (i - part[0]) for i in part) for axis in range(d + 1)])
    return words, steps


def _tables(words: list[Tensor]) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Sorted numbers in which `_find` looks keys up, two for each word but the first, and the places of these keys.

    A word's place in the one and the place of the words before it, both below 2^31, make a number of the other.
    """
    tables, place = [], words[0]
    for word in words[1:]:
        known = word.sort()[0]
        pair = (place << 31) + torch.searchsorted(known, word)
        pairs = pair.sort()[0]
        place = torch.searchsorted(pairs, pair)
        tables.append((known, pairs))
    return tables, place


def _find(words: list[Tensor], tables: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The first place of every key among the sorted known ones, and whether it is there at all."""
    def look(table: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        at = torch.searchsorted(table, wanted).clamp(max=len(table) - 1)
        return at, table[at] == wanted

    place, there = words[0], True
    for word, (known, pairs) in zip(words[1:], tables, strict=True):
        at, is_word = look(known, word)
        place, is_pair = look(pairs, (place << 31) + at)
        there = is_word & is_pair & there
    return place, there


def apply(values: Tensor, lattice: list[Tensor], transposed: bool) -> Tensor:
    """The filter of values (N, P, K)."""
    vertex, weight, start, pixel, pixel_weight, neighbours, _ = lattice
    if len(vertex) == 1 != len(values):  # one lattice for all images: these become channels
        images, pixels, channels = values.shape
        together = apply(values.transpose(0, 1).reshape(1, pixels, images * channels), lattice, transposed)
        return torch.empty_like(values).copy_(together.view(pixels, images, channels).transpose(0, 1))
    out = torch.empty_like(values)
    if values.numel() == 0:
        return out
    corners, _, bound = neighbours.shape
    for part, filtered in zip(values.split(CHANNELS, dim=2), out.split(CHANNELS, dim=2), strict=True):
        splat = part.flatten(0, 1)[pixel] * pixel_weight[:, None]
        rows = torch.segment_reduce(splat, "sum", offsets=start, initial=0, unsafe=True)  # unsafe: does not look
        rows = F.pad(rows, (0, 0, 0, 1))  # the last stays 0: the neighbour that is not there
        for axis in reversed(range(corners)) if transposed else range(corners):
            before, after = neighbours[axis]
            rows[:bound] += 0.5 * (rows[before] + rows[after])
        slices = (rows[vertex[..., k]] * weight[..., k, None] for k in range(corners))
        filtered.copy_(sum(slices) / (1 + 2.0**-(corners - 1)))
    return out


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

"""PAR's operators against plain PyTorch: numbers, sizes, types, threads, errors. test_gpu.py has those of the GPU."""

import pytest
import torch
import torch.nn.functional as F

from bilateralfilter import par
from model.par import COLOUR_WIDTH, _position_weights, par_affinity, par_refine
from tests.bilateralfilter.slow import random

DILATIONS = (1, 2, 4, 8, 12, 24)
operators = torch.ops.bilateralfilter
SIZES = [(2, 1, 1), (1, 3, 5), (2, 31, 8), (3, 37, 61), (0, 4, 5)]


def inputs(batch, height, width, smooth=False, dtype=torch.float32):
    images = random(batch, 3, height, width, dtype=dtype)
    if smooth and batch:
        images = F.interpolate(images[..., :4, :4], (height, width), mode="bicubic").clamp(0, 1)
    position = _position_weights(DILATIONS, images.device).to(dtype)
    return images, position, DILATIONS, COLOUR_WIDTH


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_equals_plain_pytorch(size, smooth, dtype):
    """Also where dilations are larger than the image. float32 of ten iterations is compared with float64: plain
    PyTorch itself is off by up to 2.4e-6 there, ours by 6e-7.
    """
    given = inputs(*size, smooth, dtype)
    affinity, plain = par.affinity(*given), par.par_affinity(*given)
    eps = 1e-6 if dtype == torch.float32 else 1e-14
    torch.testing.assert_close(affinity, plain, rtol=0, atol=eps)
    for channels in (1, 2, 3, 5, 6, 8, 15):
        maps = random(size[0], channels, *size[1:], seed=2, dtype=dtype)
        exact = par.par_refine(maps.double(), affinity.double(), DILATIONS, 10)
        refined = par.refine(maps, affinity, DILATIONS, 10)
        assert refined.dtype == dtype
        torch.testing.assert_close(refined.double(), exact, rtol=0, atol=eps)
    assert torch.equal(par.refine(maps, affinity, DILATIONS, 0), maps)


def test_layouts_and_types():
    images, position, *rest = inputs(2, 9, 11)
    affinity, maps = par.affinity(images, position, *rest), random(2, 3, 9, 11, seed=2)
    refined = par.refine(maps, affinity, DILATIONS, 2)
    strided = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in (images, maps, affinity)]
    assert torch.equal(par.affinity(strided[0], position, *rest), affinity)
    assert torch.equal(par.refine(*strided[1:], DILATIONS, 2), refined)
    half = par.affinity(images.half(), position, *rest)
    assert torch.equal(half, par.affinity(images.half().float(), position, *rest))
    assert par.refine(maps.double(), affinity, DILATIONS, 2).dtype == torch.float32


@pytest.mark.parametrize("batch", [1, 2])
def test_same_bits_on_any_number_of_threads(batch):
    given, before, found = inputs(batch, 29, 37), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 2, 1):
            torch.set_num_threads(count)
            affinity = par.affinity(*given)
            found.append((affinity, par.refine(random(batch, 7, 29, 37, seed=2), affinity, DILATIONS, 3)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_operators_obey_torch():
    images, position, dilations, width = inputs(2, 9, 11)
    torch.library.opcheck(operators.par_affinity.default, (images, position, list(dilations), width))
    affinity = par.affinity(images, position, dilations, width)
    torch.library.opcheck(operators.par_refine.default, (random(2, 3, 9, 11), affinity, list(dilations), 2))


def test_a_gradient_is_refused():
    images = inputs(1, 5, 5)[0].requires_grad_()
    affinity = par_affinity(images, (1, 2))
    for result in (affinity, par_refine(random(1, 2, 3, 3).requires_grad_(), affinity.detach(), (1, 2), 2)):
        with pytest.raises(RuntimeError, match="PAR has no gradient"):
            result.sum().backward()


IMAGES, AFFINITY = torch.zeros(2, 3, 4, 5), torch.zeros(2, 16, 4, 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: par_affinity(IMAGES[0], (1, 2)), r"images must be .*not torch.float32 \(3, 4, 5\)"),
        (lambda: par_affinity(IMAGES.long(), (1, 2)), "not torch.int64"),
        (lambda: par_affinity(IMAGES[:, :0], (1, 2)), r"\(2, 0, 4, 5\)"),
        (lambda: par_affinity(IMAGES, ()), "dilations must be 1 to 16"),
        (lambda: par_affinity(IMAGES, (1, 0)), r"not \[1, 0\]"),
        (lambda: par_affinity(IMAGES, range(1, 18)), "dilations must be 1 to 16"),
        (lambda: par.affinity(IMAGES, torch.zeros(15), (1, 2), 0.3), r"16 positions, not \(15,\)"),
        (lambda: par_refine(IMAGES[0], AFFINITY, (1, 2), 1), r"maps \(B, C, H, W\)"),
        (lambda: par_refine(IMAGES[:1], AFFINITY, (1, 2), 1), r"\(1, 3, 4, 5\) and \(2, 16, 4, 5\)"),
        (lambda: par_refine(IMAGES, AFFINITY, (1, 2, 4), 1), r"\(B, 24, H, W\)"),
        (lambda: par_refine(IMAGES, AFFINITY.half(), (1, 2), 1), "not torch.float16"),
        (lambda: par_refine(IMAGES, AFFINITY.to("meta"), (1, 2), 1), "on meta"),
        (lambda: par_refine(IMAGES, AFFINITY, (1, 2), -1), "iterations 0 or more"),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()

"""The operators in plain PyTorch, as a GPU without compiled ones runs them."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bilateralfilter import Lattice, _extension, pytorch
from tests.bilateralfilter.slow import random

ATOMIC = tuple(f"aten.{name}" for name in ("index_add", "index_put", "index_reduce", "scatter_add", "scatter_reduce"))


class OnlyCuda(TorchDispatchMode):
    """Every tensor of every operator is on the GPU: nothing is copied to it or from it, which would wait.
    None adds in the order in which threads come."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        assert {x.device.type for x in tensors} <= {"cuda"}, func
        assert not str(func).startswith(ATOMIC), func
        return out


@pytest.mark.parametrize("dimensions", range(1, 9))
def test_a_gpu_waits_for_nothing(dimensions):
    """Tensors without numbers: an operator whose result's shape or value had to be read would raise."""
    with FakeTensorMode(), OnlyCuda():
        for images in (0, 1, 2):
            parts = pytorch.build(torch.empty(images, 50, dimensions, device="cuda"))
            out = pytorch.apply(torch.empty(images and 2, 50, 40, device="cuda"), parts, False)
        pytorch.add_(out, torch.empty_like(out), parts)
        stencil = torch.empty(50, 0, 0, device="cuda")
        assert pytorch.mean_field(torch.empty(2, 3, 50, device="cuda"), 1e-5, [], stencil, 5, 2, 1).shape == (2, 3, 50)


@pytest.mark.skipif(not _extension.load("cpu"), reason="nothing can be compiled here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dimensions", range(1, 9))
def test_what_a_gpu_computes_equals_the_compiled_operators(dimensions, dtype, one_thread):
    features = 4 * random(3, 257, dimensions, dtype=dtype) - 1
    values = random(3, 257, 37, seed=2, dtype=dtype) - 0.5
    parts, fewer = pytorch._build(features, wait=False), pytorch._build(features, wait=True)
    count = int(parts[6])
    assert len(parts[2]) == parts[1].numel() + 1 and len(fewer[2]) == count + 1
    assert all(map(torch.equal, (*parts[:2], *parts[3:5]), (*fewer[:2], *fewer[3:5])))
    for transposed in (False, True):
        out, expected = pytorch.apply(values, parts, transposed), Lattice(features).filter(values, transposed)
        assert torch.equal(out, pytorch.apply(values, fewer, transposed))
        assert (out - expected).abs().max() <= 64 * torch.finfo(dtype).eps * expected.abs().max()


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 1e9, -1e30])
def test_features_that_do_not_fit(wrong):
    features = torch.zeros(1, 6, 2)
    features[0, :, 0] = torch.tensor([0, 0.1, 0.2, 100, 100.1, 100.2])
    features[0, 1, 1] = wrong
    with pytest.raises(ValueError, match="not finite, or too large"):
        pytorch.build(features)
    out = pytorch.apply(torch.ones(1, 6, 1), pytorch._build(features, wait=False), False)[0, :, 0]
    assert out[:3].isnan().all()
    assert out[3:].isfinite().all()

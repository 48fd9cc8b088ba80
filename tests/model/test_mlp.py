"""The MLP that recomputes its GELU against timm's, which keeps it."""

import pytest
import timm
import torch
from timm.layers import Mlp
from torch import nn

from model.backbones.mlp import RecomputingMlp


def pair(bias=True):
    torch.manual_seed(0)
    theirs = Mlp(6, 24, bias=bias)
    assert RecomputingMlp.fits(theirs)
    return RecomputingMlp(theirs.fc1, theirs.fc2), theirs


@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_the_same(bias):
    ours, theirs = pair(bias=bias)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    x = torch.randn(3, 5, 6, requires_grad=True)
    given = torch.randn(3, 5, 6)
    results = []
    for mlp in (ours, theirs):
        y = mlp(x)
        results.append([y, *torch.autograd.grad(y, [x, *mlp.parameters()], given)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_under_autocast():
    ours, theirs = pair()
    x = torch.randn(4, 6)
    grads = []
    for mlp in (ours, theirs):
        mlp.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = mlp(x)
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()
        grads.append([p.grad.clone() for p in mlp.parameters()])
    for a, b in zip(*grads, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def test_it_keeps_less():
    ours, theirs = pair()
    x = torch.randn(100, 6)
    kept = []
    for mlp in (ours, theirs):
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.setdefault(t.data_ptr(), t.numel()), lambda t: t):  # noqa: B023
            mlp(x)
        kept.append(sum(sizes.values()))
    assert kept[1] - kept[0] == 100 * 24   # the output of the GELU


def test_only_plain_ones_are_replaced():
    assert not RecomputingMlp.fits(Mlp(6, drop=0.1))
    assert not RecomputingMlp.fits(Mlp(6, act_layer=nn.ReLU))
    assert not RecomputingMlp.fits(Mlp(6, norm_layer=nn.LayerNorm))
    assert not RecomputingMlp.fits(timm.layers.SwiGLU(6))

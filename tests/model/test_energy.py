"""The energy loss against its definition, written out for scale 1/2."""

import pytest
import torch
import torch.nn.functional as F

from bilateralfilter import bilateral_filter
from model.losses.energy import energy_loss
from utils.images import denormalize


def example(batch: int = 2, classes: int = 4, height: int = 24, width: int = 32, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(batch, classes, height, width, generator=generator)
    images = F.interpolate(torch.randn(batch, 3, 4, 5, generator=generator), size=(height, width), mode="bilinear")
    label = torch.randint(0, classes, (batch, height, width), generator=generator)
    label[torch.rand(label.shape, generator=generator) < 0.5] = 255
    return logits, images, label


def gradient(logits: torch.Tensor, *arguments, **options) -> tuple[torch.Tensor, torch.Tensor]:
    logits = logits.clone().requires_grad_()
    loss = energy_loss(logits, *arguments, **options)
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


def test_value_and_gradient_are_the_defined_ones():
    logits, images, label = example()
    loss, grad = gradient(logits, images, label, weight=1e-3, sigma_rgb=20.0, sigma_xy=30.0)

    free = logits.clone().requires_grad_()
    prob = F.avg_pool2d(free.softmax(1), 2)  # bilinear at exactly one half
    gate = (1 - prob.detach().amax(1, keepdim=True)).clamp(min=0)
    gate[label[:, None, ::2, ::2] == 255] = 1
    agreement = gate * bilateral_filter(denormalize(images)[:, :, ::2, ::2], prob, 20.0, 15.0)
    expected = -1e-3 * (prob * agreement).sum() / 2
    (expected_grad,) = torch.autograd.grad(prob, free, -2e-3 * agreement / 2)
    assert torch.allclose(loss, expected.detach(), rtol=1e-5)
    assert torch.allclose(grad, expected_grad, rtol=1e-4, atol=1e-5 * expected_grad.abs().max().item())
    assert loss < 0


def test_upstream_gradient_scales_it():
    logits, images, label = example()
    _, grad = gradient(logits, images, label)
    logits.requires_grad_()
    (scaled,) = torch.autograd.grad(0.25 * energy_loss(logits, images, label), logits)
    assert torch.equal(scaled, 0.25 * grad)


def test_sum_over_images_is_divided_by_the_batch():
    logits, images, label = example()
    each = [energy_loss(logits[i : i + 1], images[i : i + 1], label[i : i + 1]) for i in range(2)]
    assert torch.allclose(energy_loss(logits, images, label), sum(each) / 2)
    assert torch.allclose(energy_loss(logits, images, label, batch_size=8), sum(each) / 8)


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.3])
def test_padding_takes_no_part(scale):
    logits, images, label = example(height=25, width=31)
    valid = torch.ones(label.shape, dtype=torch.bool)
    valid[0, :7], valid[0, :, 22:], valid[1, :, :3] = False, False, False
    loss, grad = gradient(logits, images, label, valid=valid, scale=scale)
    assert not grad[~valid[:, None].expand_as(grad)].any()
    assert grad[valid[:, None].expand_as(grad)].any()
    other = torch.where(valid[:, None], logits, -logits)
    other_label = torch.where(valid, label, 0)
    other_images = torch.where(valid[:, None], images, 3 * torch.rand_like(images))
    other_loss, other_grad = gradient(other, other_images, other_label, valid=valid, scale=scale)
    assert torch.equal(loss, other_loss)
    assert torch.equal(grad, other_grad)


def test_all_valid_is_none_and_none_valid_is_zero():
    logits, images, label = example()
    valid = torch.ones(label.shape, dtype=torch.bool)
    assert torch.equal(energy_loss(logits, images, label, valid=valid), energy_loss(logits, images, label))
    loss, grad = gradient(logits, images, label, valid=~valid)
    assert loss == 0
    assert not grad.any()


def test_sure_labelled_pixels_have_no_energy_and_unlabelled_ones_do():
    _, images, label = example()
    sure = 100 * F.one_hot(label % 4, 4).permute(0, 3, 1, 2).float()
    sure = F.interpolate(sure[:, :, ::2, ::2], scale_factor=2.0, mode="nearest")  # sure at half size too
    assert energy_loss(sure, images, torch.zeros_like(label)) == 0
    assert energy_loss(sure, images, torch.full_like(label, 255)) < 0


def test_is_fp32_under_autocast():
    logits, images, label = example()
    with torch.autocast("cpu", torch.bfloat16):
        loss = energy_loss(logits, images, label)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, energy_loss(logits, images, label))
    assert energy_loss(logits.bfloat16(), images.bfloat16(), label).dtype == torch.float32


@pytest.mark.parametrize(
    ("which", "shape"),
    [("images", (2, 3, 24, 31)), ("label", (2, 12, 16)), ("label", (1, 24, 32)), ("valid", (2, 24, 30))],
)
def test_sizes_that_do_not_fit(which, shape):
    arguments = dict(zip(("logits", "images", "label"), example(), strict=True))
    arguments[which] = torch.ones(shape)
    with pytest.raises(ValueError, match=f"energy_loss: {which}"):
        energy_loss(**arguments)


def test_logits_that_are_not_finite():
    logits, images, label = example()
    logits[0, 0, 0, 0] = float("nan")
    assert energy_loss(logits, images, label).isnan()  # the trainer stops on it, naming the term

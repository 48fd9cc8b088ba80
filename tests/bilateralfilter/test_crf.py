"""DenseCRF: against pydensecrf, a mean field computed with whole matrices, and itself."""

import math

import numpy as np
import pytest
import torch

from bilateralfilter import DenseCRF, pytorch
from bilateralfilter.lattice import bilateral_features, grid_features
from tests.bilateralfilter.slow import random, smooth_images

MORE = {"iterations": 10, "pos_xy_std": 1, "pos_w": 3, "bi_xy_std": 67, "bi_rgb_std": 3, "bi_w": 4}
SHARP = {"iterations": 5, "pos_xy_std": 3, "pos_w": 1, "bi_xy_std": 20, "bi_rgb_std": 13, "bi_w": 6}
# Not 9.5: in a column, x = 0 puts pixels on borders of simplices, and pydensecrf's round-off may choose the other one.
WIDE = {"iterations": 3, "pos_xy_std": 0.5, "pos_w": 2.5, "bi_xy_std": 9.4, "bi_rgb_std": 30, "bi_w": 0.7}
ONE_KERNEL = {"appearance": {**SHARP, "pos_w": 0}, "smoothness": {**SHARP, "bi_w": 0}}
SETTINGS = {"more": MORE, "sharp": SHARP, "wide": WIDE, **ONE_KERNEL}


def scene(n: int, classes: int, height: int, width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy smooth uint8 images and probabilities that follow their colours, noisily."""
    images = smooth_images(n, height, width, seed)
    images = (images + 20 * random(n, 3, height, width, seed=seed + 1)).clamp(0, 255).round()
    centres = random(classes, 3, seed=seed + 2) * 255
    distance = (images[:, None] - centres[:, :, None, None]).norm(dim=2) / 60
    noise = 2 * random(n, classes, height, width, seed=seed + 3)
    return images.to(torch.uint8), (noise - distance).softmax(1)


def by_pydensecrf(images: torch.Tensor, prob: torch.Tensor, compatibility=None, **settings) -> torch.Tensor:
    densecrf = pytest.importorskip("pydensecrf.densecrf")
    _, classes, height, width = prob.shape
    costs = 1.0 if compatibility is None else compatibility.numpy()
    out = []
    for image, p in zip(images, prob, strict=True):
        crf = densecrf.DenseCRF2D(width, height, classes)
        crf.setUnaryEnergy((-p.clamp(1e-5, 1).log()).reshape(classes, -1).contiguous().numpy())
        if settings["pos_w"]:
            crf.addPairwiseGaussian(sxy=settings["pos_xy_std"], compat=settings["pos_w"] * costs)
        if settings["bi_w"]:
            crf.addPairwiseBilateral(
                sxy=settings["bi_xy_std"],
                srgb=settings["bi_rgb_std"],
                rgbim=image.permute(1, 2, 0).contiguous().numpy(),
                compat=settings["bi_w"] * costs,
            )
        out.append(torch.from_numpy(np.array(crf.inference(settings["iterations"]))).reshape(p.shape))
    return torch.stack(out)


def symmetric(classes: int) -> torch.Tensor:
    """Costs of pairs of labels, their own included."""
    costs = random(classes, classes, seed=5) - 0.3
    return (costs + costs.T) / 2 - torch.eye(classes)


def same(out: torch.Tensor, expected: torch.Tensor) -> None:
    assert out.dtype == torch.float32
    assert out.shape == expected.shape
    assert (out - expected).abs().max() <= 2e-3
    assert (out.argmax(1) == expected.argmax(1)).double().mean() >= 0.999


# ---- pydensecrf ----


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize(
    ("n", "classes", "height", "width"), [(2, 2, 40, 61), (1, 21, 67, 50), (1, 5, 1, 90), (1, 3, 83, 1), (1, 2, 1, 1)]
)
def test_equals_pydensecrf(n, classes, height, width, settings):
    images, prob = scene(n, classes, height, width)
    same(DenseCRF(**settings)(images, prob), by_pydensecrf(images, prob, **settings))


@pytest.mark.parametrize("classes", [21, 81])
def test_equals_pydensecrf_with_scores_of_a_few_classes(classes):
    """Scores as a CAM gives them: they do not sum to 1, and most classes are 0 everywhere."""
    images, prob = scene(1, 4, 60, 75)
    scores = torch.zeros(1, classes, 60, 75)
    scores[:, [0, 3, 7, classes - 1]] = prob * 1.4
    same(DenseCRF(**MORE)(images, scores), by_pydensecrf(images, scores, **MORE))


@pytest.mark.parametrize("settings", [MORE, SHARP], ids=["more", "sharp"])
def test_full_compatibility_equals_pydensecrf(settings):
    images, prob = scene(2, 6, 43, 37)
    costs = symmetric(6)
    out = DenseCRF(**settings, compatibility=costs)(images, prob)
    same(out, by_pydensecrf(images, prob, compatibility=costs, **settings))
    assert (out - DenseCRF(**settings)(images, prob)).abs().max() > 0.05


# ---- whole matrices ----


def whole_kernel(features: torch.Tensor) -> torch.Tensor:
    """features (P, D) -> the normalised kernel as a matrix (P, P), float64, by the plain PyTorch lattice."""
    eye = torch.eye(len(features), dtype=torch.float64)
    kernel = pytorch.apply(eye[None], pytorch.build(features.double()[None]), False)[0]
    n = (kernel.sum(1) + 1e-20) ** -0.5
    return n[:, None] * kernel * n


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("iterations", [1, 4])
def test_equals_a_mean_field_of_whole_matrices(iterations, full):
    """The compatibility is not symmetric: a row is what its label pays."""
    settings = {**SHARP, "iterations": iterations}
    images, prob = scene(1, 3, 9, 11)
    costs = random(3, 3, seed=9) - 0.5 if full else -torch.eye(3)
    kernel = settings["pos_w"] * whole_kernel(grid_features(9, 11, settings["pos_xy_std"], prob)[0])
    kernel += settings["bi_w"] * whole_kernel(
        bilateral_features(images.float(), settings["bi_rgb_std"], settings["bi_xy_std"])[0]
    )
    unary = -prob[0].flatten(1).T.double().log()
    q = (-unary).softmax(1)
    for _ in range(iterations):
        q = (-unary - kernel @ q @ costs.double().T).softmax(1)
    out = DenseCRF(**settings, compatibility=costs.double() if full else None)(images, prob)
    assert (out[0].flatten(1).T - q).abs().max() <= 4e-6


# ---- itself ----


@pytest.mark.parametrize("classes", [3, 8])
@pytest.mark.parametrize(("absent", "tolerance"), [(False, 1e-6), (True, 5e-5)])
def test_a_batch_equals_one_by_one(classes, absent, tolerance):
    """absent: classes of which some images of the batch have none."""
    images, prob = scene(3, classes, 31, 45)
    if absent:
        prob[0, [0, 1]], prob[1, [1, 2]] = 0, 0
    for compatibility in (None, symmetric(classes)):
        crf = DenseCRF(**MORE, compatibility=compatibility)
        together = crf(images, prob)
        for i in range(3):
            assert (crf(images[i : i + 1], prob[i : i + 1])[0] - together[i]).abs().max() <= tolerance


@pytest.mark.parametrize("absent", [0.0, 1e-5, -0.5, 1e-7])
def test_leaving_absent_classes_out_changes_nothing(absent):
    images, prob = scene(1, 4, 33, 47)
    scores = torch.full((1, 21, 33, 47), absent)
    scores[:, [0, 5, 6, 20]] = prob
    crf = DenseCRF(**WIDE)
    kept, copies = crf._different(scores)
    assert sorted(kept.tolist()) == [0, 1, 5, 6, 20]
    assert copies == 17
    everything = DenseCRF(**WIDE, compatibility=-torch.eye(21))
    assert len(everything._different(scores)[0]) == 21
    out, expected = crf(images, scores), everything(images, scores)
    assert (out - expected).abs().max() <= 1e-5
    assert (out.sum(1) - 1).abs().max() <= 1e-5


def test_only_absent_classes_are_all_alike():
    images, _ = scene(1, 2, 12, 13)
    assert torch.allclose(DenseCRF(**MORE)(images, torch.zeros(1, 30, 12, 13)), torch.tensor(1 / 30))


@pytest.mark.parametrize("settings", [{**MORE, "iterations": 0}, {**MORE, "pos_w": 0, "bi_w": 0}])
def test_without_iterations_or_kernels_it_normalises_clipped_scores(settings):
    images, prob = scene(2, 4, 14, 15)
    prob[:, 0, :3], prob[:, 1, 5:8] = 0, 2.5
    expected = prob.clamp(1e-5, 1) / prob.clamp(1e-5, 1).sum(1, keepdim=True)
    for compatibility in (None, symmetric(4)):
        out = DenseCRF(**settings, compatibility=compatibility)(images, prob)
        assert (out - expected).abs().max() <= 1e-6


def test_one_class_is_everywhere():
    images, prob = scene(2, 1, 8, 9)
    assert torch.equal(DenseCRF(**MORE)(images, prob * 0.3), torch.ones(2, 1, 8, 9))


@pytest.mark.parametrize("shape", [(0, 4, 8, 9), (2, 4, 0, 9), (2, 4, 8, 0)])
def test_nothing_to_refine(shape):
    n, _, height, width = shape
    out = DenseCRF(**MORE)(torch.zeros(n, 3, height, width), torch.zeros(shape))
    assert out.shape == shape
    assert out.dtype == torch.float32


def test_types_layouts_and_autocast():
    images, prob = scene(2, 5, 23, 19)
    out = DenseCRF(**MORE)(images, prob)
    before = images.clone(), prob.clone()
    channels_last = prob.contiguous(memory_format=torch.channels_last)
    pixels_first = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    for i, p in ((images.float(), prob), (images.double(), prob.double()), (pixels_first, channels_last)):
        assert torch.equal(DenseCRF(**MORE)(i, p), out)
    for half in (torch.float16, torch.bfloat16):
        assert torch.equal(DenseCRF(**MORE)(images, prob.to(half)), DenseCRF(**MORE)(images, prob.to(half).float()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(DenseCRF(**MORE)(images, prob), out)
        costs = symmetric(5)
        low = DenseCRF(**MORE, compatibility=costs)(images, prob)
    assert torch.equal(low, DenseCRF(**MORE, compatibility=costs)(images, prob))
    assert not DenseCRF(**MORE)(images, prob.requires_grad_()).requires_grad
    assert torch.equal(images, before[0])
    assert torch.equal(prob, before[1])


# ---- errors ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pos_xy_std": 0}, "pos_xy_std must be positive, not 0"),
        ({"bi_xy_std": -1}, "bi_xy_std must be positive"),
        ({"bi_rgb_std": math.nan}, "bi_rgb_std must be positive"),
        ({"bi_rgb_std": math.inf}, "bi_rgb_std must be positive"),
        ({"pos_w": -1}, "pos_w must be 0 or more"),
        ({"bi_w": math.nan}, "bi_w must be 0 or more"),
        ({"iterations": -1}, "iterations must be 0 or more"),
        ({"compatibility": torch.zeros(3)}, r"compatibility must be \(C, C\), not \(3,\)"),
        ({"compatibility": torch.zeros(3, 4)}, r"compatibility must be \(C, C\), not \(3, 4\)"),
        ({"compatibility": torch.eye(4)}, "compatibility is for 4 classes, prob has 2"),
        ({"bi_rgb_std": 1e-9}, "sigmas too small"),   # for this image
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        DenseCRF(**settings)(torch.full((1, 3, 8, 8), 200.0), torch.ones(1, 2, 8, 8))


@pytest.mark.parametrize(
    ("images", "prob", "message"),
    [
        (torch.zeros(3, 8, 8), torch.ones(1, 2, 8, 8), r"images must be \(N, 3, H, W\), not \(3, 8, 8\)"),
        (torch.zeros(1, 1, 8, 8), torch.ones(1, 2, 8, 8), "images must be"),
        (torch.zeros(1, 3, 8, 9), torch.ones(1, 2, 8, 8), "prob must be"),
        (torch.zeros(2, 3, 8, 8), torch.ones(1, 2, 8, 8), "prob must be"),
        (torch.zeros(1, 3, 8, 8), torch.ones(2, 8, 8), "prob must be"),
        (torch.zeros(1, 3, 8, 8), torch.ones(1, 0, 8, 8), "prob must be"),
        (torch.zeros(1, 3, 8, 8), torch.ones(1, 2, 8, 8, dtype=torch.int64), "not torch.int64"),
        (torch.zeros(1, 3, 8, 8), torch.full((1, 2, 8, 8), math.nan), "prob hold NaN"),
        (torch.zeros(1, 3, 8, 8), torch.full((1, 2, 8, 8), math.inf), "prob hold NaN or infinity"),
        (torch.full((1, 3, 8, 8), math.nan), torch.ones(1, 2, 8, 8), "images hold NaN"),
        (torch.zeros(1, 3, 8, 8, device="meta"), torch.ones(1, 2, 8, 8), "images are on meta, prob on cpu"),
        (torch.zeros(1, 3, 8, 8), torch.ones(1, 2, 8, 8, device="meta"), "images are on cpu, prob on meta"),
    ],
)
def test_wrong_arguments(images, prob, message):
    with pytest.raises(ValueError, match=message):
        DenseCRF(**SHARP)(images, prob)


@pytest.mark.gpu
def test_a_gpu_equals_the_cpu():
    images, prob = scene(2, 21, 60, 75)
    out = DenseCRF(**MORE)(images.cuda(), prob.cuda())
    assert out.is_cuda
    same(out.cpu(), DenseCRF(**MORE)(images, prob))

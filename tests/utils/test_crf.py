"""The dense CRF wrapper."""

import importlib.util
import sys

import numpy as np
import pytest
import torch

from utils.crf import dense_crf
from utils.errors import UserError

SETTINGS = {"iterations": 5, "pos_xy_std": 1, "pos_w": 3, "bi_xy_std": 20, "bi_rgb_std": 5, "bi_w": 4}


def halves(height: int = 20, width: int = 30) -> tuple[np.ndarray, np.ndarray]:
    """An image of two colours, and noisy probabilities of (left, right) that are mostly right."""
    image = np.full((height, width, 3), 40, np.uint8)
    image[:, width // 2 :] = 200
    right = 0.15 + 0.5 * np.random.default_rng(0).random((height, width)) + 0.2 * (image[..., 0] > 100)
    return image, np.stack([1 - right, right]).astype(np.float32)


BACKENDS = ["lattice", pytest.param("pydensecrf", marks=pytest.mark.skipif(
    importlib.util.find_spec("pydensecrf") is None, reason="pydensecrf is not installed"))]


def refine(image: np.ndarray, prob: np.ndarray, **settings) -> np.ndarray:
    return dense_crf(image, torch.from_numpy(prob), **settings).numpy()


@pytest.mark.parametrize("backend", BACKENDS)
def test_pulls_labels_to_the_edges_of_the_image(backend):
    image, prob = halves()
    truth = image[..., 0] > 100
    q = refine(image, prob, **SETTINGS, backend=backend)
    assert q.dtype == np.float32
    assert q.shape == prob.shape
    np.testing.assert_allclose(q.sum(0), 1, atol=1e-5)
    assert (prob.argmax(0) == truth).mean() < 0.9
    assert (q.argmax(0) == truth).mean() > 0.99


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_iterations_it_normalises_clipped_scores(backend):
    image, prob = halves()
    prob[0, :3], prob[1, 5:8] = 0, 2.5
    clipped = np.clip(prob, 1e-5, 1)
    q = refine(image, prob, **{**SETTINGS, "iterations": 0}, backend=backend)
    np.testing.assert_allclose(q, clipped / clipped.sum(0), rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_leaves_its_input_alone_and_takes_any_layout(backend):
    image, prob = halves()
    before = prob.copy()
    q = refine(image, prob, **SETTINGS, backend=backend)
    np.testing.assert_array_equal(prob, before)
    flipped = np.asfortranarray(image)
    strided = np.asfortranarray(prob.astype(np.float64))
    np.testing.assert_array_equal(refine(flipped, strided, **SETTINGS, backend=backend), q)


@pytest.mark.parametrize(
    ("image", "prob", "message"),
    [
        (np.zeros((8, 8), np.uint8), np.ones((2, 8, 8)), "uint8 \\(H, W, 3\\)"),
        (np.zeros((8, 8, 3)), np.ones((2, 8, 8)), "not float64"),
        (np.zeros((8, 9, 3), np.uint8), np.ones((2, 8, 8)), "prob must be"),
        (np.zeros((8, 8, 3), np.uint8), np.full((2, 8, 8), np.nan), "NaN"),
    ],
)
def test_wrong_arguments(image, prob, message):
    with pytest.raises(ValueError, match=message):
        refine(image, prob, **SETTINGS)


def test_unknown_backend():
    with pytest.raises(ValueError, match="lattice or pydensecrf, not other"):
        refine(*halves(), **SETTINGS, backend="other")


def test_both_backends_agree():
    pytest.importorskip("pydensecrf", reason="pydensecrf is not installed")
    ours, theirs = (refine(*halves(), **SETTINGS, backend=backend) for backend in ("lattice", "pydensecrf"))
    np.testing.assert_allclose(ours, theirs, atol=2e-3)


def test_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydensecrf.densecrf", None)
    with pytest.raises(UserError, match="pip install pydensecrf2"):
        refine(*halves(), **SETTINGS, backend="pydensecrf")

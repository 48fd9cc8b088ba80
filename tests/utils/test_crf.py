"""The dense CRF wrapper."""

import sys

import numpy as np
import pytest

from utils.crf import dense_crf
from utils.errors import UserError

SETTINGS = {"iterations": 5, "pos_xy_std": 1, "pos_w": 3, "bi_xy_std": 20, "bi_rgb_std": 5, "bi_w": 4}


def halves(height: int = 20, width: int = 30) -> tuple[np.ndarray, np.ndarray]:
    """An image of two colours, and noisy probabilities of (left, right) that are mostly right."""
    image = np.full((height, width, 3), 40, np.uint8)
    image[:, width // 2 :] = 200
    right = 0.15 + 0.5 * np.random.default_rng(0).random((height, width)) + 0.2 * (image[..., 0] > 100)
    return image, np.stack([1 - right, right]).astype(np.float32)


def test_pulls_labels_to_the_edges_of_the_image():
    image, prob = halves()
    truth = image[..., 0] > 100
    q = dense_crf(image, prob, **SETTINGS)
    assert q.dtype == np.float32
    assert q.shape == prob.shape
    np.testing.assert_allclose(q.sum(0), 1, atol=1e-5)
    assert (prob.argmax(0) == truth).mean() < 0.9
    assert (q.argmax(0) == truth).mean() > 0.99


def test_without_iterations_it_normalises_clipped_scores():
    image, prob = halves()
    prob[0, :3], prob[1, 5:8] = 0, 2.5
    clipped = np.clip(prob, 1e-5, 1)
    q = dense_crf(image, prob, **{**SETTINGS, "iterations": 0})
    np.testing.assert_allclose(q, clipped / clipped.sum(0), rtol=1e-4)


def test_leaves_its_input_alone_and_takes_any_layout():
    image, prob = halves()
    before = prob.copy()
    q = dense_crf(image, prob, **SETTINGS)
    np.testing.assert_array_equal(prob, before)
    flipped = np.asfortranarray(image)
    np.testing.assert_array_equal(dense_crf(flipped, np.asfortranarray(prob.astype(np.float64)), **SETTINGS), q)


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
        dense_crf(image, prob, **SETTINGS)


def test_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydensecrf.densecrf", None)
    with pytest.raises(UserError, match="pip install pydensecrf2"):
        dense_crf(*halves(), **SETTINGS)

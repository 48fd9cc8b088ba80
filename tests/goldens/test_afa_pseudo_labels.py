"""Random walk, affinity loss, segmentation loss, PAR and pseudo labels of AFA against the released code."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from model.afa.affinity import affinity_loss, near_pairs, random_walk
from model.afa.method import scores_with_background
from model.losses.segmentation import segmentation_loss
from model.par import par_affinity, par_refine
from model.pseudo_labels import labels_of_refined, present_first, refined_labels, threshold
from tests.goldens.afa import affinity_target, cases
from utils.images import IGNORE

NUM_CLASSES = 80   # at least as many as the labels have


def tensor(arrays, name):
    return torch.from_numpy(arrays[name])


def test_masks(golden):
    arrays = golden("afa/propagation.npz")
    for h, w, radius in arrays["mask_sizes"].tolist():
        ours = near_pairs((h, w), radius, torch.device("cpu"))
        np.testing.assert_array_equal(ours, arrays[f"mask_{h}x{w}_r{radius}"] > 0)


def test_random_walk(golden):
    arrays = golden("afa/propagation.npz")
    for case in cases(arrays):
        cams, labels = tensor(arrays, f"{case}__cams"), tensor(arrays, f"{case}__cls_label")
        matrix, radius = tensor(arrays, f"{case}__aff")[: len(cams)], int(arrays[f"{case}__radius"])
        present, grid = present_first(labels), tuple(cams.shape[2:])

        def block(rows, columns, matrix=matrix):
            return matrix[:, rows, columns]

        for name, background in zip(("low", "high"), arrays[f"{case}__bkg_scores"].tolist(), strict=True):
            scores = scores_with_background(present.of(cams), present, grid, background)
            ours = spread(random_walk(scores, block, radius), present, cams.shape[1])
            np.testing.assert_allclose(ours, arrays[f"{case}__with_bkg_{name}"], rtol=1e-5, atol=1e-6, err_msg=case)
        ours = random_walk(cams, block, radius, eps=1e-4)   # of all classes
        np.testing.assert_allclose(ours, arrays[f"{case}__no_bkg"], rtol=1e-5, atol=1e-6, err_msg=case)


def spread(walked, present, classes):
    """(B, 1 + M, h, w) of background and the present classes -> (B, K+1, h, w), absent classes 0."""
    result = walked.new_zeros(len(walked), classes + 1, *walked.shape[2:])
    result[:, 0] = walked[:, 0]
    for image, (ids, there) in enumerate(zip(present.classes, present.there, strict=True)):
        result[image, ids[there] + 1] = walked[image, 1:][there]
    return result


def test_affinity_labels_and_loss(golden):
    arrays = golden("afa/affinity.npz")
    for case in cases(arrays):
        cam_label, radius = tensor(arrays, f"{case}__cam_label"), int(arrays[f"{case}__radius"])
        grid = [side // 16 for side in cam_label.shape[1:]]
        labels = F.interpolate(cam_label[:, None].float(), grid)[:, 0].long()
        target = affinity_target(labels, radius)
        np.testing.assert_array_equal(target, arrays[f"{case}__aff_label"], err_msg=case)
        for value, name in ((1, "pos_count"), (0, "neg_count")):
            assert int((target == value).sum()) + 1 == int(arrays[f"{case}__{name}"])
        affinity = tensor(arrays, f"{case}__attn_pred").requires_grad_()
        loss = affinity_loss(affinity, labels, NUM_CLASSES, radius)
        loss.backward()
        np.testing.assert_allclose(loss.detach(), arrays[f"{case}__loss"], rtol=1e-6, err_msg=case)
        np.testing.assert_allclose(affinity.grad, arrays[f"{case}__grad"], rtol=0, atol=1e-8, err_msg=case)


def test_segmentation_loss(golden):
    """Where the released loss is 0/0 ours is the half that is left; the gradients agree all the same."""
    arrays = golden("afa/seg_loss.npz")
    for case in cases(arrays):
        logits = tensor(arrays, "logits").clone().requires_grad_()
        loss = segmentation_loss(logits, tensor(arrays, f"{case}__label").long())
        loss.backward()
        assert loss.isfinite()
        if not int(arrays[f"{case}__reference_not_finite"]):
            np.testing.assert_allclose(loss.detach(), arrays[f"{case}__loss"], rtol=1e-6, err_msg=case)
        np.testing.assert_allclose(logits.grad, arrays[f"{case}__grad"], rtol=0, atol=1e-8, err_msg=case)


def test_par(golden):
    arrays = golden("afa/par.npz")
    dilations = arrays["dilations"].tolist()
    names = [name.removesuffix("__masks") for name in arrays.files if name.endswith("__masks")]
    assert names
    for case in names:
        image = tensor(arrays, f"{case}__image_u8").permute(2, 0, 1)[None].float() / 255
        affinity = par_affinity(image, dilations)
        ours = par_refine(tensor(arrays, f"{case}__masks"), affinity, dilations, int(arrays[f"{case}__num_iter"]))
        np.testing.assert_allclose(ours, arrays[f"{case}__out"], rtol=0, atol=5e-6, err_msg=case)


@pytest.fixture(scope="module")
def maps(golden):
    """Arrays, CAMs, images, image labels, boxes and PAR's settings."""
    arrays = golden("afa/pseudo_labels.npz")
    images = tensor(arrays, "images_u8").permute(0, 3, 1, 2).float() / 255
    h, w = images.shape[2:]   # released boxes may end outside
    boxes = [(top, min(bottom, h), left, min(right, w)) for top, bottom, left, right in arrays["img_box"].tolist()]
    par = arrays["par_dilations"].tolist(), int(arrays["par_num_iter"])
    return arrays, tensor(arrays, "cams_u8").float() / 256, images, tensor(arrays, "cls_label"), boxes, par


def inside(boxes, shape):
    mask = torch.zeros(len(boxes), *shape, dtype=torch.bool)
    for image, (top, bottom, left, right) in enumerate(boxes):
        mask[image, top:bottom, left:right] = True
    return mask


def test_thresholds(maps):
    arrays, cams, _, labels, boxes, _ = maps
    present, high, low = present_first(labels), float(arrays["high_thre"]), float(arrays["low_thre"])
    valid, bkg = inside(boxes, cams.shape[2:]), float(arrays["bkg_score"])
    label = threshold(present.of(cams), present, high, low).masked_fill(~valid, IGNORE)
    np.testing.assert_array_equal(label, arrays["label_mid"])
    plain = threshold(present.of(cams), present, bkg, bkg)
    np.testing.assert_array_equal(plain, arrays["label_nobox"])
    np.testing.assert_array_equal(plain.masked_fill(~valid, IGNORE), arrays["label_nomid"])
    np.testing.assert_array_equal((cams * labels[:, :, None, None]).amax(1), arrays["valid_cam_max"])


def test_refined_cam_labels(maps):
    arrays, cams, images, labels, boxes, par = maps
    present = present_first(labels)
    ours = refined_labels(
        present.of(cams), present, images, float(arrays["high_thre"]), float(arrays["low_thre"]), *par
    ).masked_fill(~inside(boxes, cams.shape[2:]), IGNORE)
    assert (ours.numpy() != arrays["refined_label"]).mean() <= 1e-4


def test_refined_affinity_cams(maps):
    """PAR within the box, no softmax. Labels: with one and the same background twice, so that nothing is ignored."""
    arrays, _, images, labels, boxes, (dilations, iterations) = maps
    aff_cams, label = tensor(arrays, "aff_cams"), torch.full(images.shape[:1] + images.shape[2:], IGNORE)
    refined = torch.zeros_like(aff_cams)
    for image, (top, bottom, left, right) in enumerate(boxes):
        own = slice(image, image + 1), slice(None), slice(top, bottom), slice(left, right)
        part, size = images[own], (bottom - top, right - left)
        present = present_first(labels[image : image + 1])
        given = torch.cat([aff_cams[own][:, :1], present.of(aff_cams[own][:, 1:])], 1)
        half = F.interpolate(part, [side // 2 for side in size], mode="bilinear", align_corners=False)
        smooth = par_refine(given, par_affinity(half, dilations), dilations, iterations)
        smooth = F.interpolate(smooth, size, mode="bilinear", align_corners=False)
        refined[own] = spread(smooth, present, labels.shape[1])
        label[image, top:bottom, left:right] = labels_of_refined(
            given.repeat(1, 2, 1, 1), present, part, dilations, iterations
        )[0]
    np.testing.assert_allclose(refined, arrays["refined_cams"], rtol=0, atol=5e-6)
    assert (label.numpy() != arrays["refined_cams_label"]).mean() <= 1e-4

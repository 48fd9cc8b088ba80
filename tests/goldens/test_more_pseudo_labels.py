"""Thresholds, PAR and refined labels against the released code."""

import numpy as np
import torch

from model.losses.affinity import pair_labels
from model.multi_scale import resize
from model.par import par_affinity, par_refine
from model.pseudo_labels import present_first, refined_labels, threshold

DILATIONS, ITERATIONS = (1, 2, 4, 8, 12, 24), 10
REFINED = {"refined_voc": (0.7, 0.25), "refined_coco": (0.65, 0.25)}   # high and low, from the README of the goldens


def test_labels(golden):
    arrays = golden("more/pseudo_labels.npz")
    cam, labels = torch.from_numpy(arrays["cam_u8"]).float() / 256, torch.from_numpy(arrays["cls_label"])
    tokens, present = resize(cam, arrays["cam_tokens"].shape[-2:]), present_first(labels)
    np.testing.assert_allclose(tokens, arrays["cam_tokens"], rtol=0, atol=1e-6)
    for i, name in enumerate(arrays["variant_names"]):
        maps = tokens if arrays["variant_on_tokens"][i] else cam
        keys = ("high_thre", "low_thre") if arrays["variant_ignore_mid"][i] else ("bkg_thre", "bkg_thre")
        high, low = (float(arrays[f"variant_{key}"][i]) for key in keys)
        ours = threshold(present.of(maps), present, high, low)
        np.testing.assert_array_equal(ours, arrays[f"label__{name}"], err_msg=str(name))
    np.testing.assert_allclose((cam * labels[:, :, None, None]).sum((2, 3)), arrays["valid_cam_sum"], rtol=1e-6)


def test_pairs(golden):
    arrays = golden("more/pseudo_labels.npz")
    same, different = pair_labels(torch.from_numpy(arrays["label__tok_aux"]).flatten(1))
    ours = torch.full(same.shape, int(arrays["ignore_index"])).masked_fill(same, 1).masked_fill(different, 0)
    np.testing.assert_array_equal(ours, arrays["aff_mask"])


def test_refined_labels(golden):
    arrays = golden("more/pseudo_labels.npz")
    cam, labels = torch.from_numpy(arrays["cam_u8"]).float() / 256, torch.from_numpy(arrays["cls_label"])
    images, present = torch.from_numpy(arrays["images_u8"]).permute(0, 3, 1, 2).float() / 255, present_first(labels)
    for name, (high, low) in REFINED.items():
        ours = refined_labels(present.of(cam), present, images, high, low, DILATIONS, ITERATIONS)
        assert (ours.numpy() != arrays[name]).mean() <= 1e-4, name


def test_par(golden):
    arrays = golden("more/par.npz")
    cases = [name.removesuffix("__masks") for name in arrays.files if name.endswith("__masks")]
    assert cases
    for case in cases:
        affinity = par_affinity(torch.from_numpy(arrays[f"{case}__images"]), DILATIONS)
        ours = par_refine(torch.from_numpy(arrays[f"{case}__masks"]), affinity, DILATIONS, ITERATIONS)
        np.testing.assert_allclose(ours, arrays[f"{case}__output"], rtol=0, atol=5e-6, err_msg=case)

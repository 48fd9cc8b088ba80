"""Every loss but the energy loss: values and gradients."""

import numpy as np
import torch
import torch.nn.functional as F

from model.losses.affinity import ptc_loss
from model.losses.segmentation import segmentation_loss
from model.more.lir import certain_loss, sample_uncertain, token_loss, uncertain_loss
from model.pseudo_labels import present_first


def tensor(arrays, name, grad=False):
    return torch.from_numpy(arrays[name]).requires_grad_(grad)


def in_order(seeds, count):
    return torch.arange(count).expand(len(seeds), -1)


def compare(loss, leaf, loss_ref, grad_ref, case, rtol=1e-6, loss_atol=0.0, grad_rtol=0.0, grad_atol=1e-7):
    loss.backward()
    np.testing.assert_allclose(loss.item(), loss_ref, rtol=rtol, atol=loss_atol, err_msg=str(case))
    np.testing.assert_allclose(leaf.grad, grad_ref, rtol=grad_rtol, atol=grad_atol, err_msg=str(case))


def test_certain(golden):
    arrays = golden("more/loss_cre.npz")
    for case in arrays["case_names"]:
        tokens, patches = tensor(arrays, f"{case}__cls_tokens", True), tensor(arrays, f"{case}__patch_map", True)
        mask, labels = tensor(arrays, f"{case}__mask"), tensor(arrays, f"{case}__cls_label")
        loss = certain_loss(tokens, patches, mask, present_first(labels), float(arrays[f"{case}__temp"]))
        right, grad = arrays[f"{case}__loss_f64"], arrays[f"{case}__grad_cls_tokens_f64"]
        wrong = arrays[f"{case}__reference_not_finite"] or not np.isclose(arrays[f"{case}__loss"], right, rtol=1e-3)
        if wrong:   # overflow or underflow of the released float32 formula
            compare(loss, tokens, right, grad, case, rtol=1e-4, loss_atol=1e-6, grad_rtol=1e-4, grad_atol=1e-4)
        else:
            theirs = arrays[f"{case}__loss"], arrays[f"{case}__grad_cls_tokens"]
            compare(loss, tokens, *theirs, case, rtol=1e-5, loss_atol=1e-6, grad_rtol=1e-5, grad_atol=1e-6)
        assert patches.grad is None


def test_uncertain(golden):
    arrays = golden("more/loss_ure.npz")
    for case in arrays["case_names"]:
        tokens, patches = tensor(arrays, f"{case}__cls_tokens", True), tensor(arrays, f"{case}__patch_map", True)
        mask, labels = tensor(arrays, f"{case}__mask"), tensor(arrays, f"{case}__cls_label")
        samples = sample_uncertain(mask, in_order, torch.zeros(len(mask)))
        weights = samples.counts(mask.shape[1:])
        theirs = torch.zeros_like(weights)
        for image, chosen in enumerate(arrays[f"{case}__selected_rc"]):
            for row, column in chosen[: arrays[f"{case}__selected_count"][image]]:
                theirs[image, row, column] += 1
        np.testing.assert_array_equal(weights, theirs, err_msg=str(case))
        code = torch.where(mask == 255, 1, torch.where(mask == 0, 0, 2))
        np.testing.assert_array_equal(code, arrays[f"{case}__roi_mask"], err_msg=str(case))
        loss = uncertain_loss(tokens, patches, samples, labels)
        compare(loss, patches, arrays[f"{case}__loss"], arrays[f"{case}__grad_patch_map"], case, loss_atol=1e-6)
        assert tokens.grad is None


def test_ptc(golden):
    arrays = golden("more/loss_other.npz")
    cases = [n.removesuffix("__patch_map") for n in arrays.files if n.endswith("__patch_map") and "grad" not in n]
    assert cases
    for case in cases:
        patches = tensor(arrays, f"{case}__patch_map", True)
        loss = ptc_loss(patches, tensor(arrays, f"{case}__label"))
        compare(loss, patches, arrays[f"{case}__loss"], arrays[f"{case}__grad_patch_map"], case)


def test_segmentation(golden):
    arrays = golden("more/loss_other.npz")
    for case in arrays["seg_case_names"]:
        logits = tensor(arrays, "seg_logits", True)
        loss = segmentation_loss(logits, tensor(arrays, f"{case}__label"))
        compare(loss, logits, arrays[f"{case}__loss"], arrays[f"{case}__grad_logits"], case)


def test_class_tokens(golden):
    """`loss_full` adds a term that the released training never switches on; `loss_identical` is ln K."""
    arrays = golden("more/loss_other.npz")
    tokens = tensor(arrays, "multi_cls__cls_tokens", True)
    compare(token_loss(tokens), tokens, arrays["multi_cls__loss_regu"], arrays["multi_cls__grad_regu"], "regu")
    alike = tensor(arrays, "multi_cls__cls_tokens")[:, :1].repeat(1, tokens.shape[1], 1).requires_grad_()
    theirs = arrays["multi_cls__loss_identical"], arrays["multi_cls__grad_identical"]
    compare(token_loss(alike), alike, *theirs, "identical")


def test_classification(golden):
    arrays = golden("more/loss_other.npz")
    logits = tensor(arrays, "cls__logits", True)
    loss = F.multilabel_soft_margin_loss(logits, tensor(arrays, "cls__cls_label"))
    compare(loss, logits, arrays["cls__loss"], arrays["cls__grad_logits"], "cls")

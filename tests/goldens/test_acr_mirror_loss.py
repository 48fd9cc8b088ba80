"""The consistency terms from given attentions, their gradients, and the whole objective."""

import numpy as np
import torch
import torch.nn.functional as F

from model.losses.consistency import mirror_consistency
from tests.goldens.acr import cases


def test_losses_and_gradients(golden):
    arrays = golden("acr/mirror_loss.npz")
    for case in cases(arrays):
        given = {name: torch.from_numpy(arrays[f"{case}__{name}"]) for name in ("attn1", "attn2", "x1", "x2", "label")}
        inputs = [given[name].requires_grad_() for name in ("attn1", "attn2", "x1", "x2")]
        side, alpha = int(arrays[f"{case}__p"]), float(arrays[f"{case}__alpha"])
        views = torch.cat(inputs[:2])
        layers = [mirror_consistency(of_layer[:, None], (side, side), slice(0, 1)) for of_layer in views.unbind(1)]
        of_class, of_affinity = torch.stack(layers).mean(0)
        cls = [F.multilabel_soft_margin_loss(logits, given["label"]) for logits in inputs[2:]]
        total = sum(cls) + alpha * of_class + alpha * of_affinity
        names = ("cls_align_loss", "aff_align_loss", "cls_loss_1", "cls_loss_2", "loss")
        for name, value in zip(names, (of_class, of_affinity, *cls, total), strict=True):
            torch.testing.assert_close(value.item(), float(arrays[f"{case}__{name}"]), rtol=1e-5, atol=0)
        for name, grad in zip(("attn1", "attn2", "x1", "x2"), torch.autograd.grad(total, inputs), strict=True):
            theirs = arrays[f"{case}__grad_{name}"]
            np.testing.assert_allclose(grad, theirs, rtol=1e-5, atol=1e-6, err_msg=f"{case} {name}")


def test_the_flip_is_undone(golden):
    """Against what an image's attention is compared with: zero differences where the mirror's equals that."""
    arrays = golden("acr/mirror_loss.npz")
    for case in cases(arrays):
        side, mirror = int(arrays[f"{case}__p"]), torch.from_numpy(arrays[f"{case}__attn2"])
        image = mirror.clone()
        image[:, :, :1, 1:] = torch.from_numpy(arrays[f"{case}__attn2_cls_undone"])
        image[:, :, 1:, 1:] = torch.from_numpy(arrays[f"{case}__attn2_aff_undone"])
        views = torch.cat([image, mirror])
        assert mirror_consistency(views, (side, side), slice(0, 1)).tolist() == [0, 0]
        assert mirror_consistency(torch.cat([mirror, mirror]), (side, side), slice(0, 1)).min() > 0

"""Every loss of every method, and the whole objective of each: finite terms and gradients on batches of the worst kind.

A constant image has a grey value that files can have. One of ImageNet's exact mean, which none has, makes AFA's
tokens zero vectors where its biases are zero, too, as random weights are; no layer norm has a gradient there.
"""

import pytest
import torch
import torch.nn.functional as F

from engine.config import load_config
from engine.precision import autocast
from model import build_method
from model.afa.affinity import affinity_loss
from model.losses.affinity import ptc_loss
from model.losses.consistency import mirror_consistency
from model.losses.energy import energy_loss
from model.losses.segmentation import pixel_cross_entropy, segmentation_loss
from model.more.gcr import GraphCategoryRepresentation
from model.more.lir import certain_loss, hashed_order, sample_uncertain, token_loss, uncertain_loss
from model.pseudo_labels import present_first
from utils.batch import Batch
from utils.images import IGNORE, MEAN, STD

DIM, CPU = 8, torch.device("cpu")
VIT = "model.backbone_args={embed_dim: 32, depth: 2, num_heads: 2, img_size: 64, patch_size: 8}"
ON_VIT = ["model.backbone=vit_tiny_patch16_224", VIT]
RESNET = ["model.backbone=resnet18", "model.backbone_args={layers: [1, 1, 1, 1], channels: [8, 8, 16, 16]}",
          "model.batch_norm=synced"]
METHODS = {
    "more": ("more_voc", [
        *ON_VIT, "model.decoder_channels=16", "model.aux_block=0", "loss.weights.consistency_class=1",
        "loss.token_temperature=0.05", "loss.certain_temperature=0.05",
    ], ["classifier", "aux_classifier", "decoder", "gcr", "backbone.norm"]),
    "afa": ("afa_voc", [
        "model.backbone=mit_b0", "model.decoder_channels=8", "pseudo_labels.radius=2", "loss.weights.energy=1",
        "model.backbone_args={embed_dims: [8, 16, 24, 32], depths: [1, 1, 1, 2], num_heads: [1, 2, 2, 4]}",
        "loss.weights.consistency_affinity=1",
    ], ["classifier", "decoder"]),
    "acr": ("acr_voc", ON_VIT, ["classifier"]),
    "largefov": ("deeplab_voc", [*ON_VIT, "model.architecture=largefov", "model.decoder_channels=16"], ["decoder"]),
    "v2": ("deeplab_voc", [*RESNET, "loss.scales=[1.0, 0.5]"], ["decoder"]),
    "v3plus": ("deeplab_voc", [*RESNET, "model.architecture=deeplabv3plus", "loss.at=image"], ["decoder"]),
}
BATCHES = ("no foreground", "all ignored", "one class", "all classes", "black", "grey")
CONSTANT = {"black": 0.0, "grey": 124.0}
SATURATED = (None, 80.0, 1e4)


def labels_of(kind, shape, classes):
    """Multi-hot (B, K) and ids (B, *shape)."""
    generator = torch.Generator().manual_seed(0)
    hot, ids = torch.zeros(2, classes), torch.randint(0, classes + 1, (2, *shape), generator=generator)
    if kind == "one class":
        ids[:], hot[:, 0] = 1, 1
    elif kind != "no foreground":
        hot[0, 0] = hot[1, -1] = 1
    if kind in ("no foreground", "all ignored"):
        ids[:] = 0 if kind == "no foreground" else IGNORE
    if kind == "all classes":
        hot[:] = 1
    return hot, ids


def batch_of(kind, classes, side):
    hot, masks = labels_of(kind, (side, side), classes)
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    if kind in CONSTANT:
        grey = (CONSTANT[kind] / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
        images = grey[:, None, None].expand_as(images).contiguous()
    valid = torch.full(masks.shape, kind != "all ignored")
    return Batch([""] * 2, images, hot, valid, torch.arange(2), masks=masks.byte())


def assert_finite(name, terms, leaves):
    assert terms.isfinite().all(), name
    for grad in torch.autograd.grad(terms.sum(), leaves, allow_unused=True):
        assert grad is None or grad.isfinite().all(), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("saturated", SATURATED, ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_objectives_are_finite(name, saturated, precision):
    """saturated: what the largest logits, and MoRe's tokens, are scaled to. The labels are those of the last stage."""
    (config, settings, heads), side = METHODS[name], 32 if name in ("v2", "v3plus") else 64
    for classes, kinds in {1: ("all ignored", "one class"), 5: BATCHES}.items():
        torch.manual_seed(0)
        given = [f"data.crop_size={side}", "model.weights=random", "train.batch_size=2", *settings]
        method = build_method(load_config(config, given), classes).train()
        for head in heads if saturated else []:
            method.network.get_submodule(head).register_forward_hook(
                lambda _, __, made: made * (saturated / made.detach().abs().max().clamp(min=1e-20))
            )
        for kind in kinds:
            with autocast(CPU, precision):
                terms = method(batch_of(kind, classes, side), 20000)
            assert {value.dtype for value in terms.values()} == {torch.float32}
            assert_finite((kind, classes, terms), torch.stack(list(terms.values())), list(method.parameters()))
            if kind == "all ignored":
                learnt_from_pixels = {"ptc": 0.5, "seg": 0, "certain": 0, "uncertain": 0, "energy": 0, "affinity": 0}
                for term in learnt_from_pixels.keys() & terms.keys():
                    assert terms[term] == learnt_from_pixels[term], term


def losses(kind, classes, size, factor, temperature=0.05):
    """Every loss by name: a function and the leaves that it is of. factor: 1e4 and 80 are the logits themselves."""
    generator = torch.Generator().manual_seed(2)
    (hot, ids), count = labels_of(kind, size, classes), size[0] * size[1]

    def leaf(*shape):
        values = torch.randn(*shape, generator=generator)
        return (factor * (values if factor == 1 else values.sign())).requires_grad_()

    logits, tokens, patches = leaf(2, classes + 1, *size), leaf(2, classes, DIM), leaf(2, DIM, *size)
    if kind in CONSTANT:
        patches = patches.detach()[:, :, :1, :1].expand(-1, -1, *size).contiguous().requires_grad_()
    images = torch.zeros(2, 3, *size) if kind in CONSTANT else torch.randn(2, 3, *size, generator=generator)
    present, seeds = present_first(hot), torch.arange(2)
    scores, attention = leaf(2, count, count), leaf(4, 2, count + 3, count + 3)
    samples, gcr = sample_uncertain(ids, hashed_order, seeds), GraphCategoryRepresentation(DIM)
    valid = torch.full(ids.shape, kind != "all ignored")
    return {
        "cls": (lambda x: F.multilabel_soft_margin_loss(x[:, 1:, 0, 0], hot), logits),
        "pixel_cross_entropy": (lambda x: pixel_cross_entropy(x, ids), logits),
        "segmentation": (lambda x: segmentation_loss(x, ids), logits),
        "energy": (lambda x: energy_loss(x, images, ids, valid=valid), logits),
        "ptc": (lambda x: ptc_loss(x, ids), patches),
        "token": (lambda x: token_loss(x, temperature), tokens),
        "certain": (lambda x: certain_loss(x, patches, ids, present, temperature, valid), tokens),
        "uncertain": (lambda x: uncertain_loss(tokens, x, samples, hot), patches),
        "gcr": (lambda x: token_loss(gcr(x, patches.flatten(2).transpose(1, 2)), temperature), tokens),
        "affinity": (lambda x: affinity_loss(x.sigmoid(), ids, classes, 2), scores),
        "consistency": (lambda x: mirror_consistency(x.softmax(-1), size, slice(1, 3)).sum(), attention),
    }


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("factor", [0.0, 1.0, 80.0, 1e4])
@pytest.mark.parametrize("classes", [1, 5, 90])
def test_losses_are_finite(classes, factor, precision):
    """Each by itself, under autocast, too; grids of one row; tokens that are all zero."""
    for kind, size in zip(BATCHES, [(8, 9), (1, 5), (9, 7), (1, 1), (8, 8), (5, 1)], strict=True):
        for name, (loss, leaf) in losses(kind, classes, size, factor).items():
            with autocast(CPU, precision):
                value = loss(leaf)
            assert_finite((name, kind), value, [leaf])
            if kind == "all ignored" and name not in ("cls", "token", "gcr", "consistency"):
                assert value == (0.5 if name == "ptc" else 0), name

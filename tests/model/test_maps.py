"""Multi-scale maps, PAR, thresholds and refined labels against slow, obvious loops."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from benchmarks.baselines.plain_maps import plain_localization, plain_segmentation
from benchmarks.baselines.plain_step import plain_par
from engine.config import load_config
from model import build_method
from model.method import MapPlan
from model.multi_scale import LARGEST, SUM, SUM_OF_POSITIVE, fused_maps, min_max
from model.par import COLOUR_WIDTH, POSITION_WEIGHT, par_affinity, par_refine
from model.pseudo_labels import present_first, refined_labels, valid_tokens


def coarse(images):
    """A stand-in network: two classes' maps on a grid of 4 pixels, not symmetric under mirroring."""
    pooled = F.avg_pool2d(images, 4)
    ramp = torch.linspace(-1, 1, pooled.shape[-1])
    return torch.stack([pooled[:, 0] * ramp, pooled[:, 1] - 0.1], 1)


def scores(images):
    return F.pad(coarse(images), (0, 0, 0, 0, 1, 0))   # with a background


NETWORK = {"cam": coarse, "lam": lambda images: -coarse(images), "seg": scores}


FUSIONS = {"cam": SUM_OF_POSITIVE, "lam": SUM, "seg": LARGEST}
PLAIN = {"cam": partial(plain_localization, positive=True), "lam": plain_localization, "seg": plain_segmentation}
PLANS = {
    "one of all": dict.fromkeys(FUSIONS, MapPlan((1.0, 0.5, 1.5))),
    "other scales": {"cam": MapPlan((1.0, 0.5)), "lam": MapPlan((1.5, 1.0, 0.5)), "seg": MapPlan((0.5, 1.25))},
    "not scale 1": {"cam": MapPlan((0.5,)), "seg": MapPlan((1.5,))},
    "other sides": {"cam": MapPlan((0.75, 1.0), side=32), "lam": MapPlan((1.5, 2.0), side=16), "seg": MapPlan(side=32)},
}


@pytest.mark.parametrize("flips", [(), ("cam", "lam", "seg"), ("lam",)])
@pytest.mark.parametrize("side", [None, 20, 24])
@pytest.mark.parametrize("name", PLANS)
def test_fused_maps(name, side, flips):
    """Kinds that share their inputs are what each of them is by itself."""
    images, calls = torch.randn(2, 3, 24, 32), []
    plans = {k: plan._replace(side=plan.side or side, flip=k in flips) for k, plan in PLANS[name].items()}

    def coarse_maps(inputs, kinds):
        calls.append((tuple(inputs.shape[-2:]), *kinds))
        return {kind: NETWORK[kind](inputs) for kind in kinds}

    ours = fused_maps(images, {kind: (plan, FUSIONS[kind]) for kind, plan in plans.items()}, coarse_maps)
    assert list(ours) == list(plans)
    for kind, plan in plans.items():
        torch.testing.assert_close(ours[kind], PLAIN[kind](NETWORK[kind], images, plan), rtol=0, atol=1e-5)
    if name == "one of all":   # the segmentation's squares are made from the image itself, the others' from a square
        assert len(calls) == (3 if side is None else 5)


def test_maps_that_are_known_are_not_made_again():
    images, made = torch.randn(2, 3, 24, 32), []

    def coarse_maps(inputs, kinds):
        made.append(inputs)
        return {kind: NETWORK[kind](inputs) for kind in kinds}

    for flip in (False, True):
        kinds = {kind: (MapPlan((1.0, 0.5), flip=flip), FUSIONS[kind]) for kind in ("cam", "lam")}
        known = coarse_maps(images, kinds)
        made.clear()
        ours = fused_maps(images, kinds, coarse_maps, known)
        assert not any(inputs.shape == images.shape and torch.equal(inputs, images) for inputs in made)
        assert sum(len(inputs) for inputs in made) == (2 + 4 if flip else 2)   # mirrors, and both at the other scale
        for kind, maps in fused_maps(images, kinds, coarse_maps).items():
            torch.testing.assert_close(ours[kind], maps, rtol=0, atol=1e-6)


def test_min_max_of_a_constant_map():
    assert not min_max(torch.full((1, 1, 4, 4), 7.0)).any()


def test_par_is_the_plain_one():
    """Pixels at the edge have neighbours beyond it, which repeat the edge."""
    assert (COLOUR_WIDTH, POSITION_WEIGHT) == (0.3, 0.01)   # which the plain one shares
    image, maps, dilations = torch.rand(1, 3, 7, 6), torch.rand(1, 2, 7, 6), (1, 2)
    ours = par_refine(maps, par_affinity(image, dilations), dilations, 3)
    torch.testing.assert_close(ours, plain_par(image, maps, dilations, 3), rtol=1e-4, atol=1e-6)


def test_refined_labels_image_by_image():
    """Batching with other images, with other classes, changes nothing; absent classes never win."""
    images, maps = torch.rand(3, 3, 32, 40), torch.rand(3, 4, 32, 40)
    labels = torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]])

    def refined(which):
        present = present_first(labels[which])
        return refined_labels(present.of(maps[which]), present, images[which], 0.7, 0.25, (1, 2), 3)

    together = refined(slice(None))
    for b in range(3):
        alone = refined(slice(b, b + 1))
        assert torch.equal(together[b : b + 1], alone)
        allowed = {0, 255} | {k + 1 for k in range(4) if labels[b, k]}
        assert set(together[b].unique().tolist()) <= allowed


def test_valid_tokens():
    valid = torch.ones(1, 34, 60, dtype=torch.bool)      # 2 and 12 pixels more than whole patches
    valid[:, 31:], valid[:, :, 17] = False, False
    assert valid_tokens(valid, (16, 16)).tolist() == [[[True, False, True], [False, False, False]]]


def test_fused_is_made_as_its_own_plan_says():
    """Whatever CAM and LAM are asked for beside it; without scales it is the product of these."""
    method, images = tiny_more(), torch.randn(1, 3, 64, 64)
    own = MapPlan((1.0,), flip=True)
    alone = method.maps(images, {"fused": own})["fused"]
    others = {"cam": MapPlan((1.0, 0.5), flip=True), "lam": own}
    torch.testing.assert_close(method.maps(images, {**others, "fused": own})["fused"], alone)
    made = method.maps(images, {**others, "fused": MapPlan(())})
    torch.testing.assert_close(made["fused"], min_max(made["cam"] * made["lam"]))
    assert (made["fused"] - alone).abs().max() > 1e-3


def test_validation_maps():
    """As released: from the patch grid to the image's own size, then to [0, 1]; LAM's threshold is the background's."""
    method, images = tiny_more(), torch.randn(1, 3, 50, 90)
    plans = method.validation_plans(load_config("more_coco", ["evaluate.base_size=64"]))
    assert {plan.bkg for plan in plans.values()} == {0.45}
    made = method.maps(images, plans)
    square = F.interpolate(images, (64, 64), mode="bilinear")
    coarse = method.network.coarse_maps(square, ["lam", "seg"])
    own_size = F.interpolate(coarse["lam"], (50, 90), mode="bilinear")
    torch.testing.assert_close(made["lam"], min_max(own_size))
    torch.testing.assert_close(made["fused"], min_max(made["cam"] * made["lam"]))
    assert torch.equal(method.coarse_scores(square, "seg"), coarse["seg"]) and coarse["seg"].shape == (1, 5, 8, 8)


def tiny_more():
    torch.manual_seed(0)
    args = "model.backbone_args={embed_dim: 32, depth: 3, num_heads: 2, img_size: 64, patch_size: 8}"
    return build_method(load_config("more_voc", [args, "model.decoder_channels=16"]), 4).eval()

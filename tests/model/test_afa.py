"""AFA's affinity, random walk, losses and maps against slow loops, and what a step may and may not change."""

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F

from engine.config import load_config
from engine.distributed import Ranks
from engine.training.step import Trainer
from model import build_method
from model.afa.affinity import Affinity, AffinityHead, affinity_loss, random_walk
from model.backbones.mit import MixTransformer, RawAttention, official_name
from model.decoders.segformer import SegFormerHead
from model.method import MapPlan
from model.multi_scale import resize
from model.pseudo_labels import present_first
from utils.batch import Batch, boxes_of
from utils.errors import UserError

K, SIDE = 5, 64
SETTINGS = [
    "model.backbone=mit_b0", "model.weights=random", "model.decoder_channels=8", f"data.crop_size={SIDE}",
    "model.backbone_args={embed_dims: [8,16,24,32], depths: [1,1,1,2], num_heads: [1,2,2,4]}",
    "pseudo_labels.radius=2", "loss.start_after.seg=1", "loss.start_after.affinity=1", "pseudo_labels.walk_after=3",
    "train.precision=fp32", "train.warmup_iterations=0", "train.lr=1e-3",
]


def afa(*more):
    torch.manual_seed(0)
    return build_method(load_config("afa_voc", [*SETTINGS, *more]), K)


def batch_of(labels=((0, 2), (1,)), boxes=((0, SIDE, 0, SIDE), (8, 40, 16, SIDE)), seed=0):
    images = torch.randn(len(labels), 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    multi_hot, valid = torch.zeros(len(labels), K), torch.zeros(len(labels), SIDE, SIDE, dtype=torch.bool)
    for index, (own, (top, bottom, left, right)) in enumerate(zip(labels, boxes, strict=True)):
        multi_hot[index, list(own)] = 1
        valid[index, top:bottom, left:right] = True
    return Batch([""] * len(labels), images, multi_hot, valid, torch.arange(len(labels)), None, list(boxes))


def random_affinity(h=5, w=7, batch=2, channels=6):
    left, right = torch.randn(2, batch, h * w, channels).double()
    return Affinity(left, right, torch.tensor([0.3]).double(), (h, w))


# the affinity

def test_affinity_is_the_convolution_of_the_symmetric_maps():
    head, grid = AffinityHead(5), (3, 4)
    attention = [RawAttention(*torch.randn(2, 2, heads, 12, 6), grid) for heads in (2, 3)]
    maps = torch.cat([one.maps() for one in attention], 1)
    theirs = F.conv2d(maps + maps.transpose(2, 3), head.weight, head.bias)[:, 0].sigmoid()
    torch.testing.assert_close(head(attention).full(), theirs, rtol=1e-5, atol=1e-6)


def test_parts_are_those_of_the_whole():
    affinity = random_affinity()
    rows, columns = slice(3, 20), slice(7, 30)
    torch.testing.assert_close(affinity.block(rows, columns), affinity.full()[:, rows, columns])
    torch.testing.assert_close(affinity.first(1).full(), affinity.full()[:1])


def plain_walk(scores, matrix, radius, eps):
    h, w = scores.shape[2:]
    result = torch.zeros_like(scores)
    for image, y, x in product(range(len(scores)), range(h), range(w)):
        total, weights = 0, eps
        for v, u in product(range(h), range(w)):
            if not radius or max(abs(v - y), abs(u - x)) <= radius:
                weight = matrix[image, v * w + u, y * w + x] ** 2
                total, weights = total + weight * scores[image, :, v, u], weights + weight
        result[image, :, y, x] = total / weights
    return result


@pytest.mark.parametrize("grid", [(5, 7), (9, 4), (1, 3), (11, 2)])
@pytest.mark.parametrize("radius", [0, 1, 3, 20])
def test_random_walk(grid, radius):
    affinity, scores = random_affinity(*grid), torch.rand(2, 3, *grid).double()
    theirs = plain_walk(scores, affinity.full(), radius, 0.1)
    torch.testing.assert_close(random_walk(scores, affinity.block, radius), theirs)


def plain_loss(affinity, labels, radius):
    total, w = {True: [], False: []}, labels.shape[2]
    for image, one, two in product(range(len(labels)), *[range(labels[0].numel())] * 2):
        a, b = (int(labels[image].flatten()[token]) for token in (one, two))
        far = max(abs(one // w - two // w), abs(one % w - two % w)) > radius > 0
        if 255 not in (a, b) and not far:
            value = affinity[image, one, two]
            total[a == b].append(1 - value if a == b else value)
    return sum(0.5 * sum(values) / (len(values) + 1) for values in total.values())


@pytest.mark.parametrize("radius", [0, 1, 2])
@pytest.mark.parametrize("ids", [(0, 3, 255), (255,), (0,), (1, 2)])
def test_affinity_loss(radius, ids):
    labels = torch.tensor(ids)[torch.randint(len(ids), (2, 3, 4))]
    ours, theirs = (torch.rand(2, 12, 12, generator=torch.Generator().manual_seed(1)).double() for _ in range(2))
    loss = affinity_loss(ours.requires_grad_(), labels, K, radius)
    slow = plain_loss(theirs.requires_grad_(), labels, radius)
    torch.testing.assert_close(loss, torch.as_tensor(slow, dtype=loss.dtype))
    loss.backward()
    if torch.is_tensor(slow):
        slow.backward()
    torch.testing.assert_close(ours.grad, torch.zeros_like(ours) if theirs.grad is None else theirs.grad)


# the network

@pytest.mark.parametrize("size", [(64, 64), (50, 71), (33, 16), (1, 1)])
def test_stages_have_their_strides(size):
    backbone = MixTransformer("mit_b0", {"embed_dims": (8, 16, 16, 16), "num_heads": (1, 1, 2, 2)}, (4, 2, 2, 1))
    stages, sides = backbone(torch.randn(1, 3, *size)).stages, [max(side, 32) for side in size]
    for stage, stride in zip(stages, (4, 2, 2, 1), strict=True):
        sides = [math.ceil(side / stride) for side in sides]
        assert list(stage.shape[2:]) == sides


def test_attention_costs_no_drop_path():
    """Blocks whose attention is wanted make the same of the images, in training too."""
    backbone, images = afa("model.drop_path=0.9").network.backbone.train(), torch.randn(4, 3, SIDE, SIDE)
    made = []
    for attention in ((), range(5)):
        torch.manual_seed(1)
        made.append(backbone(images, attention).stages[-1])
    torch.testing.assert_close(*made, rtol=1e-4, atol=1e-5)


def test_official_names():
    names = list(MixTransformer("mit_b0", {"embed_dims": (8, 8, 8, 8), "num_heads": (1, 1, 1, 1)}).state_dict())
    official = [official_name(name) for name in names]
    assert len(set(official)) == len(names)
    assert {"patch_embed1.proj.weight", "block4.1.mlp.dwconv.dwconv.bias", "norm3.weight"} <= set(official)


def test_start_weights_are_strict(tmp_path):
    source, target = afa().network.backbone, afa().network.backbone
    weights = {official_name(name): torch.randn_like(value) for name, value in source.state_dict().items()}
    target.load_start_weights({**weights, "head.weight": torch.zeros(2, 2), "head.bias": torch.zeros(2)})
    for name, value in target.state_dict().items():
        assert torch.equal(value, weights[official_name(name)])
    for key, text in (("more", "'more' is not expected"), ("norm1.bias", "'norm1.bias' has shape")):
        with pytest.raises(UserError, match=text):
            target.load_start_weights({**weights, key: torch.zeros(3)})
    del weights["block1.0.attn.sr.bias"]
    with pytest.raises(UserError, match="'block1.0.attn.sr.bias' is missing"):
        target.load_start_weights(weights)


@pytest.mark.parametrize("settings, text", [
    (["model.backbone=mit_b11"], "did you mean"),
    (["model.backbone_args={depth: [1,1,1,2]}"], "model.backbone_args.depth"),
    (["model.backbone_args={depths: [1,1]}"], "four numbers"),
    (["model.backbone_args={depths: [1,1,1,2.5]}"], "four numbers"),
    (["model.backbone_args={num_heads: [1,2,5,0]}"], "four numbers"),
    (["model.backbone_args={embed_dims: [a,b,c,d]}"], "four numbers"),
    (["model.backbone_args={depths: [2,2,2,1]}"], "two blocks"),
    (["model.backbone_args={num_heads: [1,2,5,3]}"], "do not divide"),
    (["model.normalize=timm"], "model.normalize=timm: timm has no"),
    (["model.weights=timm"], "model.weights=timm, .*timm has no"),
])
def test_what_cannot_be_built_is_named(settings, text):
    with pytest.raises(UserError, match=text):
        build_method(load_config("afa_voc", ["model.backbone=mit_b0", *settings]), K)


def plain_head(head, stages):
    """The decoder as the paper draws it: every stage enlarged, all of them side by side, last stage first."""
    size = stages[0].shape[2:]
    pairs = zip(head.linears, stages, strict=True)
    parts = [resize(linear(x.movedim(1, -1)).movedim(-1, 1), size) for linear, x in pairs]
    x = F.conv2d(torch.cat(parts[::-1], 1), head.fuse.weight)
    return head.classifier(F.relu(head.norm(x)))


@pytest.mark.parametrize("training", [False, True])
def test_decoder(training):
    head = SegFormerHead((3, 4, 5, 6), 8, 4, dropout=0).double().train(training)
    stages = [torch.randn(2, 3 + i, 16 >> min(i, 2), 20 >> min(i, 2)).double() for i in range(4)]
    torch.testing.assert_close(head(stages), plain_head(head, stages))


# the released settings

@pytest.mark.parametrize("name, iterations, batch, par, first, walk, both", [
    ("afa_voc", 20000, 4, 10, 2000, 6000, False), ("afa_coco", 80000, 8, 15, 5000, 15000, True),
])
def test_configs_hold_the_released_settings(name, iterations, batch, par, first, walk, both):
    c = load_config(name)
    labels, start, train, crf = c.pseudo_labels, c.loss.start_after, c.train, c.crf
    assert (train.iterations, train.batch_size, labels.par_iterations) == (iterations, batch, par)
    assert (start.seg, start.affinity, labels.walk_after, labels.walk_for_affinity) == (first, first, walk, both)
    assert (train.lr, train.weight_decay, train.head_lr_factor, train.warmup_iterations, train.power) == (
        6e-5, 0.01, 10, 1500, 1
    )
    assert (labels.high, labels.low, c.evaluate.bkg, labels.radius, labels.cam_scales) == (
        0.55, 0.35, 0.45, 8, (1.0, 0.5, 1.5)
    )
    assert labels.par_dilations == (1, 2, 4, 8, 12, 24) and labels.cam_pass == "train"
    assert (c.loss.weights.cls, c.loss.weights.seg, c.loss.weights.affinity, c.loss.weights.energy) == (1, 0.1, 0.1, 0)
    assert (c.data.crop_size, c.data.augmentation, tuple(c.data.resize_range)) == (512, "scale_flip_crop", (0.5, 2))
    assert (c.evaluate.long_side, c.evaluate.base_size, tuple(c.evaluate.scales["seg"])) == (512, None, (1, 0.5, 0.75))
    assert (crf.iterations, crf.pos_xy_std, crf.pos_w, crf.bi_xy_std, crf.bi_rgb_std, crf.bi_w) == (10, 3, 3, 64, 5, 4)
    assert (c.model.backbone, c.model.strides, c.model.pooling) == ("mit_b1", (4, 2, 2, 1), "max")


# a step

def step(method, batch, iteration=0):
    trainer = Trainer(method.train(), method.config, Ranks(0, 1, torch.device("cpu")))
    trainer.iteration = iteration
    return trainer.step(batch), trainer


@pytest.mark.parametrize("iteration", [0, 2, 5], ids=["classification", "CAM labels", "walked labels"])
@pytest.mark.parametrize("settings", [[], ["pseudo_labels.cam_pass=eval"], ["loss.weights.energy=0.01"],
                                      ["pseudo_labels.walk_for_affinity=true", "model.pooling=mean"]], ids=str)
def test_every_parameter_gets_a_gradient(settings, iteration):
    method = afa(*settings)
    terms, _ = step(method, batch_of(), iteration)
    assert all(value.isfinite() for value in terms.values())
    assert ("energy" in terms) == (settings == ["loss.weights.energy=0.01"])
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.parameters())


@pytest.mark.parametrize("labels", [((), ()), ((0, 1, 2, 3, 4), ())], ids=["no class", "all classes"])
@pytest.mark.parametrize("background", [0.0, 1.0], ids=["no background", "all background"])
@pytest.mark.parametrize("iteration", [2, 5])
def test_finite_whatever_the_labels(labels, background, iteration):
    """Batches whose pseudo labels have no background or no foreground, with a crop that is padding alone."""
    method = afa(f"pseudo_labels.high={background}", f"pseudo_labels.low={background}")
    terms, _ = step(method, batch_of(labels, boxes=((0, SIDE, 0, 1), (0, 0, 0, 0))), iteration)
    assert all(value.isfinite() for value in terms.values())
    assert all(p.isfinite().all() for p in method.parameters())


def test_norms_of_the_encoder_stay(iteration=2):
    method = afa()
    before = {name: value.clone() for name, value in method.named_parameters()}
    step(method, batch_of(), iteration)
    for name, value in method.named_parameters():
        frozen = "backbone" in name and "norm" in name
        assert torch.equal(value, before[name]) == frozen, name
    groups = {group["name"]: group for group in method.param_groups(method.config.train)}
    assert sum(len(group["params"]) for group in groups.values()) == len(before)
    assert groups["norms"]["lr"] == groups["norms"]["weight_decay"] == 0
    assert groups["heads"]["lr"] == groups["decoder"]["lr"] == pytest.approx(10 * groups["encoder"]["lr"])


def test_draws_follow_from_seed_and_iteration():
    """Dropout and drop-path are on; the same iteration gives the same bits, whatever was drawn before."""
    results = []
    for disturb in (0, 3):
        method = afa("model.drop_path=0.5", "model.dropout=0.5")
        torch.rand(disturb)
        terms, trainer = step(method, batch_of(), 5)
        results.append((terms, {**method.state_dict()}))
        other = trainer.step(batch_of())
    assert all(torch.equal(results[0][0][name], value) for name, value in results[1][0].items())
    assert all(torch.equal(results[0][1][name], value) for name, value in results[1][1].items())
    assert other["cls"] != results[1][0]["cls"]


@pytest.mark.parametrize("mode, passes", [("train", 4), ("eval", 1)])
def test_batch_statistics_of_cam_passes(mode, passes):
    method = afa(f"pseudo_labels.cam_pass={mode}")
    step(method, batch_of(), 5)
    assert int(method.network.decoder.norm.num_batches_tracked) == passes
    assert method.training and all(module.training for module in method.network.modules())


def test_every_image_walks_along_its_own_affinity(monkeypatch):
    """However few images go through the network together."""
    method, batch = afa("pseudo_labels.cam_pass=eval").train(), batch_of()
    monkeypatch.setattr("model.multi_scale.PIXELS_AT_ONCE", 1)
    _, affinity = method._training_cams(batch.images, method.network(batch.images), present_first(batch.labels))
    own = method.eval().network(F.interpolate(batch.images, scale_factor=1.5, mode="bilinear")).affinity
    assert affinity.grid == own.grid
    torch.testing.assert_close(affinity.full(), own.full(), rtol=1e-5, atol=1e-6)


def test_labels_do_not_depend_on_padding():
    """What lies in the padding of a crop changes the walk, as released, but PAR of the walked CAM does not read it."""
    method, batch, grid = afa().train(), batch_of(), (7, 7)
    cam, affinity = torch.rand(2, 2, SIDE, SIDE), random_affinity(*grid)
    affinity = affinity._replace(left=affinity.left.float(), right=affinity.right.float(), bias=affinity.bias.float())
    image, present = torch.rand(2, 3, SIDE, SIDE), present_first(batch.labels)
    other = torch.where(batch.valid[:, None], image, torch.rand_like(image))
    one, two = (method.walked_labels(cam, affinity, present, x, batch) for x in (image, other))
    assert torch.equal(one, two) and (one[~batch.valid] == 255).all() and (one != 255).any()
    assert torch.equal(one, method.walked_labels(cam, affinity, present, image, batch._replace(boxes=None)))
    assert boxes_of(batch.valid) == batch.boxes


# maps

def test_maps_share_their_passes():
    """Each kind is what it is by itself, and all of them take no pass more than the CAM."""
    method, images = afa().eval(), torch.randn(2, 3, 50, 60)
    several = MapPlan((1.0, 0.5), flip=True, long_side=64)
    kinds = {"cam": several, "affinity_cam": several, "seg": several}
    calls = []
    method.network.backbone.register_forward_pre_hook(lambda _, given: calls.append(given[0].shape))
    forward = method.network.backbone.forward
    method.network.backbone.forward = lambda *given: (calls.append(len(given[0])), forward(*given))[1]
    made = method.maps(images, kinds, torch.tensor([[1, 0, 0, 1, 0], [0, 0, 0, 0, 0.0]]))
    # images, mirrors, both at half size twice: the segmentation samples other sizes by the scale
    assert sum(call for call in calls if isinstance(call, int)) == 2 + 2 + 4 + 4
    for kind, plan in kinds.items():
        own = method.maps(images, {kind: plan}, torch.tensor([[1, 0, 0, 1, 0], [0, 0, 0, 0, 0.0]]))[kind]
        torch.testing.assert_close(made[kind], own, rtol=1e-4, atol=1e-4)
    assert made["cam"].shape == (2, K, 50, 60) and made["seg"].shape == made["affinity_cam"].shape == (2, K + 1, 50, 60)
    assert set(made["affinity_cam"].argmax(1)[0].unique().tolist()) <= {0, 1, 4}
    assert not made["affinity_cam"].argmax(1)[1].any()
    assert torch.allclose(made["affinity_cam"].exp().sum(1), torch.ones(()), atol=0.2)


def test_segmentation_is_fused_at_the_size_of_the_decoder():
    method, image = afa().eval(), torch.randn(1, 3, 90, 123)   # whose parts are no whole pixels
    ours = method.maps(image, {"seg": MapPlan((1.0, 0.5, 0.75), flip=True)}, None)["seg"]
    total = None
    with torch.no_grad():
        for scale in (1.0, 0.5, 0.75):
            scaled = F.interpolate(image, scale_factor=scale, mode="bilinear") if scale != 1 else image
            logits = method.network(torch.cat([scaled, scaled.flip(-1)])).seg_logits
            logits = (logits[:1] + logits[1:].flip(-1)) / 2
            total = logits if total is None else torch.maximum(total, resize(logits, total.shape[2:]))
    torch.testing.assert_close(ours, resize(total, image.shape[2:]), rtol=1e-4, atol=1e-5)

"""ACR's consistency terms and GETAM against slow, plain ways, and the terms in the other methods."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F

from engine.config import load_config
from engine.distributed import Ranks
from engine.training.step import Trainer
from model import build_method
from model.acr.getam import FUNCTIONS, getam
from model.backbones.attention import block_and_attention
from model.backbones.class_token_vit import ClassTokenViT
from model.method import MapPlan
from tests.model.test_afa import afa
from utils.batch import Batch
from utils.errors import UserError

K, SIDE = 5, 64
VIT = "{embed_dim: 32, depth: 4, num_heads: 2, img_size: 64, patch_size: 16}"
RESNET = [
    "model.backbone_args={embed_dim: 32, depth: 3, num_heads: 2, img_size: 64, resnet_layers: [1, 1, 1], "
    "resnet_width_factor: 0.5}"
]
PLAIN = ["model.backbone=vit_tiny_patch16_224", f"model.backbone_args={VIT}"]
SETTINGS = [f"data.crop_size={SIDE}", "model.weights=random", "train.precision=fp32", "train.iterations=20"]


def acr(*more, backbone=PLAIN):
    torch.manual_seed(0)
    method = build_method(load_config("acr_voc", [*SETTINGS, *backbone, *more]), K)
    for name, parameter in method.named_parameters():   # else attention is flat, and its gradient tiny
        if name.endswith("weight") and parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return method


def more(*overrides):
    torch.manual_seed(0)
    own = "model.decoder_channels=16", "train.warmup_iterations=0", "evaluate.base_size=64"
    return build_method(load_config("more_voc", [*SETTINGS, *PLAIN, *own, *overrides]), K)


def batch_of(labels=((0, 2), (1,)), seed=0):
    images = torch.randn(len(labels), 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    multi_hot = torch.stack([torch.zeros(K).index_fill(0, torch.tensor(own), 1) for own in labels])
    valid = torch.ones(len(labels), SIDE, SIDE, dtype=torch.bool)
    return Batch([""] * len(labels), images, multi_hot, valid, torch.arange(len(labels)))


# the terms

def plain_consistency(maps, grid, prefix, classes):
    (h, w), views = grid, maps.mean(1)
    images, mirrors = views.chunk(2)
    mirrored = {y * w + x: y * w + w - 1 - x for y, x in product(range(h), range(w))}
    pairs = [(images[:, prefix + a, prefix + b] - mirrors[:, prefix + mirrored[a], prefix + mirrored[b]]).abs()
             for a, b in product(range(h * w), repeat=2)]
    rows = [(images[:, c, prefix + b] - mirrors[:, c, prefix + mirrored[b]]).abs()
            for c, b in product(classes, range(h * w))]
    return torch.stack(rows).mean(), torch.stack(pairs).mean()


def test_an_image_that_is_its_own_mirror_agrees():
    """The same to rounding: the two views are the same pixels, mirrored tokens and all."""
    method, half = acr(), torch.randn(2, 3, SIDE, SIDE // 2)
    out = method.network(torch.cat([half, half.flip(-1)], 3))
    assert torch.equal(out.class_logits, out.mirror_logits)
    with torch.no_grad():
        positions = method.network.backbone.patch_pos.view(4, 4, -1)
        positions.copy_((positions + positions.flip(1)) / 2)
    images = torch.cat([half, half.flip(-1)], 3)
    assert method.network(images).consistency[0] > 0   # a patch embedding tells left from right
    weight = method.network.backbone.patch_embed.proj.weight
    with torch.no_grad():
        weight.copy_((weight + weight.flip(-1)) / 2)
    assert method.network(images).consistency.max() < 1e-6


@pytest.mark.parametrize("block", [0, 2])
def test_a_block_that_hands_out_its_attention(block):
    """Result, attention, and the gradients of both, are those of timm's block, in training and in evaluation."""
    vit = acr().network.backbone
    block, x = vit.blocks[block].train(), torch.randn(2, 17, 32, requires_grad=True)
    q, k, _ = block.attn.qkv(block.norm1(x)).unflatten(2, (3, 2, 16)).permute(2, 0, 3, 1, 4)
    maps = (q @ k.transpose(2, 3) / 4).softmax(3)
    theirs = block(x), maps.square().sum((2, 3))
    ours = block_and_attention(block, x, lambda maps: maps.square().sum((2, 3)))
    inputs, seeds = [x, *block.parameters()], [torch.randn_like(value) for value in theirs]
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6)
    for own, other in zip(*(torch.autograd.grad(made, inputs, seeds) for made in (ours, theirs)), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backbone", [PLAIN, RESNET], ids=["plain", "hybrid"])
def test_objective(backbone):
    """Two passes, one for each view, every attention kept; every parameter gets a gradient."""
    method, batch = acr(backbone=backbone).train(), batch_of()
    terms = method(batch, 0)
    network, views = method.network, [batch.images, batch.images.flip(-1)]
    made = [network.backbone(view, lambda maps: maps) for view in views]
    logits = [network.classifier(tokens[:, 0]) for tokens, _ in made]
    consistency = [torch.stack(plain_consistency(torch.cat(of_block), (4, 4), 1, [0]))
                   for of_block in zip(*(attention for _, attention in made), strict=True)]
    theirs = [*(F.multilabel_soft_margin_loss(x, batch.labels) for x in logits), *torch.stack(consistency).mean(0)]
    assert list(terms) == ["cls", "cls_mirror", "consistency_class", "consistency_affinity"]
    torch.testing.assert_close(list(terms.values()), theirs, rtol=1e-5, atol=1e-7)
    weights = method.loss_weights(0)
    totals = [sum(weights[n] * t for n, t in zip(terms, values, strict=True)) for values in (terms.values(), theirs)]
    own, other = (torch.autograd.grad(total, list(method.parameters())) for total in totals)
    for name, a, b in zip(dict(method.named_parameters()), own, other, strict=True):
        assert float((a - b).norm()) <= 1e-4 * float(b.norm()) + 1e-5, name


def test_dropout_of_a_block_that_hands_out_its_attention():
    args = {"embed_dim": 32, "depth": 1, "num_heads": 2, "proj_drop_rate": 0.5, "drop_path_rate": 0.1}
    (block,), x = ClassTokenViT("vit_tiny_patch16_224", args).train().blocks, torch.randn(2, 17, 32)
    made = []
    for run in (block, lambda x: block_and_attention(block, x, torch.detach)[0]):
        torch.manual_seed(0)
        made.append(run(x))
    torch.testing.assert_close(*made)


# GETAM

def full_backward(network, image, label, function, start, affinity):
    """GETAM (h*w) of one class: attention is kept and differentiated in full, through all blocks."""
    vit, maps = network.backbone, []
    x, _ = vit.embed(image)
    for block in vit.blocks:
        q, k, v = block.attn.qkv(block.norm1(x)).unflatten(2, (3, block.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        maps.append((q @ k.transpose(2, 3) * block.attn.scale).softmax(3))
        x = x + block.attn.proj((maps[-1] @ v).transpose(1, 2).flatten(2))
        x = x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))
    at = vit.registers
    gradients = torch.autograd.grad(network.classifier(x[0, at])[label], maps)
    total = 0
    for gradient, of_block in list(zip(gradients, maps, strict=True))[start:]:
        g, a = gradient[0], of_block[0]
        grad, cam_grad = g.relu().mean(0), (g * a).relu().mean(0)
        total = total + {"grad": grad, "grad_s": grad**2, "cam_grad": cam_grad, "cam_grad_s": cam_grad * grad}[function]
    row = total[at, at + 1 :].detach()
    pairs = sum(of_block[0].mean(0) for of_block in maps).detach()[at + 1 :, at + 1 :]
    return pairs @ row if affinity else row


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("start", [0, 1, -2, -1])
def test_getam_is_that_of_full_backwards(function, start):
    network = acr().eval().network
    images, classes = torch.randn(2, 3, SIDE, 48), torch.tensor([[3, 0, 2], [1, 4, 1]])
    for affinity in (True, False):
        with torch.no_grad():   # as evaluations call it
            made = getam(network, images, classes, function, start, affinity, patches=True)
            patches = network.backbone(images)[0][:, 1:]
        torch.testing.assert_close(made.patches, patches, rtol=1e-5, atol=1e-5)
        assert not made.maps.requires_grad and made.grid == (4, 3)
        for index, column in product(range(2), range(3)):
            own = images[index : index + 1], classes[index, column]
            theirs, ours = full_backward(network, *own, function, start, affinity), made.maps[index, column].flatten()
            assert float(theirs.max()) > 0
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.max()))
    assert all(parameter.grad is None for parameter in network.parameters())


def test_getam_is_of_evaluation_mode():
    with pytest.raises(ValueError, match="evaluation mode"):
        acr().train().maps(torch.zeros(1, 3, SIDE, SIDE), {"getam": MapPlan()})


def test_maps_of_an_image_do_not_depend_on_the_batch():
    method = acr().eval()
    images, labels = torch.randn(3, 3, 50, 70), batch_of(((0, 2), (1,), (0, 1, 4))).labels
    plan = {kind: MapPlan(flip=True, side=SIDE) for kind in method.kinds}
    together = method.maps(images, plan, labels)
    everything = method.maps(images, plan)
    for kind, maps in together.items():
        assert maps.shape == (3, K, 50, 70) and not maps[labels == 0].any() and maps.max() <= 1
        for index in range(3):
            alone = method.maps(images[index : index + 1], {kind: plan[kind]}, labels[index : index + 1])[kind]
            torch.testing.assert_close(maps[index], alone[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(maps[labels > 0], everything[kind][labels > 0], rtol=1e-4, atol=1e-5)


def test_maps_in_inference_mode():
    method, images, plan = acr().eval(), torch.randn(2, 3, SIDE, SIDE), {"getam": MapPlan(flip=True)}
    with torch.inference_mode():
        made = method.maps(images, plan)["getam"]
    assert torch.equal(made, method.maps(images, plan)["getam"])


def test_an_image_and_its_mirror_have_mirrored_maps():
    method, images = acr().eval(), torch.randn(1, 3, SIDE, SIDE)
    plan = {kind: MapPlan(flip=True, scales=(1.0, 0.5)) for kind in method.kinds}
    labels = batch_of(((0, 2),)).labels
    mirrored = method.maps(images.flip(-1), plan, labels)
    for kind, maps in method.maps(images, plan, labels).items():
        torch.testing.assert_close(mirrored[kind].flip(-1), maps, rtol=1e-4, atol=1e-5)


# backbones

@pytest.mark.parametrize("size", [(64, 64), (65, 80), (79, 33)])
def test_grids(size):
    for backbone, spare in ((PLAIN, 0), (RESNET, 15)):   # cut off, or padded
        vit = acr(backbone=backbone).network.backbone
        _, grid = vit.embed(torch.zeros(1, 3, *size))
        assert grid == vit.grid_of(*size) == tuple((side + spare) // 16 for side in size)


@pytest.mark.parametrize("name, args, reason", [
    ("deit_tiny_distilled_patch16_224", {}, "distillation token"),
    ("vit_small_resnet26d_224", {}, "another form"),
    ("vit_tiny_patch16_224", {"resnet_layers": [1, 1, 1]}, "resnet_layers.*has no ResNet"),
    ("vit_base_patch16_rpn_224", {}, "class token"),
    ("resnet18", {}, "ResNet"),
])
def test_backbones_that_do_not_fit(name, args, reason):
    with pytest.raises(UserError, match=reason):
        ClassTokenViT(name, args)


def test_a_start_block_that_is_not_there():
    for start in (4, -5):
        with pytest.raises(UserError, match=f"getam.start_block={start}.* has 4 blocks"):
            acr(f"getam.start_block={start}")


def test_registers_stay_before_the_class_token():
    vit = ClassTokenViT("vit_tiny_patch16_224", {"embed_dim": 32, "depth": 2, "num_heads": 2, "reg_tokens": 3})
    assert vit.tokens.shape == (1, 4, 32) and vit.class_tokens == slice(3, 4)


# in other methods

def passes(method, batch):
    """Images that go through the backbone in one step, by whether they are differentiated."""
    count = []
    backbone = method.network.backbone
    hook = backbone.register_forward_pre_hook(lambda _, args: count.append(len(args[0]) * torch.is_grad_enabled()))
    method.losses(batch, 0)
    hook.remove()
    return sum(count)


@pytest.mark.parametrize("build, terms", [
    (more, ["consistency_class", "consistency_affinity"]), (afa, ["consistency_affinity"])
], ids=["more", "afa"])
def test_plugged_in(build, terms):
    off, batch = ["model.drop_path=0", "model.dropout=0"] if build is afa else [], batch_of()
    plain, with_terms = build(*off).train(), build(*off, *(f"loss.weights.{name}=10" for name in terms)).train()
    assert plain.state_dict().keys() == with_terms.state_dict().keys()
    assert (passes(plain, batch), passes(with_terms, batch)) == (2, 4)
    made = with_terms.eval().losses(batch, 0)
    others = plain.eval().losses(batch, 0)   # both have counted one step in their batch statistics
    assert not set(terms) & set(others)
    assert [name for name in made if name not in others] == terms
    for name, value in others.items():
        torch.testing.assert_close(made[name], value, rtol=1e-5, atol=1e-6)
    for name in terms:
        (gradient,) = torch.autograd.grad(made[name], next(with_terms.network.backbone.parameters()), retain_graph=True)
        assert made[name] > 0 and gradient.abs().max() > 0
    trainer = Trainer(with_terms.train(), with_terms.config, Ranks(0, 1, torch.device("cpu")))
    assert set(terms) < set(trainer.step(batch))


def test_more_compares_all_its_class_tokens():
    method, batch = more("loss.weights.consistency_class=1").train(), batch_of()
    out = method.network(batch.images, consistency=True)
    made = [method.network.backbone(view, lambda maps: maps).attention
            for view in (batch.images, batch.images.flip(-1))]
    blocks = [torch.stack(plain_consistency(torch.cat(maps), (4, 4), 4 + K, range(4, 4 + K)))
              for maps in zip(*made, strict=True)]
    torch.testing.assert_close(out.consistency, torch.stack(blocks).mean(0), rtol=1e-5, atol=1e-7)


def test_afa_has_no_class_token():
    with pytest.raises(UserError, match="consistency_class.*consistency_affinity"):
        afa("loss.weights.consistency_class=1")

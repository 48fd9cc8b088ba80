"""The second stage beside an independent formulation (benchmarks/baselines/plain_deeplab.py), and its key maps."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.baselines import plain_deeplab as plain
from engine.config import RunConfig, load_config
from engine.training.optimizer import build_optimizer, set_lr
from model import build_method
from model.batch_norm import FrozenBatchNorm, SyncBatchNorm
from model.deeplab.method import DeepLab, reduced
from model.losses.segmentation import pixel_cross_entropy
from model.method import MapPlan
from utils.batch import Batch
from utils.errors import UserError

CLASSES = 4
BLOCKS = 1, 1, 2, 1
SMALL = "model.backbone_args={layers: [1, 1, 2, 1]}"
VIT = "model.backbone_args={embed_dim: 32, depth: 3, num_heads: 2, img_size: 64, patch_size: 8}"
V2 = ["model.variant=caffe", "model.weights=file.pth", SMALL]
V3PLUS = ["model.architecture=deeplabv3plus", "model.backbone=resnet50", "model.weights=random", SMALL,
          "model.batch_norm=synced", "inference.fusion=mean", "loss.at=image", "loss.scales=[1.0]"]
LARGEFOV = ["model.architecture=largefov", "model.backbone=vit_tiny_patch16_224", "model.weights=random", VIT,
            "model.decoder_channels=16"]


def config_of(*settings: str) -> RunConfig:
    return load_config("deeplab_voc", settings)


def made(*settings: str, seed: int = 0) -> DeepLab:
    torch.manual_seed(seed)
    return build_method(config_of(*settings), CLASSES).eval()


def batch_of(images: Tensor, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    masks = torch.randint(0, CLASSES + 1, (len(images), *images.shape[-2:]), generator=generator).byte()
    masks[torch.rand(masks.shape, generator=generator) < 0.2] = 255
    valid = torch.ones_like(masks, dtype=torch.bool)
    labels = torch.ones(len(images), CLASSES)
    return Batch(["image"] * len(images), images, labels, valid, torch.arange(len(images)), masks=masks)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 49, 65, generator=torch.Generator().manual_seed(3))


def v2_from_file(generation: str, coco: bool = False) -> tuple[DeepLab, dict[str, Tensor]]:
    method, file = made(*V2), plain.kazuto_state_dict(BLOCKS, 1.0, CLASSES + 1, generation, coco=coco)
    if coco:
        method.load_start_weights(file)
    else:
        method.load_state_dict(method.from_official(file))
    return method, plain.without_generation(file)


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-4) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max().clamp(min=1)


@pytest.mark.parametrize("generation", ["old", "new"])
def test_a_released_v2_gives_the_same_logits_maps_and_loss(generation: str, images: Tensor) -> None:
    method, weights = v2_from_file(generation)

    def network(normalised: Tensor) -> Tensor:
        return plain.plain_deeplabv2(weights, plain.caffe_input(normalised))

    with torch.no_grad():
        if generation == "old":   # as the names alone differ
            close(method.network(images), network(images))
            return
        theirs = plain.plain_msc_logits(network, images)
        for ours, other in zip(method.network.of_scales(images, (1.0, 0.75, 0.5)), theirs, strict=True):
            close(ours, other)
        maps = method.maps(images, {"seg": MapPlan(scales=(1.0, 0.75, 0.5))})["seg"]
        close(maps, plain.enlarge(theirs[-1], images.shape[-2:]))
        batch = batch_of(images)
        close(method.losses(batch, 0)["seg"], plain.plain_msc_loss(network, images, batch.masks))


@pytest.mark.parametrize("generation", ["old", "new"])
def test_coco_weights_start_the_backbone_alone(generation: str, images: Tensor) -> None:
    method, weights = v2_from_file(generation, coco=True)
    features = method.network.backbone(images)[1].detach()
    head = {f"aspp.c{i}.{name}": value.detach() for i, branch in enumerate(method.network.decoder.branches)
            for name, value in branch.named_parameters()}
    assert all(value.std() < 0.02 for value in head.values() if value.ndim == 4)   # as it was made
    with torch.no_grad():
        close(method.network(images), plain.plain_deeplabv2({**weights, **head}, plain.caffe_input(images)), 1e-3)
    assert features.std() > 0


def test_the_key_list_of_the_real_network_is_known_to_the_last_key() -> None:
    method = made("model.variant=caffe", "model.weights=file.pth")
    for generation in ("old", "new"):
        file = plain.kazuto_state_dict((3, 4, 23, 3), 1.0, CLASSES + 1, generation)
        method.load_state_dict(method.from_official(file))
        shapes = {name: tuple(value.shape) for name, value in file.items()}
        assert DeepLab.recognise(shapes) == ("deeplab_voc_coco_init", CLASSES)
    coco = plain.kazuto_state_dict((3, 4, 23, 3), 1.0, 91, coco=True)
    assert DeepLab.recognise({name: tuple(value.shape) for name, value in coco.items()}) is None
    broken = {name: value for name, value in coco.items() if "layer4.block7.conv3x3.conv.weight" not in name}
    with pytest.raises(UserError, match=r"'layer3\.6\.conv2\.weight' is missing"):
        method.load_start_weights(broken)
    with pytest.raises(UserError, match="'layer9.weight' is not expected"):
        method.load_start_weights({**coco, "layer9.weight": torch.zeros(1)})


@pytest.mark.parametrize("stride", [8, 16])
@pytest.mark.parametrize("training", [False, True])
def test_v3plus_gives_the_same_logits(stride: int, training: bool, images: Tensor) -> None:
    method = made(*V3PLUS, f"model.output_stride={stride}")
    generator = torch.Generator().manual_seed(1)
    for norm in (part for part in method.modules() if isinstance(part, SyncBatchNorm)):
        for value in (norm.weight, norm.running_var):
            value.data = torch.rand(value.shape, generator=generator) + 0.5
        for value in (norm.bias, norm.running_mean):
            value.data = torch.randn(value.shape, generator=generator) / 4
    net = method.network
    units = {"aspp0": net.decoder.branches[0], "aspp1": net.decoder.branches[1], "aspp2": net.decoder.branches[2],
             "aspp3": net.decoder.branches[3], "pool": net.decoder.pooled[1], "project": net.decoder.project[0],
             "low": net.decoder.low, "refine1": net.decoder.fuse[0], "refine2": net.decoder.fuse[1]}
    head = {f"{name}.weight": unit[0].weight for name, unit in units.items()}
    head |= {f"{name}.bn.{key}": value.clone() for name, unit in units.items()
             for key, value in unit[1].state_dict().items() if key != "num_batches_tracked"}
    head |= {f"classifier.{key}": value for key, value in net.decoder.classifier.state_dict().items()}
    assert head.keys() == plain.plain_v3plus_head(2048, 256, CLASSES + 1).keys()
    backbone = {key: value.clone() for key, value in net.backbone.state_dict().items()}
    method.train(training)
    with torch.no_grad():
        torch.manual_seed(5)   # of the dropout
        ours = plain.enlarge(net(images), images.shape[-2:])
        torch.manual_seed(5)
        close(ours, plain.plain_v3plus(backbone, head, images, stride, training), 2e-3 if training else 1e-4)


@pytest.mark.parametrize("flip", [False, True])
def test_inference_is_that_of_the_plain_loops(flip: bool, images: Tensor) -> None:
    scales = (1.0, 0.75, 1.5)
    method = made(*LARGEFOV, "inference.fusion=mean")
    with torch.no_grad():
        maps = method.maps(images, {"seg": MapPlan(scales=scales, flip=flip)})["seg"]
        close(maps.softmax(1), plain.plain_mean(method.network, images, scales, flip), 1e-5)
    method = made(*LARGEFOV)
    with torch.no_grad():
        square = images[..., :64, :64]
        largest = method.maps(square, {"seg": MapPlan(scales=(1.0,), flip=flip)})["seg"]
        close(largest, plain.plain_largest(method.network, square, (1.0,), flip), 1e-5)
        classes = method.classify(images)
        odds = method.network(images).softmax(1)[:, 1:]
        assert torch.equal(classes > 0, (odds > 0.5).flatten(2).any(2))


@pytest.mark.parametrize("at", ["logits", "image"])
def test_the_loss_is_that_of_the_plain_loop_and_has_its_gradient(at: str, images: Tensor) -> None:
    method, batch = made(*LARGEFOV, f"loss.at={at}"), batch_of(images)
    ours = method.losses(batch, 0)["seg"]
    theirs = plain.plain_msc_loss(method.network, images, batch.masks, at=at)
    close(ours, theirs, 1e-5)
    parameters = list(method.parameters())
    for one, other in zip(*(torch.autograd.grad(loss, parameters) for loss in (ours, theirs)), strict=True):
        close(one, other, 1e-4)


def test_masks_are_reduced_as_pil_does() -> None:
    generator = torch.Generator().manual_seed(0)
    for size, small in ((321, 41), (321, 31), (65, 9), (81, 11), (47, 13)):
        masks = torch.randint(0, 256, (1, size, size), generator=generator).byte()
        assert torch.equal(reduced(masks, (small, small)), plain.plain_nearest(masks, (small, small)))


def test_nothing_known_is_no_loss_and_no_nan() -> None:
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    loss = pixel_cross_entropy(logits, torch.full((1, 4, 4), 255))
    loss.backward()
    assert loss == 0 and (logits.grad == 0).all()
    labels = torch.tensor([[[0, 2, 255, 1]]])
    expected = F.cross_entropy(logits[:, :, :1], labels, ignore_index=255)
    assert torch.allclose(pixel_cross_entropy(logits[:, :, :1], labels), expected)


def test_the_rates_are_the_released_ones_and_frozen_norms_stay(images: Tensor) -> None:
    method, _ = v2_from_file("new", coco=True)
    train = method.config.train
    optimizer = build_optimizer(method.param_groups(train), train)
    groups = {group["name"]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups}
    assert groups == {"backbone": (2.5e-4, 5e-4), "decoder": (2.5e-3, 5e-4), "decoder_biases": (5e-3, 0.0)}
    for step in (0, 1, 10_000, 19_999):
        set_lr(optimizer, step, train, 20_000)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(plain.plain_rate(2.5e-4, step, 20_000, every=1))
    method.train()
    norms = [part for part in method.modules() if isinstance(part, FrozenBatchNorm)]
    before = [{name: value.clone() for name, value in norm.state_dict().items()} for norm in norms]
    learning = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    frozen = [parameter for norm in norms for parameter in norm.parameters()]
    assert {id(p) for p in learning} | {id(p) for p in frozen} == {id(p) for p in method.parameters()}
    method.losses(batch_of(images), 0)["seg"].backward()
    assert all(parameter.grad is not None for parameter in learning) and all(p.grad is None for p in frozen)
    optimizer.step()
    assert norms and all(torch.equal(value, kept[name]) for norm, kept in zip(norms, before, strict=True)
                         for name, value in norm.state_dict().items())


@pytest.mark.parametrize("settings", [V3PLUS, LARGEFOV], ids=["v3plus", "largefov"])
def test_every_parameter_learns(settings: list[str], images: Tensor) -> None:
    method = made(*settings).train()
    groups = [parameter for group in method.param_groups(method.config.train) for parameter in group["params"]]
    assert sorted(map(id, groups)) == sorted(map(id, method.parameters()))
    method.losses(batch_of(images), 0)["seg"].backward()
    assert all(parameter.grad is not None for parameter in method.parameters())


@pytest.mark.parametrize(("settings", "words"), [
    (["model.weights=random"], "frozen needs trained weights"),
    ([*V3PLUS, "train.batch_size=1"], "needs 2 images or more"),
    (["model.variant=caffe", "model.backbone=resnet18"], "no plain ResNet of bottlenecks"),
    (["model.backbone=resnet10l"], "did you mean"),
    (["model.output_stride=32"], "expected 8 or 16"),
    (["model.backbone=vit_tiny_patch16_224"], "no ResNet such as resnet101"),
    (["model.architecture=largefov", "model.backbone=resnet50"], "not a plain ViT"),
    ([*LARGEFOV, "data.crop_size=64", "loss.scales=[1.0,0.1]"], "loss.scales=0.1: data.crop_size has 6 pixels then"),
    ([*V3PLUS, "loss.scales=[0.002]"], "0 pixels then, too few"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_what_does_not_go_together_is_one_line(settings: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        made(*settings)


def test_weights_of_the_other_form_are_refused() -> None:
    coco = plain.kazuto_state_dict(BLOCKS, 1.0, coco=True)
    torchvision = {key: value for key, value in made("model.weights=timm", SMALL).network.backbone.state_dict().items()
                   if not key.endswith("num_batches_tracked")}   # as files of that time
    with pytest.raises(UserError, match=r"give model\.variant=caffe"):
        made("model.weights=timm", SMALL).load_start_weights(coco)
    with pytest.raises(UserError, match="takes kazuto1011's files alone"):
        made(*V2).load_start_weights(torchvision)
    other = made("model.weights=timm", SMALL, seed=1)
    other.load_start_weights({**torchvision, "fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)})
    assert all(torch.equal(other.network.backbone.state_dict()[key], value) for key, value in torchvision.items())

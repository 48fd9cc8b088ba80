"""The weight files of kazuto1011/deeplab-pytorch, whose ResNet-101 is Caffe's: an explicit key map, strict.

Two generations of its names: `proj`, `aspp.stages.c0` and the prefix `scale.`; `shortcut`, `aspp.c0` and `base.`. The
files that start from COCO have no head, or the one of a DeepLab v1 (`fc`), of COCO's classes.
"""

import re
from collections.abc import Mapping

from torch import Tensor, nn

from model.backbones.resnet import HEAD, with_counters
from model.backbones.start_weights import check_keys
from model.method import Released

PREFIX = re.compile(r"(module\.)?(scale\.|base\.)?")
STEM = "layer1.conv1.conv.weight"   # known by it; torchvision's layer1 holds layer1.0.conv1.weight
STEM_PARTS = {"conv": "conv1", "bn": "bn1"}
CONVOLUTIONS = {   # of a block -> timm's convolution and batch norm
    "reduce": ("conv1", "bn1"),
    "conv3x3": ("conv2", "bn2"),
    "increase": ("conv3", "bn3"),
    "shortcut": ("downsample.0", "downsample.1"),
    "proj": ("downsample.0", "downsample.1"),
}
BLOCK = re.compile(r"layer([2-5])\.block(\d+)\.(\w+)\.(conv|bn)\.(\w+)")
BRANCH = re.compile(r"aspp\.(?:stages\.)?c(\d)\.(weight|bias)")


def is_official(weights: Mapping) -> bool:
    """Whether it is one of these files."""
    return STEM in {PREFIX.sub("", key, count=1) for key in weights}


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> Released | None:
    """A trained file is known by its names, and by its head what it was trained on; one without is start weights."""
    heads = [shape for key, shape in shapes.items() if BRANCH.search(key) and key.endswith("c0.bias")]
    return Released("deeplab_voc_coco_init", heads[0][0] - 1) if heads and is_official(shapes) else None


def backbone_of(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The ResNet under timm's names, for RGB in place of BGR; heads are left out, unknown keys stay for the check."""
    made = {}
    for key, value in weights.items():
        own = our_name(key)
        if own.startswith(("decoder.", HEAD)):
            continue
        made[own] = value.float()[:, [2, 1, 0]] if own == "conv1.weight" and value.ndim == 4 else value
    return made


def from_official(weights: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Our state dict of a DeepLab v2. Raises UserError naming the first missing, unexpected or misshaped key."""
    heads = {our_name(key): value for key, value in weights.items() if our_name(key).startswith("decoder.")}
    made = heads | {f"backbone.{name}": value for name, value in backbone_of(weights).items()}
    own = network.state_dict()
    made = with_counters(made, own)
    check_keys(made, {name: tuple(value.shape) for name, value in own.items()}, "official DeepLab weights")
    return made


def our_name(key: str) -> str:
    """timm's name of a tensor of the ResNet, `decoder.*` of the head; an unknown one as it is, without prefix."""
    key = PREFIX.sub("", key, count=1)
    if match := BRANCH.fullmatch(key):
        return f"decoder.branches.{match[1]}.{match[2]}"
    if key.startswith("layer1.conv1."):
        part, _, name = key.removeprefix("layer1.conv1.").partition(".")
        return f"{STEM_PARTS.get(part, part)}.{name}"
    match = BLOCK.fullmatch(key)
    if match is None or match[3] not in CONVOLUTIONS:
        return key
    layer, block = int(match[1]) - 1, int(match[2]) - 1
    return f"layer{layer}.{block}.{CONVOLUTIONS[match[3]][match[4] == 'bn']}.{match[5]}"

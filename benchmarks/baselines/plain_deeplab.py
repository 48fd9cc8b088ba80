"""DeepLab formulated plainly, from the papers and from public facts: what the second stage is compared with.

DeepLabV2 (Chen et al., TPAMI 2018) on the ResNet of Caffe under the names and with the loss of kazuto1011's
deeplab-pytorch; DeepLabV3+ (Chen et al., ECCV 2018) on torchvision's; inference; the augmentation, mask pixel by pixel.
Weights are plain dicts. Nothing of model/ computes here: tests take this for an oracle.

Settings of deeplab-pytorch on VOC (its main.py, configs/voc12.yaml, libs/utils/lr_scheduler.py):

    part                              rate        weight decay
    convolutions of the backbone      2.5e-4      5e-4
    weights of the ASPP               2.5e-3      5e-4
    biases of the ASPP                5e-3        0
    batch norms                       frozen: statistics stay, scale and shift are in no group

SGD with momentum 0.9; 20,000 steps of 10 images, 5 at a time, whose mean losses are averaged (two halves); crop 321;
rate * (1 - step / 20,000) ** 0.9, set at every tenth step alone (`plain_rate`). ASPP from N(0, 0.01), biases 0.
Scale one of 0.5, 0.75, 1, 1.25, 1.5; padded right and below; flipped after the crop. Released: 76.65 on VOC val, 77.93
with the CRF (the whole image at 1, 0.75 and 0.5 without flip).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

IGNORE = 255
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)   # of our input: ImageNet, RGB in 0..1
CAFFE_MEAN = (104.008, 116.669, 122.675)   # BGR in 0..255
Weights = Mapping[str, Tensor]
Network = Callable[[Tensor], Tensor]   # images (B, 3, H, W) -> logits (B, C, h, w)

# what differs between the key lists of deeplab-pytorch: the projection on the shortcut, the ASPP, the MSC wrapper
GENERATIONS = {"old": ("proj", "aspp.stages.c", "scale."), "new": ("shortcut", "aspp.c", "base.")}


def enlarge(x: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)


def plain_norm(x: Tensor, weights: Weights, name: str, training: bool = False) -> Tensor:
    """Batch norm by the stored statistics; training: by those of the batch, and nothing is stored."""
    mean, var = weights[f"{name}.running_mean"], weights[f"{name}.running_var"]
    if training:
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    mean, var, scale, shift = (
        value.view(1, -1, 1, 1) for value in (mean, var, weights[f"{name}.weight"], weights[f"{name}.bias"])
    )
    return (x - mean) / (var + 1e-5).sqrt() * scale + shift


def caffe_input(images: Tensor) -> Tensor:
    """Our normalised RGB (B, 3, H, W) -> BGR in 0..255 minus Caffe's mean. Our padding, 0, becomes (-0.478, -0.389, 1),
    there it is 0."""
    rgb = (images * images.new_tensor(STD).view(3, 1, 1) + images.new_tensor(MEAN).view(3, 1, 1)) * 255
    return rgb.flip(1) - images.new_tensor(CAFFE_MEAN).view(3, 1, 1)


def kazuto_convolutions(blocks: Sequence[int], width: float = 1.0, shortcut: str = "shortcut") -> Iterator[tuple]:
    """Name, channels out and in, kernel of every convolution of the backbone. Each is NAME.conv.weight without a bias,
    and NAME.bn.{weight,bias,running_mean,running_var} follow it."""
    stem = int(64 * width)
    yield "layer1.conv1", stem, 3, 7
    inputs = stem
    for stage, count in enumerate(blocks):
        middle = stem * 2**stage
        for block in range(count):
            name = f"layer{stage + 2}.block{block + 1}"
            yield f"{name}.reduce", middle, inputs, 1
            yield f"{name}.conv3x3", middle, middle, 3
            yield f"{name}.increase", 4 * middle, middle, 1
            if block == 0:
                yield f"{name}.{shortcut}", 4 * middle, inputs, 1
            inputs = 4 * middle


def kazuto_state_dict(
    blocks: Sequence[int], width: float = 1.0, classes: int = 21, generation: str = "new", seed: int = 0,
    coco: bool = False,
) -> dict[str, Tensor]:
    """A file of deeplab-pytorch with random values. ResNet-101: blocks (3, 4, 23, 3), width 1.

    generation "old" (of 2018): `scale.layer2.block1.proj.conv.weight`, `scale.aspp.stages.c0.weight`, and no
    num_batches_tracked. "new" (the master branch, which loads the released VOC and COCO-Stuff files strictly):
    `base.layer2.block1.shortcut.conv.weight`, `base.aspp.c0.weight`, num_batches_tracked after each norm.
    coco: what init.caffemodel is converted to, to start from. Old: prefix `scale.`, no head. New: no prefix, and the
    classifier `fc.{weight,bias}` of DeepLab v1, 1x1 with 91 classes, which belongs to no DeepLabV2.
    """
    shortcut, aspp, prefix = GENERATIONS[generation]
    generator, state = torch.Generator().manual_seed(seed), {}
    prefix = "" if coco and generation == "new" else prefix
    random = partial(torch.randn, generator=generator)
    for name, outputs, inputs, kernel in kazuto_convolutions(blocks, width, shortcut):
        state[f"{prefix}{name}.conv.weight"] = random(outputs, inputs, kernel, kernel) / (inputs * kernel**2) ** 0.5
        norm = f"{prefix}{name}.bn"
        state[f"{norm}.weight"] = 1 + 0.2 * random(outputs)
        state[f"{norm}.bias"], state[f"{norm}.running_mean"] = 0.1 * random(outputs), 0.1 * random(outputs)
        state[f"{norm}.running_var"] = 0.5 + torch.rand(outputs, generator=generator)
        if generation == "new":
            state[f"{norm}.num_batches_tracked"] = torch.tensor(0)
    channels = int(64 * width) * 32
    if coco and generation == "new":
        state["fc.weight"], state["fc.bias"] = 0.1 * random(91, channels, 1, 1), random(91)
    for branch in range(0 if coco else 4):
        state[f"{prefix}{aspp}{branch}.weight"] = random(classes, channels, 3, 3) / (9 * channels) ** 0.5
        state[f"{prefix}{aspp}{branch}.bias"] = 0.1 * random(classes)
    return state


def without_generation(state: Weights) -> dict[str, Tensor]:
    """A file of either generation under the newer names without prefix: what `plain_deeplabv2` takes. No `fc`."""
    found = {}
    for name, value in state.items():
        name = name.removeprefix("scale.").removeprefix("base.").replace(".proj.", ".shortcut.")
        name = name.replace("aspp.stages.", "aspp.")
        if not name.startswith("fc.") and not name.endswith("num_batches_tracked"):
            found[name] = value
    return found


def plain_deeplabv2(weights: Weights, images: Tensor) -> Tensor:
    """`caffe_input` images (B, 3, H, W) -> logits (B, C, h, w) at stride 8: 41 of 321, 65 of 513, 29 of 224."""
    def unit(x: Tensor, name: str, stride: int = 1, dilation: int = 1, relu: bool = True) -> Tensor:
        kernel = weights[f"{name}.conv.weight"]
        padding = (kernel.shape[-1] // 2) * dilation
        x = plain_norm(F.conv2d(x, kernel, None, stride, padding, dilation), weights, f"{name}.bn")
        return x.relu() if relu else x

    x = F.max_pool2d(unit(images, "layer1.conv1", 2), 3, 2, 1, ceil_mode=True)
    for layer, stride, dilation in ((2, 1, 1), (3, 2, 1), (4, 1, 2), (5, 1, 4)):
        block = 1
        while f"layer{layer}.block{block}.reduce.conv.weight" in weights:
            name, step = f"layer{layer}.block{block}", stride if block == 1 else 1
            h = unit(x, f"{name}.reduce", step)
            h = unit(h, f"{name}.conv3x3", 1, dilation)
            h = unit(h, f"{name}.increase", relu=False)
            x = (h + (unit(x, f"{name}.shortcut", step, relu=False) if block == 1 else x)).relu()
            block += 1
    return plain_aspp_v2(weights, x)


def plain_aspp_v2(weights: Weights, features: Tensor, rates: Sequence[int] = (6, 12, 18, 24)) -> Tensor:
    """The sum of dilated 3x3 convolutions `aspp.c0` and so on; of any backbone's features."""
    return sum(
        F.conv2d(features, weights[f"aspp.c{i}.weight"], weights[f"aspp.c{i}.bias"], 1, rate, rate)
        for i, rate in enumerate(rates)
    )


def plain_msc_logits(network: Network, images: Tensor, scales: Sequence[float] = (1.0, 0.75, 0.5)) -> list[Tensor]:
    """Logits of every scale at their own sizes, and the largest of them at the size of the first, which is scale 1."""
    logits = [network(images)]
    for scale in scales[1:]:
        logits.append(network(enlarge(images, [int(side * scale) for side in images.shape[-2:]])))
    largest = logits[0]
    for other in logits[1:]:
        largest = torch.maximum(largest, enlarge(other, largest.shape[-2:]))
    return [*logits, largest]


def plain_nearest(labels: Tensor, size: Sequence[int]) -> Tensor:
    """(B, H, W) -> (B, *size): PIL's nearest, which looks at the centres of the new pixels."""
    small = [Image.fromarray(label.numpy().astype(np.uint8)).resize(size[::-1], Image.NEAREST) for label in labels]
    return torch.stack([torch.from_numpy(np.array(label)).long() for label in small])


def plain_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over what is not ignored; 0, and no nan as in torch, where all is ignored."""
    known = labels != IGNORE
    rows = logits.permute(0, 2, 3, 1)[known]
    if len(rows) == 0:
        return logits.sum() * 0
    return (rows.logsumexp(1) - rows[torch.arange(len(rows)), labels[known].long()]).mean()


def plain_msc_loss(
    network: Network, images: Tensor, labels: Tensor, scales: Sequence[float] = (1.0, 0.75, 0.5), at: str = "logits"
) -> Tensor:
    """The sum, not the mean, over scales and the maximum; labels uint8 or int64 (B, H, W). at: "logits", as released,
    or "image": the logits are enlarged to the labels instead."""
    found = plain_msc_logits(network, images, scales)
    if len(scales) == 1:
        found = found[:1]   # the maximum is the same again
    total = 0
    for logits in found:
        small = labels if at == "image" else plain_nearest(labels, logits.shape[-2:])
        total = total + plain_cross_entropy(enlarge(logits, small.shape[-2:]), small)
    return total


def plain_rate(lr: float, step: int, steps: int, every: int = 10) -> float:
    """Of a step from 0: released, the rate stays for `every` steps; 1: it changes at each."""
    return lr * (1 - (step // every * every) / steps) ** 0.9


def plain_torchvision_resnet(
    weights: Weights, images: Tensor, output_stride: int, training: bool = False
) -> tuple[Tensor, Tensor]:
    """Features of layer1 and of layer4 of bottlenecks under torchvision's names (conv1, bn1, layer1.0.conv1, ...);
    normalised RGB goes in. A stage that dilates instead of striding keeps the former stage's dilation in its first
    3x3, and the stride of the others sits there."""
    def conv_norm(x: Tensor, conv: str, norm: str, stride: int = 1, dilation: int = 1) -> Tensor:
        kernel = weights[f"{conv}.weight"]
        x = F.conv2d(x, kernel, None, stride, kernel.shape[-1] // 2 * dilation, dilation)
        return plain_norm(x, weights, norm, training)

    x = F.max_pool2d(conv_norm(images, "conv1", "bn1", 2).relu(), 3, 2, 1)
    # stride, dilation of the first 3x3, of the others
    stages = [(1, 1, 1), (2, 1, 1), (2, 1, 1), (1, 1, 2)] if output_stride == 16 else \
             [(1, 1, 1), (2, 1, 1), (1, 1, 2), (1, 2, 4)]
    features = []
    for layer, (stride, first, dilation) in enumerate(stages, 1):
        block = 0
        while f"layer{layer}.{block}.conv1.weight" in weights:
            name, step, spread = f"layer{layer}.{block}", stride if block == 0 else 1, first if block == 0 else dilation
            h = conv_norm(x, f"{name}.conv1", f"{name}.bn1").relu()
            h = conv_norm(h, f"{name}.conv2", f"{name}.bn2", step, spread).relu()
            h = conv_norm(h, f"{name}.conv3", f"{name}.bn3")
            if block == 0:
                x = conv_norm(x, f"{name}.downsample.0", f"{name}.downsample.1", step)
            x = (h + x).relu()
            block += 1
        features.append(x)
    return features[0], features[3]


def plain_v3plus_head(
    high: int, low: int, classes: int = 21, channels: int = 256, reduced: int = 48, seed: int = 0
) -> dict[str, Tensor]:
    """Random weights of a head: units `aspp0` (1x1), `aspp1` to `aspp3` (3x3), `pool`, `project`, `low`, `refine1`,
    `refine2`, each UNIT.weight without a bias and UNIT.bn.{weight,bias,running_mean,running_var}, and
    classifier.{weight,bias}. high, low: channels of layer4 and layer1."""
    generator = torch.Generator().manual_seed(seed)
    random = partial(torch.randn, generator=generator)
    sizes = {"aspp0": (high, 1), "pool": (high, 1), "project": (5 * channels, 1)}
    sizes |= {f"aspp{i}": (high, 3) for i in (1, 2, 3)}
    sizes |= {"low": (low, 1), "refine1": (channels + reduced, 3), "refine2": (channels, 3)}
    head = {"classifier.weight": 0.1 * random(classes, channels, 1, 1), "classifier.bias": 0.1 * random(classes)}
    for unit, (inputs, kernel) in sizes.items():
        outputs = reduced if unit == "low" else channels
        head[f"{unit}.weight"] = random(outputs, inputs, kernel, kernel) / (inputs * kernel**2) ** 0.5
        head[f"{unit}.bn.weight"], head[f"{unit}.bn.bias"] = 1 + 0.2 * random(outputs), 0.1 * random(outputs)
        head[f"{unit}.bn.running_mean"] = 0.1 * random(outputs)
        head[f"{unit}.bn.running_var"] = 0.5 + torch.rand(outputs, generator=generator)
    return head


def plain_v3plus(
    backbone: Weights, head: Weights, images: Tensor, output_stride: int = 16, training: bool = False
) -> Tensor:
    """Normalised RGB (B, 3, H, W) -> logits (B, C, H, W). backbone: under torchvision's names; head: as
    `plain_v3plus_head` has it. training: statistics of the batch, and dropout 0.5 after the projection."""
    def unit(x: Tensor, name: str, dilation: int = 1) -> Tensor:
        kernel = head[f"{name}.weight"]
        x = F.conv2d(x, kernel, None, 1, kernel.shape[-1] // 2 * dilation, dilation)
        return plain_norm(x, head, f"{name}.bn", training).relu()

    low, high = plain_torchvision_resnet(backbone, images, output_stride, training)
    rates = {16: (6, 12, 18), 8: (12, 24, 36)}[output_stride]
    parts = [unit(high, "aspp0"), *(unit(high, f"aspp{i}", rate) for i, rate in enumerate(rates, 1))]
    parts.append(unit(high.mean((2, 3), keepdim=True), "pool").expand(-1, -1, *high.shape[-2:]))
    x = F.dropout(unit(torch.cat(parts, 1), "project"), 0.5, training)
    x = torch.cat([enlarge(x, low.shape[-2:]), unit(low, "low")], 1)
    x = unit(unit(x, "refine1"), "refine2")
    return enlarge(F.conv2d(x, head["classifier.weight"], head["classifier.bias"]), images.shape[-2:])


def passes(network: Network, images: Tensor, scales: Sequence[float], flip: bool) -> Iterator[list[Tensor]]:
    """For each scale the logits of the images and, mirrored back, of their mirrors, at the images' size."""
    size = images.shape[-2:]
    for scale in scales:
        scaled = images if scale == 1 else enlarge(images, [int(side * scale) for side in size])
        found = [enlarge(network(scaled), size)]
        if flip:
            found.append(enlarge(network(scaled.flip(-1)), size).flip(-1))
        yield found


def plain_largest(network: Network, images: Tensor, scales: Sequence[float], flip: bool) -> Tensor:
    """Logits: of image and mirror summed, the largest over the scales. deeplab-pytorch takes, without flip, the last of
    `plain_msc_logits`, which is made at the size of the logits of scale 1 and enlarged afterwards."""
    return torch.stack([sum(found) for found in passes(network, images, scales, flip)]).amax(0)


def plain_mean(network: Network, images: Tensor, scales: Sequence[float], flip: bool) -> Tensor:
    """The mean of all softmax probabilities."""
    found = [logits.softmax(1) for both in passes(network, images, scales, flip) for logits in both]
    return sum(found) / len(found)


def nearest_indices(source: int, target: int) -> list[int]:
    """Of `source` pixels in a row, that in which the centre of each of `target` pixels lies. The centres are added up
    in doubles as PIL does, which decides where one lies exactly on a border: exact arithmetic takes the right pixel."""
    found, step = [], source / target
    position = step * 0.5
    for _ in range(target):
        found.append(int(position))
        position += step
    return found


def plain_scale_crop(
    image: np.ndarray, mask: np.ndarray, factor: float, flip: bool, corner: Sequence[int], crop_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """RGB uint8 (H, W, 3) and ids uint8 (H, W) -> normalised (3, S, S), ids (S, S), which pixels are real (S, S).

    corner: where, from the crop's upper left, the scaled and perhaps flipped image begins: (y, x), negative where the
    side is longer than the crop.
    """
    height, width = (max(1, int(side * factor)) for side in mask.shape)
    scaled = np.asarray(Image.fromarray(image).resize((width, height), Image.BILINEAR)) / 255
    rows, columns = nearest_indices(mask.shape[0], height), nearest_indices(mask.shape[1], width)
    crop = np.tile(np.array(MEAN), (crop_size, crop_size, 1))
    ids, valid = np.full((crop_size, crop_size), IGNORE, np.uint8), np.zeros((crop_size, crop_size), bool)
    for y in range(crop_size):
        for x in range(crop_size):
            row, column = y - corner[0], x - corner[1]
            if 0 <= row < height and 0 <= column < width:
                column = width - 1 - column if flip else column
                crop[y, x], ids[y, x] = scaled[row, column], mask[rows[row], columns[column]]
                valid[y, x] = True
    normalised = torch.from_numpy((crop - MEAN) / STD).permute(2, 0, 1).float()
    return normalised, torch.from_numpy(ids), torch.from_numpy(valid)

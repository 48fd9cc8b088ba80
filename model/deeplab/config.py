"""The keys of DeepLab's own sections. Sources: papers (v2: TPAMI 2018, v3+: ECCV 2018), kazuto1011 (deeplab-pytorch,
the v2 that the field trains on pseudo masks), ours."""

from typing import Annotated, Literal

from pydantic import BeforeValidator

from model.method import ModelSection
from utils.schema import Count, FilePath, Number, Scales, Section, Text, key

# files and the command line give texts
Stride = Annotated[Literal[8, 16], BeforeValidator(lambda given: int(given) if str(given).isdecimal() else given)]


class Model(ModelSection):
    architecture: Literal["deeplabv2", "deeplabv3plus", "largefov"] = key(
        "deeplabv2", "papers; largefov: the decoder of MoRe, on a plain timm ViT"
    )
    backbone: Text = key(
        "resnet101.tv_in1k", "paper: a ResNet of timm; a plain timm ViT for largefov", resets={"backbone_args": {}}
    )
    weights: FilePath | None = key("timm", "ours: ImageNet's of torchvision; or a file, in its names or kazuto1011's")
    output_stride: Stride = key(8, "paper of v2; v3+ trains at 16: of a ResNet's last stage")
    batch_norm: Literal["frozen", "synced"] = key(
        "frozen", "kazuto1011: of the ResNet, neither statistics nor weights learn; synced: over all processes"
    )
    variant: Literal["torchvision", "caffe"] = key(
        "torchvision", "ours: form of the ResNet; caffe: kazuto1011's, which its COCO weights need"
    )
    decoder_channels: Count = key(512, "code of MoRe: of largefov")


class Inference(Section):
    fusion: Literal["largest", "mean"] = key(
        "largest", "paper of v2: of logits over scales; mean: of probabilities over scales and flip, as v3+"
    )


class Weights(Section):
    seg: Number = key(1.0, "paper")


class StartAfter(Section):
    seg: int = key(-1, "ours")


class Loss(Section):
    scales: Scales = key((1.0, 0.75, 0.5), "kazuto1011: a loss at each of them and, of several, at their maximum")
    at: Literal["logits", "image"] = key(
        "logits", "paper of v2: masks are reduced to the logits' size; image: logits are enlarged, as v3+"
    )
    weights: Weights = Weights()
    start_after: StartAfter = StartAfter()


class DeepLabConfig(Section):
    model: Model = Model()
    inference: Inference = Inference()
    loss: Loss = Loss()


DEFAULTS = {
    "data": {"augmentation": "scale_crop", "crop_size": 321, "resize_range": [0.5, 1.5]},   # kazuto1011: of 5 factors
    "train": {
        "optimizer": "sgd",        # paper
        "lr": 2.5e-4,              # paper
        "momentum": 0.9,           # paper
        "weight_decay": 5e-4,      # paper
        "batch_size": 10,          # paper
        "warmup_iterations": 0,    # paper
    },
    "evaluate": {"base_size": None, "flip": False, "scales": {"seg": [1.0, 0.75, 0.5]}},    # kazuto1011
}

"""The keys of ACR's own sections. Sources: paper (ICCV 2023 workshop), code (as released), ours."""

from typing import Literal

from model.method import ModelSection
from model.shared_keys import ConsistencyStart, ConsistencyWeights
from utils.schema import FilePath, Flag, Number, Section, Text, key


class Model(ModelSection):
    backbone: Text = key(
        "vit_base_r50_s16_384", "paper: any plain timm ViT by name, or such a hybrid", resets={"backbone_args": {}}
    )
    weights: FilePath | None = key(
        "vit_base_r50_imagenet", "paper: a name of weights/registry.yaml, a file, timm, random"
    )


class Getam(Section):
    """How GETAM localises: gradients of a class's logit with respect to attention."""

    function: Literal["grad", "grad_s", "cam_grad", "cam_grad_s"] = key("grad", "code: its script; else cam_grad_s")
    start_block: int = key(-2, "code: blocks from this one on, 10 of 12 in its script, else 9")
    affinity: Flag = key(True, "code: its script; whether the attention between patches spreads the map")


class Weights(ConsistencyWeights):
    """The weight of each term once it has started."""

    cls: Number = key(1.0, "code")
    cls_mirror: Number = key(1.0, "code: of the mirrored images")
    consistency_class: Number = key(125.0, "code: on VOC")
    consistency_affinity: Number = key(125.0, "code: on VOC")


class StartAfter(ConsistencyStart):
    """A term's weight is 0 while the iteration is <= this; -1: from the first on."""

    cls: int = key(-1, "code")
    cls_mirror: int = key(-1, "code")


class Loss(Section):
    weights: Weights = Weights()
    start_after: StartAfter = StartAfter()


class ACRConfig(Section):
    model: Model = Model()
    getam: Getam = Getam()
    loss: Loss = Loss()


DEFAULTS = {
    "data": {"augmentation": "long_side_crop", "crop_size": 384, "resize_range": [0.9, 1 / 0.875]},   # code
    "train": {
        "optimizer": "sgd",        # code
        "lr": 0.05,                # code
        "head_lr_factor": 1.0,     # code
        "momentum": 0.0,           # code: what its arguments say, see docs/differences.md
        "weight_decay": 5e-4,      # code
        "epochs": 10,              # code
        "warmup_iterations": 0,    # code
    },
    "evaluate": {"base_size": 384},                                                                   # code
    "crf": {"pos_xy_std": 3.0, "bi_xy_std": 80.0, "bi_rgb_std": 13.0, "bi_w": 10.0},                  # code
}

"""The keys of AFA's own sections. Sources: paper (CVPR 2022), code (as released; on VOC where COCO differs), ours."""

from typing import Literal

from model.method import ModelSection
from model.shared_keys import AffinityConsistencyStart, AffinityConsistencyWeights, EnergyKeys, PixelLabelKeys
from utils.schema import Count, FilePath, Flag, Index, Number, Scales, Section, Share, Text, key


class Model(ModelSection):
    backbone: Text = key("mit_b1", "paper: mit_b0 to mit_b5", resets={"backbone_args": {}})
    weights: FilePath | None = key("mit_b1_imagenet", "paper: a name of weights/registry.yaml, a file, or random")
    strides: tuple[Count, Count, Count, Count] = key((4, 2, 2, 1), "code: of the stages")
    drop_path: Share = key(0.1, "code")
    dropout: Share = key(0.1, "code: of the decoder")
    decoder_channels: Count = key(256, "code")
    pooling: Literal["max", "mean"] = key("max", "code: over the patches, before the classifier")


class PseudoLabels(PixelLabelKeys):
    cam_scales: Scales = key((1.0, 0.5, 1.5), "code")
    cam_pass: Literal["train", "eval"] = key(
        "train", "code: mode of the network while it makes CAMs; train counts these in the decoder's batch statistics"
    )
    high: Share = key(0.55, "code: background score above which a pixel is a class")
    low: Share = key(0.35, "code: background score below which it is background")
    walk_after: int = key(6000, "code: then the segmentation learns from CAMs after the random walk, not from CAMs")
    walk_for_affinity: Flag = key(False, "code: whether the affinity loss does so too; on COCO it does")
    radius: Index = key(8, "code: of the walk and of the affinity loss, in patches; 0: none")


class Weights(AffinityConsistencyWeights):
    """The weight of each term once it has started. There is no class token, so no consistency_class."""

    cls: Number = key(1.0, "paper")
    seg: Number = key(0.1, "paper")
    affinity: Number = key(0.1, "paper")
    energy: Number = key(0.0, "paper: 0.01; the released code leaves the term out")


class StartAfter(AffinityConsistencyStart):
    """A term's weight is 0 while the iteration is <= this; -1: from the first on."""

    cls: int = key(-1, "code")
    seg: int = key(2000, "code")
    affinity: int = key(2000, "code")
    energy: int = key(2000, "code")


class Loss(EnergyKeys):
    weights: Weights = Weights()
    start_after: StartAfter = StartAfter()


class AFAConfig(Section):
    model: Model = Model()
    pseudo_labels: PseudoLabels = PseudoLabels()
    loss: Loss = Loss()


DEFAULTS = {
    "data": {"augmentation": "scale_flip_crop", "crop_size": 512, "resize_range": [0.5, 2.0]},   # code
    "train": {"power": 1.0},                                                                     # code
    "evaluate": {
        "base_size": None,
        "long_side": 512,                                                                        # code
        "bkg": 0.45,                                                                             # code
        "scales": {"cam": [1.0, 0.5, 1.5], "affinity_cam": [1.0, 0.5, 1.5], "seg": [1.0, 0.5, 0.75]},   # code
    },
    "crf": {"pos_xy_std": 3.0, "bi_xy_std": 64.0, "bi_rgb_std": 5.0},                            # code
}

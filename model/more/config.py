"""The keys of MoRe's own sections. Sources: paper (AAAI 2025), code and log (as released), ours."""

from pydantic import model_validator

from model.method import ModelSection
from model.shared_keys import ConsistencyStart, ConsistencyWeights, EnergyKeys, PixelLabelKeys
from utils.schema import Count, FilePath, Index, NotNegative, Number, Positive, Scales, Section, Share, Text, key

HighLow = tuple[Share, Share]


class Model(ModelSection):
    backbone: Text = key("vit_base_patch16_224", "paper: any plain timm ViT by name", resets={"backbone_args": {}})
    weights: FilePath | None = key("vit_base_imagenet", "paper: a name of weights/registry.yaml, a file, timm, random")
    registers: Index = key(4, "code")
    aux_block: int = key(-3, "code: block whose output feeds the auxiliary classifier")
    token_ratio: Share = key(0.5, "paper: share of neighbours GCR keeps")
    decoder_channels: Count = key(512, "code")
    token_lr_factor: NotNegative = key(1.0, "ours: of the class tokens and registers, over the backbone's rate")


class Stages(Section):
    """[high, low] of the token labels, from the auxiliary CAM and later from the main CAM."""

    aux: HighLow = key((0.5, 0.25), "code")
    main: HighLow = key((0.6, 0.35), "code")

    @model_validator(mode="after")
    def _ordered(self) -> "Stages":
        for name, (high, low) in self:
            if high < low:
                self.refuse(name, "[high, low] with high >= low")
        return self


class UncertainStages(Stages):
    aux: HighLow = key((0.7, 0.25), "code")


class PseudoLabels(PixelLabelKeys):
    cam_scales: Scales = key((1.0, 0.5, 0.75, 1.5), "code")
    high: Share = key(0.7, "code: pixel and ptc labels")
    low: Share = key(0.25, "code")
    certain: Stages = Stages()
    uncertain: UncertainStages = UncertainStages()
    main_cam_after: int = key(10000, "code: then token labels come from the main CAM")


class Weights(ConsistencyWeights):
    """The weight of each term once it has started."""

    cls: Number = key(1.0, "code")
    cls_aux: Number = key(1.0, "code")
    token: Number = key(1.0, "code")
    ptc: Number = key(0.3, "code")
    certain: Number = key(0.2, "code")
    uncertain: Number = key(0.1, "code")
    seg: Number = key(0.12, "code")
    energy: Number = key(0.05, "code")


class StartAfter(ConsistencyStart):
    """A term's weight is 0 while the iteration is <= this; -1: from the first on."""

    cls: int = key(-1, "code")
    cls_aux: int = key(-1, "code")
    token: int = key(-1, "code")
    ptc: int = key(-1, "code")
    certain: int = key(-1, "code")
    uncertain: int = key(-1, "code")
    seg: int = key(2000, "code")
    energy: int = key(2000, "code")


class Loss(EnergyKeys):
    weights: Weights = Weights()
    start_after: StartAfter = StartAfter()
    certain_temperature: Positive = key(0.5, "code")
    token_temperature: Positive = key(0.07, "code")
    uncertain_tokens: Count = key(8, "code: tokens sampled in each image")


class MoReConfig(Section):
    model: Model = Model()
    pseudo_labels: PseudoLabels = PseudoLabels()
    loss: Loss = Loss()


DEFAULTS = {
    "evaluate": {
        "maps": ["cam", "lam", "seg"],
        "scales": {"cam": [1.0], "lam": [1.0], "seg": [1.0, 1.25, 1.5]},   # code
    }
}
RENAMED = {   # keys of schema 1; (key, value) where a value has another name
    "evaluate.cam_scales": "evaluate.scales.cam",
    "evaluate.lam_scales": "evaluate.scales.lam",
    "evaluate.seg_scales": "evaluate.scales.seg",
    ("evaluate.predict_from", "segmentation"): "seg",
}

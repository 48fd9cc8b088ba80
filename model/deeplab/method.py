"""The second stage: DeepLab (v2: TPAMI 2018, v3+: ECCV 2018; LargeFOV of ICLR 2015 on a ViT) learns from masks."""

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from model.deeplab.config import DEFAULTS, DeepLabConfig
from model.deeplab.network import DeepLabNetwork
from model.deeplab.official import STEM, backbone_of, from_official, is_official, recognise
from model.losses.segmentation import pixel_cross_entropy
from model.method import MapKind, MapPlan, Method, Released
from model.multi_scale import LARGEST, MEAN_PROBABILITY, full_precision, fused_maps, resize
from utils.batch import Batch
from utils.errors import UserError

FUSIONS = {"largest": LARGEST._replace(coarse=True), "mean": MEAN_PROBABILITY}


class DeepLab(Method):
    """The method behind the contract of model/method.py."""

    Config, defaults = DeepLabConfig, DEFAULTS
    kinds: ClassVar = {"seg": MapKind("segmentation", background=True, uses_labels=False)}
    best_by = "seg"
    map_keys: ClassVar = {"seg": ("inference.fusion",)}
    learns_from_masks = True

    def __init__(self, config: Any, num_classes: int) -> None:
        super().__init__(config, num_classes)
        m = config.model
        resnet = m.architecture != "largefov"
        if resnet and m.batch_norm == "frozen" and m.weights == "random":
            raise UserError("model.batch_norm=frozen needs trained weights; for random ones: model.batch_norm=synced")
        if m.architecture == "deeplabv3plus" and config.train.batch_size < 2:
            raise UserError("train.batch_size=1: the batch norm of deeplabv3plus needs 2 images or more")
        self.network = DeepLabNetwork(m, num_classes)
        side = int(min(config.loss.scales) * config.data.crop_size)
        if side < (1 if resnet else max(self.network.backbone.patch_size)):
            raise UserError(f"loss.scales={min(config.loss.scales)}: data.crop_size has {side} pixels then, too few")

    def losses(self, batch: Batch, iteration: int) -> dict[str, Tensor]:
        """Cross entropy with the masks (v2, section 4.1): at every scale of `loss.scales`, and at their maximum."""
        made = self.network.of_scales(batch.images, self.config.loss.scales)
        with torch.autocast(batch.images.device.type, enabled=False):
            if self.config.loss.at == "image":
                made = [resize(logits, batch.images.shape[-2:]) for logits in made]
            terms = [pixel_cross_entropy(x, reduced(batch.masks, x.shape[-2:]), self.ratio) for x in made]
            return {"seg": torch.stack(terms).sum()}

    def param_groups(self, train: Any) -> list[dict]:
        """Backbone, and decoder with `head_lr_factor` times its rate; of v2 biases with twice that, without decay
        [kazuto1011]. What is frozen is in none."""
        net, head_lr = self.network, train.lr * train.head_lr_factor
        learning = [parameter for parameter in net.backbone.parameters() if parameter.requires_grad]
        groups = [{"name": "backbone", "params": learning, "lr": train.lr}]
        if self.config.model.architecture != "deeplabv2":
            return [*groups, {"name": "decoder", "params": list(net.decoder.parameters()), "lr": head_lr}]
        weights, biases = ([getattr(one, name) for one in net.decoder.branches] for name in ("weight", "bias"))
        return [
            *groups,
            {"name": "decoder", "params": weights, "lr": head_lr},
            {"name": "decoder_biases", "params": biases, "lr": 2 * head_lr, "weight_decay": 0.0},
        ]

    def load_start_weights(self, weights: dict[str, Tensor]) -> None:
        """Starts the backbone from an image classifier's weights (torchvision's names, as timm's, or those of a ViT)
        or, with model.variant=caffe, from kazuto1011's; heads are left out."""
        m = self.config.model
        if m.architecture != "largefov" and is_official(weights):
            if m.variant != "caffe":
                raise UserError("they are kazuto1011's, of Caffe's ResNet: give model.variant=caffe")
            weights = backbone_of(weights)
        elif m.variant == "caffe":
            raise UserError(f"model.variant=caffe takes kazuto1011's files alone, which have a key {STEM}")
        self.network.backbone.load_start_weights(weights)

    def from_official(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state dict of this module from a DeepLab v2 that kazuto1011 trained, strictly."""
        return {f"network.{name}": value for name, value in from_official(weights, self.network).items()}

    @classmethod
    def recognise(cls, shapes: Mapping[str, tuple[int, ...]]) -> Released | None:
        return recognise(shapes)

    @torch.no_grad()
    def maps(self, images: Tensor, kinds: Mapping[str, MapPlan], labels: Tensor | None = None) -> dict[str, Tensor]:
        """`seg`: logits, or logarithms of mean probabilities (`inference.fusion`). labels: not used."""
        fusion = FUSIONS[self.config.inference.fusion]
        return fused_maps(images, {kind: (plan, fusion) for kind, plan in kinds.items()}, self._coarse_maps)

    @torch.no_grad()
    def coarse_scores(self, images: Tensor, kind: str) -> Tensor:
        return full_precision(self.network(images))

    @torch.no_grad()
    def classify(self, images: Tensor) -> Tensor:
        """(B, K): the largest log odds of each class over the pixels."""
        probability = F.softmax(self.coarse_scores(images, "seg"), 1)[:, 1:].flatten(2).amax(2)
        return torch.logit(probability, eps=1e-6)

    def _coarse_maps(self, images: Tensor, kinds: Collection[str]) -> dict[str, Tensor]:
        return dict.fromkeys(kinds, self.network(images))


def reduced(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Ids uint8 (B, H, W) -> int64 (B, *size): of every new pixel the one under its centre."""
    if masks.shape[-2:] == tuple(size):
        return masks.long()
    return F.interpolate(masks[:, None].float(), tuple(size), mode="nearest-exact")[:, 0].long()

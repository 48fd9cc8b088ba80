"""ACR (ICCV 2023 workshop): all-pairs consistency of attention for weakly supervised semantic segmentation."""

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from model.acr.config import DEFAULTS, ACRConfig
from model.acr.getam import getam
from model.acr.network import ACRNetwork
from model.acr.official import from_official, recognise
from model.backbones.class_token_vit import ClassTokenViT
from model.method import MapKind, MapPlan, Method, Released
from model.multi_scale import Fusion, fused_maps, min_max
from model.pseudo_labels import Present, present_first
from utils.batch import Batch
from utils.errors import UserError

CAM = Fusion(torch.add, torch.add, last=min_max)   # the sum of image and flip, to [0, 1]
FUSIONS = {"getam": CAM._replace(last=partial(min_max, eps=1e-6), align_corners=True), "cam": CAM}


class ACR(Method):
    """The method behind the contract of model/method.py."""

    Config, defaults = ACRConfig, DEFAULTS
    kinds: ClassVar = {
        "cam": MapKind("patch CAM", background=False, uses_labels=True),
        "getam": MapKind("GETAM", background=False, uses_labels=True),
    }
    best_by = "getam"
    map_keys: ClassVar = {"getam": ("getam.function", "getam.start_block", "getam.affinity")}

    def __init__(self, config: Any, num_classes: int) -> None:
        super().__init__(config, num_classes)
        m = config.model
        backbone = ClassTokenViT(m.backbone, m.backbone_args, m.timm_statistics)
        depth = len(backbone.blocks)
        if not -depth <= config.getam.start_block < depth:
            raise UserError(f"getam.start_block={config.getam.start_block}: {m.backbone} has {depth} blocks")
        self.network = ACRNetwork(backbone, num_classes)

    def losses(self, batch: Batch, iteration: int) -> dict[str, Tensor]:
        """The terms of the training objective (ACR, section 3), unweighted fp32 scalars."""
        out = self.network(batch.images)
        with torch.autocast(batch.images.device.type, enabled=False):
            return {
                "cls": F.multilabel_soft_margin_loss(out.class_logits, batch.labels),
                "cls_mirror": F.multilabel_soft_margin_loss(out.mirror_logits, batch.labels),
                "consistency_class": out.consistency[0],
                "consistency_affinity": out.consistency[1],
            }

    def param_groups(self, train: Any) -> list[dict]:
        """Backbone and classifier, which learns `head_lr_factor` times faster; as released they are one group."""
        net, head_lr = self.network, train.lr * train.head_lr_factor
        return [
            {"name": "backbone", "params": list(net.backbone.parameters()), "lr": train.lr},
            {"name": "classifier", "params": list(net.classifier.parameters()), "lr": head_lr},
        ]

    def load_start_weights(self, weights: dict[str, Tensor]) -> None:
        """Starts the backbone from an image classifier's weights (timm's names)."""
        self.network.backbone.load_start_weights(weights)

    def from_official(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state dict of this module made from a weight file of the released code, strictly."""
        return {f"network.{name}": value for name, value in from_official(weights, self.network).items()}

    @classmethod
    def recognise(cls, shapes: Mapping[str, tuple[int, ...]]) -> Released | None:
        return recognise(shapes)

    @torch.no_grad()
    def maps(self, images: Tensor, kinds: Mapping[str, MapPlan], labels: Tensor | None = None) -> dict[str, Tensor]:
        """`getam` and `cam`, the classifier on every patch: (B, K, H, W), 0 for classes that labels rule out."""
        present = present_first(images.new_ones(len(images), self.num_classes) if labels is None else labels)
        plans = {kind: (plan, FUSIONS[kind]) for kind, plan in kinds.items()}
        made = fused_maps(images, plans, partial(self._coarse_maps, present), at_once=True)
        index = present.classes[:, :, None, None].expand(-1, -1, *images.shape[-2:])
        there, full = present.there[:, :, None, None], (len(images), self.num_classes, *images.shape[-2:])
        return {kind: maps.new_zeros(full).scatter_(1, index, maps * there) for kind, maps in made.items()}

    @torch.no_grad()
    def classify(self, images: Tensor) -> Tensor:
        """Class logits (B, K), one pass."""
        return self.network.classify(images)

    def _coarse_maps(self, present: Present, views: Tensor, kinds: Collection[str]) -> dict[str, Tensor]:
        """Maps (B, M, h, w) of these classes of each image, in each of its views."""
        c, network, made = self.config.getam, self.network, {}
        if "getam" in kinds:
            classes = present.classes.repeat(len(views) // len(present.classes), 1)
            made["getam"], patches, grid = getam(
                network, views, classes, c.function, c.start_block, c.affinity, patches="cam" in kinds
            )
        else:
            grid = network.backbone.grid_of(*views.shape[-2:])
            patches = network.backbone.forward(views)[0][:, -grid[0] * grid[1] :]
        if "cam" in kinds:
            made["cam"] = present.of(network.patch_cam(patches, grid))
        return made

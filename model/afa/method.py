"""AFA (CVPR 2022): learning affinity from attention for end-to-end weakly supervised semantic segmentation."""

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from model.afa.affinity import Affinity, affinity_loss, random_walk
from model.afa.config import DEFAULTS, AFAConfig
from model.afa.network import AFANetwork, Outputs
from model.afa.official import from_official, recognise
from model.backbones.in_training import compile_backbone, norms_apart
from model.losses.energy import energy_loss
from model.losses.segmentation import segmentation_loss
from model.method import MapKind, MapPlan, Method, Released
from model.multi_scale import SUM_OF_POSITIVE, Fusion, fused_maps, resize, with_scale_1
from model.pseudo_labels import Present, labels_of_refined, par_images, present_first, refined_labels
from utils.batch import Batch, boxes_of
from utils.errors import UserError
from utils.images import IGNORE

FROM_PSEUDO_LABELS = ("seg", "affinity", "energy")

# logits: the mean of image and flip, the largest over scales, at the decoder's own size
MEAN_OF_FLIP = Fusion(
    lambda maps, mirrored: (maps + mirrored) / 2, torch.maximum, from_base=True, coarse=True, by_scale=True
)
FUSIONS = {"cam": SUM_OF_POSITIVE, "affinity_cam": SUM_OF_POSITIVE, "seg": MEAN_OF_FLIP}


class AFA(Method):
    """The method behind the contract of model/method.py."""

    Config, defaults = AFAConfig, DEFAULTS
    kinds: ClassVar = {
        "cam": MapKind("CAM", background=False, uses_labels=True),
        "affinity_cam": MapKind("affinity CAM", background=True, uses_labels=True),
        "seg": MapKind("segmentation", background=True, uses_labels=False),
    }
    best_by = "seg"
    map_keys: ClassVar = {"affinity_cam": ("pseudo_labels.low", "pseudo_labels.radius")}

    def __init__(self, config: Any, num_classes: int) -> None:
        super().__init__(config, num_classes)
        m = config.model
        if m.timm_statistics:
            raise UserError(
                f"model.weights={m.weights}, model.normalize={m.normalize}: timm has no Mix Transformer; give a file "
                "or a name that `tools/download.py list` shows, which takes ImageNet's mean and std"
            )
        self.network = AFANetwork(
            m.backbone, m.backbone_args, m.strides, num_classes, m.decoder_channels, m.pooling, m.drop_path, m.dropout
        )

    def losses(self, batch: Batch, iteration: int) -> dict[str, Tensor]:
        """The terms of the training objective (AFA, equation 9), unweighted fp32 scalars; iteration counts from 0."""
        consistency = self.config.loss.weights.consistent
        out, present = self.network(batch.images, consistency), present_first(batch.labels, batch.most_classes)
        pseudo = self.pseudo_labels(out, present, batch, iteration)
        with torch.autocast(batch.images.device.type, enabled=False):
            seg_logits = resize(out.seg_logits.float(), batch.images.shape[-2:])
            c = self.config
            terms = {
                "cls": F.multilabel_soft_margin_loss(out.class_logits, batch.labels),
                "seg": segmentation_loss(seg_logits, pseudo["pixel"], self.ratio),
                "affinity": affinity_loss(
                    out.affinity.full(), pseudo["affinity"], self.num_classes, c.pseudo_labels.radius, self.ratio
                ),
            }
            if c.loss.weights.energy:
                terms["energy"] = energy_loss(
                    seg_logits, batch.images, pseudo["pixel"], valid=batch.valid, **c.loss.energy_settings
                )
            if consistency:   # of ACR
                terms["consistency_affinity"] = out.consistency
        return terms

    @torch.no_grad()
    def pseudo_labels(self, out: Outputs, present: Present, batch: Batch, iteration: int) -> dict[str, Tensor]:
        """What the terms learn from: `pixel` (B, H, W), `affinity` (B, h, w); int64, 255 where unsure and on padding.

        With pseudo_labels.cam_pass=eval all are 255 while no term that learns from them has a weight.
        """
        c, weights, grid = self.config.pseudo_labels, self.loss_weights(iteration), out.affinity.grid
        if c.cam_pass == "eval" and not any(weights.get(term) for term in FROM_PSEUDO_LABELS):
            pixel = torch.full_like(batch.valid, IGNORE, dtype=torch.int64)
            return {"pixel": pixel, "affinity": pixel.new_full((len(pixel), *grid), IGNORE)}
        cam, affinity = self._training_cams(batch.images, out, present)
        with torch.autocast(batch.images.device.type, enabled=False):
            image, walks = par_images(batch.images), iteration > c.walk_after
            walked = self.walked_labels(cam, affinity, present, image, batch) if walks else None
            if walks and c.walk_for_affinity:
                pixel = pairs = walked
            else:
                pairs = refined_labels(cam, present, image, c.high, c.low, c.par_dilations, c.par_iterations)
                pairs = pairs.masked_fill(~batch.valid, IGNORE)
                pixel = walked if walks else pairs
        return {"pixel": pixel, "affinity": F.interpolate(pairs[:, None].float(), grid)[:, 0].long()}

    def walked_labels(self, cam: Tensor, affinity: Affinity, present: Present, image: Tensor, batch: Batch) -> Tensor:
        """Pixel labels (B, H, W) after the random walk of `cam` (B, M, H, W) and PAR, which sees no padding (AFA,
        sections 3.3 and 3.4)."""
        c = self.config.pseudo_labels
        scores = torch.cat([scores_with_background(cam, present, affinity.grid, bkg) for bkg in (c.high, c.low)], 1)
        walked = resize(random_walk(scores, affinity.block, c.radius), image.shape[-2:])
        labels = torch.full_like(batch.valid, IGNORE, dtype=torch.int64)
        for index, (top, bottom, left, right) in enumerate(batch.boxes or boxes_of(batch.valid)):
            if top < bottom and left < right:
                own = slice(index, index + 1), slice(None), slice(top, bottom), slice(left, right)
                of_image = Present(present.classes[index : index + 1], present.there[index : index + 1])
                labels[own[0], own[2], own[3]] = labels_of_refined(
                    walked[own], of_image, image[own], c.par_dilations, c.par_iterations
                )
        return labels

    def param_groups(self, train: Any) -> list[dict]:
        """Encoder, its norms, which are frozen as released, heads and decoder; the last two learn `head_lr_factor`
        times faster."""
        net, lr, head_lr = self.network, train.lr, train.lr * train.head_lr_factor
        others, norms = norms_apart(net.backbone)
        heads = [*net.classifier.parameters(), *net.affinity_head.parameters()]
        return [
            {"name": "encoder", "params": others, "lr": lr},
            {"name": "norms", "params": norms, "lr": 0.0, "weight_decay": 0.0},
            {"name": "heads", "params": heads, "lr": head_lr},
            {"name": "decoder", "params": list(net.decoder.parameters()), "lr": head_lr},
        ]

    def load_start_weights(self, weights: dict[str, Tensor]) -> None:
        """Starts the backbone from an image classifier's weights."""
        self.network.backbone.load_start_weights(weights)

    def compile(self, **options) -> None:
        """torch.compile of the backbone in training: a graph for the training forward and two for each scale."""
        compile_backbone(self.network.backbone, 2 + 2 * len(self.config.pseudo_labels.cam_scales), **options)

    def from_official(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state dict of this module made from a weight file of the released code, strictly."""
        return {f"network.{name}": value for name, value in from_official(weights, self.network).items()}

    @classmethod
    def recognise(cls, shapes: Mapping[str, tuple[int, ...]]) -> Released | None:
        return recognise(shapes)

    @classmethod
    def validation_plans(cls, config: Any) -> dict[str, MapPlan]:
        """As released: images of their own size; CAM at the training scales with flip, segmentation at scale 1."""
        plan = MapPlan(side=config.evaluate.base_size, bkg=config.evaluate.bkg)
        cam = plan._replace(scales=with_scale_1(config.pseudo_labels.cam_scales), flip=True)
        return {"cam": cam, "affinity_cam": cam._replace(bkg=0.0), "seg": plan._replace(bkg=0.0)}

    @classmethod
    def sure_above(cls, config: Any) -> tuple[float, float]:
        return config.pseudo_labels.high, config.pseudo_labels.low

    @torch.no_grad()
    def maps(self, images: Tensor, kinds: Mapping[str, MapPlan], labels: Tensor | None = None) -> dict[str, Tensor]:
        """`cam`: (B, K, H, W). `seg`: logits. `affinity_cam`: log-probabilities of background and classes after the
        random walk of the CAM, with the background of pseudo_labels.low and the affinity of scale 1; classes that
        `labels` lack, where these are given, get the least."""
        known, affinity = {}, None
        if "affinity_cam" in kinds:   # the pass that gives its affinity gives the maps of this scale, too
            size = kinds["affinity_cam"].input_size(*images.shape[-2:])
            features = self.network.features(resize(images, size), affinity=True)
            with torch.autocast(images.device.type, enabled=False):
                affinity = self.network.affinity_head(features.attention)
            alike = [kind for kind, plan in kinds.items() if plan.input_size(*images.shape[-2:]) == size]
            known = self._of_features(features.stages, alike)
        plans = {kind: (plan, FUSIONS[kind]) for kind, plan in kinds.items()}
        made = fused_maps(images, plans, self._coarse_maps, known)
        if affinity is not None:
            with torch.autocast(images.device.type, enabled=False):
                made["affinity_cam"] = self._walked(made["affinity_cam"], affinity, labels)
        return made

    @torch.no_grad()
    def coarse_scores(self, images: Tensor, kind: str) -> Tensor:
        if kind == "seg":
            return self._coarse_maps(images, ["seg"])["seg"].float()
        return super().coarse_scores(images, kind)

    @torch.no_grad()
    def classify(self, images: Tensor) -> Tensor:
        """Class logits (B, K), one pass."""
        return self.network.class_logits(self.network.features(images))

    def _coarse_maps(self, images: Tensor, kinds: Collection[str]) -> dict[str, Tensor]:
        return self._of_features(self.network.features(images).stages, kinds)

    def _of_features(self, stages: tuple[Tensor, ...], kinds: Collection[str]) -> dict[str, Tensor]:
        """(B, K+1, h_1, w_1) of the segmentation, (B, K, h, w) of the CAM that the other two are made of."""
        cam = self.network.cam(stages[-1])
        return {kind: self.network.decoder(stages) if kind == "seg" else cam for kind in kinds}

    def _walked(self, cam: Tensor, affinity: Affinity, labels: Tensor | None) -> Tensor:
        """Log-probabilities (B, K+1, H, W) of the CAM (B, K, H, W) after the random walk."""
        c, size = self.config.pseudo_labels, cam.shape[-2:]
        there = torch.ones_like(cam[:, :, 0, 0]) if labels is None else labels
        classes = torch.arange(cam.shape[1], device=cam.device).expand(len(cam), -1)
        scores = scores_with_background(cam, Present(classes, there > 0), affinity.grid, c.low)
        walked = random_walk(scores, affinity.block, c.radius)
        return resize(walked, size).clamp(min=1e-8).log()

    @torch.no_grad()
    def _training_cams(self, images: Tensor, out: Outputs, present: Present) -> tuple[Tensor, Affinity]:
        """CAM (B, M, H, W) of these classes, and the affinity of the images at the largest scale.

        Images and mirrors of a scale are one batch. In the mode `train` the passes count in the decoder's batch
        statistics, as released; what `out` has of the images themselves is not computed again.
        """
        network, c = self.network, self.config.pseudo_labels
        train, scales, size = c.cam_pass == "train", with_scale_1(c.cam_scales), images.shape[-2:]
        largest, found = [int(max(scales) * side) for side in size], [out.affinity]

        def coarse_maps(views: Tensor, kinds: Collection[str]) -> dict[str, Tensor]:
            wanted = list(views.shape[-2:]) == largest != list(size)
            features = network.features(views, affinity=wanted)
            if wanted:
                with torch.autocast(images.device.type, enabled=False):
                    found.append(network.affinity_head(features.attention).first(len(images)))
            if train:
                alone = views.shape[-2:] == size   # the mirrors; the images' are at hand
                pairs = zip(out.stages, features.stages, strict=True)
                network.decoder.count([torch.cat(pair) for pair in pairs] if alone else features.stages)
            return {"cam": network.cam(features.stages[-1])}

        known = {"cam": network.cam(out.stages[-1])} if train else None
        network.train(train)
        plan = {"cam": (MapPlan(scales, flip=True), SUM_OF_POSITIVE)}
        cam = fused_maps(images, plan, coarse_maps, known, present.of, at_once=True)["cam"]
        network.train(self.training)
        return cam, found[-1]


def scores_with_background(cam: Tensor, present: Present, grid: tuple[int, int], background: float) -> Tensor:
    """Softmax (B, 1 + M, *grid) over a constant background score and the CAM (B, M, H, W) of present classes."""
    tokens = resize(cam, grid).masked_fill(~present.there[:, :, None, None], -torch.inf)
    return F.pad(tokens, (0, 0, 0, 0, 1, 0), value=background).softmax(1)

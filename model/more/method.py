"""MoRe (AAAI 2025): class patch attention needs regularization for weakly supervised semantic segmentation."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from model.backbones.in_training import compile_backbone, norms_apart
from model.backbones.vit import MultiClassTokenViT
from model.losses.affinity import ptc_loss
from model.losses.energy import energy_loss
from model.losses.segmentation import segmentation_loss
from model.method import MapKind, MapPlan, Method, Released
from model.more.config import DEFAULTS, RENAMED, MoReConfig
from model.more.lir import certain_loss, hashed_order, sample_uncertain, token_loss, uncertain_loss
from model.more.network import MoReNetwork, Outputs
from model.more.official import from_official, recognise
from model.multi_scale import LARGEST, SUM, SUM_OF_POSITIVE, full_precision, fused_maps, min_max, resize, with_scale_1
from model.pseudo_labels import Present, par_images, present_first, refined_labels, token_labels, valid_tokens
from utils.batch import Batch
from utils.images import IGNORE

FROM_PSEUDO_LABELS = ("ptc", "certain", "uncertain", "seg", "energy")


FUSIONS = {"cam": SUM_OF_POSITIVE, "cam_aux": SUM_OF_POSITIVE, "lam": SUM, "seg": LARGEST}


class MoRe(Method):
    """The method behind the contract of model/method.py."""

    Config, defaults, renamed = MoReConfig, DEFAULTS, RENAMED
    kinds: ClassVar = {
        "cam": MapKind("CAM", background=False, uses_labels=True),
        "lam": MapKind("LAM", background=False, uses_labels=True),
        "fused": MapKind("CAM x LAM", background=False, uses_labels=True),
        "seg": MapKind("segmentation", background=True, uses_labels=False),
    }
    best_by = "seg"

    def __init__(self, config: Any, num_classes: int) -> None:
        super().__init__(config, num_classes)
        m = config.model
        args = m.backbone, dict(m.backbone_args), num_classes, m.registers, m.aux_block
        backbone = MultiClassTokenViT(*args, timm_statistics=m.timm_statistics)
        if config.loss.weights.consistent:
            backbone.refuse_hidden_attention("loss.weights.consistency_*")
        self.network = MoReNetwork(backbone, m.token_ratio, m.decoder_channels)
        self.token_order = hashed_order    # which tokens the uncertain loss samples first

    def losses(self, batch: Batch, iteration: int) -> dict[str, Tensor]:
        """The terms of the training objective (MoRe, section 3.4), unweighted fp32 scalars; iteration counts from 0.

        While no term that learns from pseudo labels has a weight, no CAM is made and those labels are all ignored.
        """
        weights = self.loss_weights(iteration)
        consistency = self.config.loss.weights.consistent
        out, cams = self.network(batch.images, consistency), None
        present = present_first(batch.labels, batch.most_classes)
        if any(weights[term] for term in FROM_PSEUDO_LABELS):
            cams = self._training_cams(batch.images, out, present)
        with torch.autocast(batch.images.device.type, enabled=False):
            out = Outputs(*map(full_precision, out[:-1]), out.consistency)
            pseudo = self.pseudo_labels(cams, present, batch, out.patches.shape[-2:], iteration)
            del cams   # large
            seg_logits = resize(out.seg_logits, batch.images.shape[-2:])
            c = self.config.loss
            samples = sample_uncertain(
                pseudo["uncertain"], self.token_order, batch.seeds, c.uncertain_tokens, pseudo["valid"]
            )
            terms = {
                "cls": F.multilabel_soft_margin_loss(out.class_logits, batch.labels),
                "cls_aux": F.multilabel_soft_margin_loss(out.aux_logits, batch.labels),
                "token": token_loss(out.class_tokens, c.token_temperature),
                "ptc": ptc_loss(out.patches, pseudo["ptc"], self.ratio),
                "certain": certain_loss(
                    out.class_tokens, out.patches, pseudo["certain"], present, c.certain_temperature, pseudo["valid"]
                ),
                "uncertain": uncertain_loss(out.class_tokens, out.patches, samples, batch.labels, self.ratio),
                "seg": segmentation_loss(seg_logits, pseudo["pixel"], self.ratio),
                "energy": energy_loss(
                    seg_logits, batch.images, pseudo["pixel"], valid=batch.valid, **c.energy_settings
                ),
            }
            if consistency:   # of ACR
                terms["consistency_class"], terms["consistency_affinity"] = out.consistency
        return terms

    @torch.no_grad()
    def pseudo_labels(
        self, cams: dict[str, Tensor] | None, present: Present, batch: Batch, grid: Sequence[int], iteration: int
    ) -> dict[str, Tensor]:
        """What the terms learn from: `ptc`, `certain`, `uncertain` (B, h, w), `pixel` (B, H, W), `valid` (B, h, w).

        cams: `cam` and `cam_aux` of these classes, (B, M, H, W) in [0, 1]; None: all labels are 255.
        Labels are int64, 255 where unsure and on padding.
        """
        inside = valid_tokens(batch.valid, self.network.backbone.patch_size)
        if cams is None:
            tokens, pixels = (torch.full_like(x, IGNORE, dtype=torch.int64) for x in (inside, batch.valid))
            return {"ptc": tokens, "certain": tokens, "uncertain": tokens, "pixel": pixels, "valid": inside}
        c, cam, cam_aux = self.config.pseudo_labels, cams["cam"], cams["cam_aux"]
        main = iteration > c.main_cam_after
        source, certain, uncertain = (
            (cam, c.certain.main, c.uncertain.main) if main else (cam_aux, c.certain.aux, c.uncertain.aux)
        )
        pixel = self._pixel_labels(cam, present, par_images(batch.images))
        tokens = {
            "ptc": token_labels(cam_aux, present, grid, c.high, c.low),
            "certain": token_labels(source, present, grid, *certain),
            "uncertain": token_labels(source, present, grid, *uncertain),
        }
        tokens = {name: label.masked_fill(~inside, IGNORE) for name, label in tokens.items()}
        return {**tokens, "pixel": pixel.masked_fill(~batch.valid, IGNORE), "valid": inside}

    def param_groups(self, train: Any) -> list[dict]:
        """Encoder, its tokens if `model.token_lr_factor` is not 1, encoder norms, classifiers, GCR, decoder; the last
        three learn `head_lr_factor` times faster."""
        net, lr, head_lr = self.network, train.lr, train.lr * train.head_lr_factor
        token_factor = self.config.model.token_lr_factor
        others, norms = norms_apart(net.backbone)
        classifiers = [*net.classifier.parameters(), *net.aux_classifier.parameters()]
        tokens = [net.backbone.tokens, net.backbone.token_pos] if token_factor != 1 else []
        others = [parameter for parameter in others if all(parameter is not token for token in tokens)]
        return [
            {"name": "encoder", "params": others, "lr": lr},
            *([{"name": "tokens", "params": tokens, "lr": lr * token_factor}] if tokens else []),
            {"name": "norms", "params": norms, "lr": lr},
            {"name": "classifiers", "params": classifiers, "lr": head_lr},
            {"name": "gcr", "params": list(net.gcr.parameters()), "lr": head_lr},
            {"name": "decoder", "params": list(net.decoder.parameters()), "lr": head_lr},
        ]

    def load_start_weights(self, weights: dict[str, Tensor]) -> None:
        """Starts the backbone from an image classifier's weights (timm's names)."""
        self.network.backbone.load_start_weights(weights)

    def compile(self, **options) -> None:
        """torch.compile of the backbone in training, where nearly all the time goes: a graph for the training forward
        and one for each scale of the CAM pass, whatever else is computed between steps."""
        compile_backbone(self.network.backbone, 2 + len(self.config.pseudo_labels.cam_scales), **options)

    def from_official(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state dict of this module made from a released MoRe weight file, strictly."""
        own = from_official(weights, self.network)
        return {f"network.{name}": value for name, value in own.items()}

    @classmethod
    def recognise(cls, shapes: Mapping[str, tuple[int, ...]]) -> Released | None:
        return recognise(shapes)

    @classmethod
    def validation_plans(cls, config: Any) -> dict[str, MapPlan]:
        """As released: CAM at the training scales with flip, LAM and segmentation at scale 1 without; LAM and CAM x LAM
        are brought to [0, 1] at the image's own size."""
        plans = super().validation_plans(config)
        plans["lam"] = plans["lam"]._replace(at_own_size=True)
        plans["cam"] = plans["cam"]._replace(scales=with_scale_1(config.pseudo_labels.cam_scales), flip=True)
        plans["fused"] = plans["fused"]._replace(scales=())   # of these two
        return plans

    @classmethod
    def sure_above(cls, config: Any) -> tuple[float, float]:
        return config.pseudo_labels.high, config.pseudo_labels.low

    @torch.no_grad()
    def maps(
        self, images: Tensor, kinds: Mapping[str, MapPlan], labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Kinds: those of `kinds`, and `cam_aux`. `seg`: logits. `fused`: CAM x LAM brought to [0, 1] again, both
        made as its own plan says, or, where that has no scales, the two that are asked for beside it."""
        made = self._separate_maps(images, {kind: plan for kind, plan in kinds.items() if kind != "fused"})
        if "fused" in kinds:
            both = dict.fromkeys(("cam", "lam"), kinds["fused"])
            known = not kinds["fused"].scales or all(kinds.get(kind) == plan for kind, plan in both.items())
            factors = made if known else self._separate_maps(images, both)
            made["fused"] = min_max(factors["cam"] * factors["lam"])
        return {kind: made[kind] for kind in kinds}

    @torch.no_grad()
    def coarse_scores(self, images: Tensor, kind: str) -> Tensor:
        return full_precision(self.network.coarse_maps(images, [kind])[kind])

    @torch.no_grad()
    def classify(self, images: Tensor) -> Tensor:
        """Class logits (B, K), one pass."""
        return full_precision(self.network.classify(images))

    def _separate_maps(self, images: Tensor, plans: Mapping[str, MapPlan]) -> dict[str, Tensor]:
        fusions = {k: FUSIONS[k]._replace(from_base=False) if p.at_own_size else FUSIONS[k] for k, p in plans.items()}
        return fused_maps(images, {k: (plan, fusions[k]) for k, plan in plans.items()}, self.network.coarse_maps)

    @torch.no_grad()
    def _training_cams(self, images: Tensor, out: Outputs, present: Present) -> dict[str, Tensor]:
        """CAM and auxiliary CAM (B, M, H, W) of the classes that labels leave; `out` has them already for the images
        themselves."""
        names, network = ("cam", "cam_aux"), self.network   # fused together, as one map of 2 M channels

        def together(maps: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"both": torch.cat([maps[name] for name in names], 1)}

        def coarse_maps(images: Tensor, kinds: Collection[str]) -> dict[str, Tensor]:
            return together(network.coarse_maps(images, names))

        twice = Present(torch.cat([present.classes, present.classes + self.num_classes], 1), present.there.repeat(1, 2))
        plan = MapPlan(with_scale_1(self.config.pseudo_labels.cam_scales), flip=True)
        known = together(network.cams_of(out.patches, out.aux))
        fused = fused_maps(images, {"both": (plan, SUM_OF_POSITIVE)}, coarse_maps, known, twice.of)
        return dict(zip(names, fused["both"].chunk(2, 1), strict=True))

    def _pixel_labels(self, cam: Tensor, present: Present, image: Tensor) -> Tensor:
        c = self.config.pseudo_labels
        return refined_labels(cam, present, image, c.high, c.low, c.par_dilations, c.par_iterations)

"""MoRe (AAAI 2025): class patch attention needs regularization for weakly supervised semantic segmentation."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn

from model.backbones.vit import MultiClassTokenViT
from model.losses.affinity import ptc_loss
from model.losses.energy import energy_loss
from model.losses.ratio import local_ratio
from model.losses.segmentation import segmentation_loss
from model.more.lir import certain_loss, hashed_order, sample_uncertain, token_loss, uncertain_loss
from model.more.network import MoReNetwork, Outputs
from model.more.official import from_official
from model.multi_scale import full_precision, localization_maps, resize, segmentation_logits
from model.pseudo_labels import refined_labels, token_labels, valid_tokens
from utils.batch import Batch
from utils.images import IGNORE, denormalize

FROM_PSEUDO_LABELS = ("ptc", "certain", "uncertain", "seg", "energy")


class MoRe(nn.Module):
    """The method behind the engine's contract: losses, their weights, parameter groups, localize, segment."""

    def __init__(self, config: DictConfig, num_classes: int) -> None:
        super().__init__()
        m = config.model
        backbone = MultiClassTokenViT(m.backbone, dict(m.backbone_args), num_classes, m.registers, m.aux_block)
        self.network = MoReNetwork(backbone, m.token_ratio, m.decoder_channels)
        self.num_classes = num_classes
        self.labels_config, self.loss_config = config.pseudo_labels, config.loss
        self.head_lr_factor = config.train.head_lr_factor
        self.token_order = hashed_order    # which tokens the uncertain loss samples first
        self.ratio = local_ratio           # the engine puts one here that counts over all processes

    def forward(self, batch: Batch, iteration: int) -> dict[str, Tensor]:
        return self.losses(batch, iteration)

    def losses(self, batch: Batch, iteration: int) -> dict[str, Tensor]:
        """The terms of the training objective (MoRe, section 3.4), unweighted fp32 scalars; iteration counts from 0.

        While no term that learns from pseudo labels has a weight, no CAM is made and those labels are all ignored.
        """
        weights = self.loss_weights(iteration)
        out = self.network(batch.images)
        cams = self._training_cams(batch.images, out) if any(weights[term] for term in FROM_PSEUDO_LABELS) else None
        with torch.autocast(batch.images.device.type, enabled=False):
            out = type(out)(*map(full_precision, out))
            pseudo = self.pseudo_labels(cams, batch, out.patches.shape[-2:], iteration)
            del cams   # large
            seg_logits = resize(out.seg_logits, batch.images.shape[-2:])
            c = self.loss_config
            samples = sample_uncertain(
                pseudo["uncertain"], self.token_order, batch.seeds, c.uncertain_tokens, pseudo["valid"]
            )
            return {
                "cls": F.multilabel_soft_margin_loss(out.class_logits, batch.labels),
                "cls_aux": F.multilabel_soft_margin_loss(out.aux_logits, batch.labels),
                "token": token_loss(out.class_tokens, c.token_temperature),
                "ptc": ptc_loss(out.patches, pseudo["ptc"], self.ratio),
                "certain": certain_loss(
                    out.class_tokens, out.patches, pseudo["certain"], batch.labels, c.certain_temperature,
                    pseudo["valid"], batch.most_classes,
                ),
                "uncertain": uncertain_loss(out.class_tokens, out.patches, samples, batch.labels, self.ratio),
                "seg": segmentation_loss(seg_logits, pseudo["pixel"], self.ratio),
                "energy": energy_loss(
                    seg_logits, batch.images, pseudo["pixel"], weight=c.energy_weight, sigma_rgb=c.energy_sigma_rgb,
                    sigma_xy=c.energy_sigma_xy, scale=c.energy_scale, valid=batch.valid,
                ),
            }

    @torch.no_grad()
    def pseudo_labels(
        self, cams: tuple[Tensor, Tensor] | None, batch: Batch, grid: Sequence[int], iteration: int
    ) -> dict[str, Tensor]:
        """What the terms learn from: `ptc`, `certain`, `uncertain` (B, h, w), `pixel` (B, H, W), `valid` (B, h, w).

        cams: CAM and auxiliary CAM, (B, K, H, W) in [0, 1]; None: all labels are 255.
        Labels are int64, 255 where unsure and on padding.
        """
        inside = valid_tokens(batch.valid, self.network.backbone.patch_size)
        if cams is None:
            tokens, pixels = (torch.full_like(x, IGNORE, dtype=torch.int64) for x in (inside, batch.valid))
            return {"ptc": tokens, "certain": tokens, "uncertain": tokens, "pixel": pixels, "valid": inside}
        c, (cam, cam_aux) = self.labels_config, cams
        stage, source = ("main", cam) if iteration > c.main_cam_after else ("aux", cam_aux)
        # the released code truncates the denormalised image before it goes through PAR
        image = denormalize(batch.images).clamp(0, 255).floor() / 255
        pixel = self._pixel_labels(cam, batch, image)
        tokens = {
            "ptc": token_labels(cam_aux, batch.labels, grid, c.high, c.low),
            "certain": token_labels(source, batch.labels, grid, *c.certain[stage]),
            "uncertain": token_labels(source, batch.labels, grid, *c.uncertain[stage]),
        }
        tokens = {name: label.masked_fill(~inside, IGNORE) for name, label in tokens.items()}
        return {**tokens, "pixel": pixel.masked_fill(~batch.valid, IGNORE), "valid": inside}

    def loss_weights(self, iteration: int) -> dict[str, float]:
        """Weight of every term at this iteration (MoRe, section 4.1): 0 until its stage starts."""
        c = self.loss_config
        return {term: weight if iteration > c.start_after[term] else 0.0 for term, weight in c.weights.items()}

    def param_groups(self, lr: float) -> list[dict]:
        """Encoder, encoder norms, classifiers, GCR, decoder; the last three learn `head_lr_factor` times faster."""
        net, head_lr = self.network, lr * self.head_lr_factor
        encoder = dict(net.backbone.named_parameters())
        norms = [p for name, p in encoder.items() if "norm" in name]
        others = [p for name, p in encoder.items() if "norm" not in name]
        classifiers = [*net.classifier.parameters(), *net.aux_classifier.parameters()]
        return [
            {"name": "encoder", "params": others, "lr": lr},
            {"name": "norms", "params": norms, "lr": lr},
            {"name": "classifiers", "params": classifiers, "lr": head_lr},
            {"name": "gcr", "params": list(net.gcr.parameters()), "lr": head_lr},
            {"name": "decoder", "params": list(net.decoder.parameters()), "lr": head_lr},
        ]

    def load_start_weights(self, weights: dict[str, Tensor]) -> None:
        """Starts the backbone from an image classifier's weights (timm's names)."""
        self.network.backbone.load_start_weights(weights)

    def compile(self, **options) -> None:
        """torch.compile of the backbone, where nearly all the time goes; each image size is compiled for itself."""
        self.network.backbone.compile(dynamic=False, **options)

    def from_official(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state dict of this module made from a released MoRe weight file, strictly."""
        own = from_official(weights, self.network)
        return {f"network.{name}": value for name, value in own.items()}

    @torch.no_grad()
    def localize(self, images: Tensor, kind: str, scales: Sequence[float], flip: bool) -> Tensor:
        """Maps (B, K, H, W) in [0, 1] at the size of `images`. kind: cam, cam_aux or lam."""
        if kind == "lam":
            return localization_maps(images, lambda x: (self.network.lam(x),), scales, flip, relu=False)[0]
        cam, cam_aux = localization_maps(images, self.network.cams, scales, flip, relu=True)
        return {"cam": cam, "cam_aux": cam_aux}[kind]

    @torch.no_grad()
    def segment(
        self, images: Tensor, scales: Sequence[float], flip: bool, out_size: Sequence[int] | None = None
    ) -> Tensor:
        """Logits (B, K+1, *out_size); out_size None: the size of `images`."""
        return segmentation_logits(images, self.network.segment, scales, flip, out_size or images.shape[-2:])

    @torch.no_grad()
    def classify(self, images: Tensor) -> Tensor:
        """Class logits (B, K), one pass."""
        return full_precision(self.network.classify(images))

    @torch.no_grad()
    def _training_cams(self, images: Tensor, out: Outputs) -> tuple[Tensor, Tensor]:
        """CAM and auxiliary CAM; the training forward `out` has them already for the images themselves."""
        known = self.network.cams_of(out.patches, out.aux)
        scales = self.labels_config.cam_scales
        return localization_maps(images, self.network.cams, scales, flip=True, relu=True, known=known)

    def _pixel_labels(self, cam: Tensor, batch: Batch, image: Tensor) -> Tensor:
        c = self.labels_config
        return refined_labels(
            cam, batch.labels, image, c.high, c.low, c.par_dilations, c.par_iterations, batch.most_classes
        )

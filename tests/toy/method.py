"""A method that the project knows nothing of; `method.py MODULE ARGUMENTS` registers it and runs a script or tool."""

import importlib
import sys
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from engine.launch import run_script
from model import METHODS
from model.method import MapKind, Method, ModelSection
from model.multi_scale import LARGEST, SUM_OF_POSITIVE, fused_maps
from utils.schema import Count, NotNegative, Section, Share, key


class Model(ModelSection):
    width: Count = key(8, "ours")
    dropout: Share = key(0.2, "ours")


class Loss(Section):
    area_weight: NotNegative = key(0.1, "ours")
    area_after: int = key(2, "ours")


class ToyConfig(Section):
    model: Model = Model()
    loss: Loss = Loss()


class Toy(Method):
    """Region scores of a convolution; evidence: the gradient of a class logit by the features, times these."""

    Config = ToyConfig
    defaults: ClassVar = {
        "train": {"optimizer": "sgd", "lr": 0.05, "epochs": 3, "warmup_iterations": 0, "weight_decay": 0.0},
        "evaluate": {"base_size": 32, "scales": {"regions": [1.0, 1.5]}},
    }
    kinds: ClassVar = {"evidence": MapKind("evidence", False, True), "regions": MapKind("regions", True, False)}
    best_by = "regions"

    def __init__(self, config, num_classes):
        super().__init__(config, num_classes)
        width, dropout = config.model.width, nn.Dropout(config.model.dropout)
        self.body = nn.Sequential(nn.Conv2d(3, width, 4, 4), nn.GELU(), nn.BatchNorm2d(width), dropout)
        self.head = nn.Conv2d(width, num_classes + 1, 1)

    def losses(self, batch, iteration):
        scores = self.head(self.body(batch.images)).float()
        logits = scores.mean((2, 3))
        image = F.multilabel_soft_margin_loss(logits[:, 1:] - logits[:, :1], batch.labels)
        return {"image": image, "area": scores.softmax(1)[:, 1:].square().mean()}

    def loss_weights(self, iteration):
        return {"image": 1.0, "area": self.config.loss.area_weight * (iteration > self.config.loss.area_after)}

    def classify(self, images):
        scores = self.head(self.body(images)).mean((2, 3))
        return scores[:, 1:] - scores[:, :1]

    def maps(self, images, kinds, labels=None):
        how = {"regions": LARGEST, "evidence": SUM_OF_POSITIVE}
        return fused_maps(images, {kind: (plan, how[kind]) for kind, plan in kinds.items()}, self._coarse)

    def _coarse(self, images, kinds):
        with torch.enable_grad():
            features = self.body(images)
            scores = self.head(features)
            evidence = [torch.autograd.grad(s.sum(), features, retain_graph=True)[0] for s in scores[:, 1:].unbind(1)]
        return {"regions": scores.detach(), "evidence": (torch.stack(evidence, 1) * features[:, None]).sum(2).detach()}


METHODS["toy"] = Toy
if __name__ == "__main__":
    run_script(importlib.import_module(sys.argv.pop(1)).main)

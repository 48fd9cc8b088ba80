"""A method in closed form and a data set for it; as a program, one of several processes that evaluate it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from datasets import EvalItem
from engine.config import load_config
from engine.distributed import cleanup, setup
from engine.evaluation.evaluate import evaluate
from model import METHODS
from model.method import MapPlan, Method
from model.more.config import DEFAULTS, RENAMED, MoReConfig
from model.more.method import MoRe
from model.multi_scale import min_max
from utils.images import normalize

K = 3


class FakeMethod(Method):
    """Maps that are functions of a pixel's colour (c0, c1, c2) alone, in units of the normalised image.

    CAM of class k: sigmoid(c_k), 0.9 times that at each scale other than 1; LAM: sigmoid(-c_k).
    Logits: 0.1 of background, c_k of class k, twice that with flip. Class logits: the mean of c_k.
    Kinds and keys of the config are MoRe's. calls: what `maps` got.
    """

    Config, defaults, renamed = MoReConfig, DEFAULTS, RENAMED
    kinds, best_by = MoRe.kinds, MoRe.best_by

    def __init__(self, config=None, num_classes=K) -> None:
        super().__init__(config, num_classes)
        self.calls: list[tuple] = []

    def maps(self, images, kinds, labels):
        self.calls.append((tuple(images.shape), dict(kinds), self.training))
        return {kind: self.map(images, kind, plan) for kind, plan in kinds.items()}

    def map(self, images, kind, plan):
        if kind == "fused":
            return min_max(self.map(images, "cam", plan) * self.map(images, "lam", plan))
        if kind == "seg":
            return torch.cat([torch.full_like(images[:, :1], 0.1), images], 1) * (1 + plan.flip)
        return {"cam": images, "lam": -images}[kind].sigmoid() * 0.9 ** (len(plan.scales) - 1)

    def coarse_scores(self, images, kind):
        """Every fourth pixel, logits changed so that the maps' own argmax would tell other classes."""
        lower = torch.tensor([0.0, 2, 0, 0], device=images.device).view(4, 1, 1)
        return self.map(images[..., ::2, ::2], kind, MapPlan(flip=True)) - lower

    def classify(self, images):
        return images.mean((2, 3))

    @classmethod
    def validation_plans(cls, config):
        plans = super().validation_plans(config)
        plans["cam"] = plans["cam"]._replace(scales=(1.0, 0.5), flip=True)
        return plans


@contextmanager
def registered() -> Iterator[None]:
    """Within it the method `fake` of a config is FakeMethod."""
    METHODS["fake"] = FakeMethod
    yield
    del METHODS["fake"]


@pytest.fixture(scope="module", autouse=True)
def fake_is_known():
    """For the modules that import it."""
    with registered():
        yield


class FakeSet:
    """Images of random colours and sizes, with labels and masks that have nothing to do with them."""

    classes = ("first", "second", "third")

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> EvalItem:
        rng = np.random.default_rng(index)
        size = tuple(rng.integers(6, 12, 2))
        image = normalize(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
        truth = rng.choice([0, 1, 3, 255], size).astype(np.uint8)   # class 2 is never there
        labels = torch.zeros(K)
        labels[[[0], [0, 2], [1], []][index % 4]] = 1
        return EvalItem(f"image_{index}", image, labels, truth)


def config(*overrides: str):
    """The default config of FakeMethod without workers, at native size."""
    return load_config(None, ["method=fake", "data.workers=0", "evaluate.base_size=null", *overrides])


if __name__ == "__main__":
    ranks = setup()
    with registered():
        rows = evaluate(FakeMethod(), FakeSet(5), config(), ranks, "weights", Path(f"{sys.argv[1]}.{ranks.rank}"))
    print(repr([row["miou"] for row in rows]))
    cleanup()
